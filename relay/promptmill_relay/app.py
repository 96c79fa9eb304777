"""The relay by itself: streams and health, nothing else."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial

from promptmill.errors import BadRequest, NotFound, StoreUnavailable
from promptmill.metrics import follow_store
from promptmill.reading import Hub
from promptmill.servers import announced
from promptmill.settings import Settings
from promptmill.store import Store
from promptmill_relay.auth import Access
from promptmill_relay.door import Door
from promptmill_relay.meters import stream_rows
from promptmill_relay.problem import Receive, Scope, Send, respond, send_problem
from promptmill_relay.server import Service
from promptmill_relay.stream import StreamEndpoint, stream_job


class RelayApp:
    """``GET /v1/jobs/{id}/stream``, ``/healthz`` (alive, touches nothing), ``/readyz`` (Redis answers)."""

    def __init__(self, streams: StreamEndpoint, store: Store) -> None:
        self._streams = streams
        self._store = store

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        if stream_job(path) is not None:
            await self._streams(scope, receive, send)
        elif path not in {"/healthz", "/readyz"}:
            await send_problem(send, NotFound(f"there is nothing at {path[:200]}"))
        elif scope["method"] not in {"GET", "HEAD"}:
            error = BadRequest(f"{path} is read with GET")
            await send_problem(send, error, status=405, headers=[(b"allow", b"GET, HEAD")])
        elif path == "/healthz":
            await _json(send, 200, b'{"status":"ok"}')
        else:
            await self._ready(send)

    async def _ready(self, send: Send) -> None:
        try:
            await self._store.check_answers()
        except StoreUnavailable as err:
            await send_problem(send, err)
        else:
            await _json(send, 200, b'{"status":"ready"}')


async def _json(send: Send, status: int, body: bytes) -> None:
    await respond(send, status, [(b"content-type", b"application/json"), (b"cache-control", b"no-store")], body)


@asynccontextmanager
async def open_relay(settings: Settings) -> AsyncGenerator[Service]:
    """The relay with its connections, which are closed at the end.

    Raises
    ------
    ConfigError
        A configured key cannot be read.
    StoreUnavailable
        Redis cannot be reached, refuses us, or is too old.
    """
    store = await Store.connect(settings.store_url)
    follow_store(store)
    try:
        hub = Hub(store, keepalive_s=settings.keepalive_s)
        access = Access.of(settings, store)
        streams = StreamEndpoint(settings, hub, access)
        await hub.start()
        try:
            app = Door(RelayApp(streams, store), settings, is_open=access.is_open)
            rows = partial(stream_rows, streams, hub)
            async with announced(store, "relay", settings.heartbeat_s, streams.facts):
                yield Service(app, streams, max_connections=settings.max_connections, rows=rows)
        finally:
            await hub.aclose()
    finally:
        await store.aclose()
