"""The gateway: the producer over HTTP, the relay's streams, and the watch over jobs whose worker died."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI

from promptmill.client import AsyncProducer
from promptmill.enqueue import Enqueuer
from promptmill.metrics import follow_store, watcher_rows
from promptmill.servers import announced
from promptmill.settings import Settings
from promptmill.store import Store
from promptmill.watch import Watcher
from promptmill_gateway.disconnect import Disconnects
from promptmill_gateway.failures import add_failures
from promptmill_gateway.fleet import watching_fleet
from promptmill_gateway.meters import Measured
from promptmill_gateway.openapi import describe
from promptmill_gateway.routes import HealthRoutes, JobRoutes
from promptmill_gateway.usage_routes import UsageRoutes
from promptmill_relay.auth import Access
from promptmill_relay.door import Door
from promptmill_relay.meters import stream_rows
from promptmill_relay.problem import ASGIApp, Receive, Scope, Send
from promptmill_relay.server import Service
from promptmill_relay.stream import StreamEndpoint, stream_job


class GatewayApp:
    """Streams go straight to the relay's endpoint: FastAPI's layers would cost something for every token."""

    def __init__(self, api: ASGIApp, streams: StreamEndpoint) -> None:
        self._api = Measured(api)
        self._streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and stream_job(scope["path"]) is not None:
            await self._streams(scope, receive, send)
        else:
            await self._api(scope, receive, send)


def build_gateway(settings: Settings, producer: AsyncProducer, access: Access, streams: StreamEndpoint) -> ASGIApp:
    """The ASGI application; it opens and closes nothing."""
    api = FastAPI(
        title="promptmill",
        version=version("promptmill"),
        description="Submit completion jobs, follow them token by token, and stop them.",
        # The pages that show the document load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    JobRoutes(settings, producer, access).add_to(api.router)
    UsageRoutes(producer, access).add_to(api.router)
    HealthRoutes(producer).add_to(api.router)
    add_failures(api)
    api.openapi = lambda: describe(api)
    return Door(GatewayApp(api, streams), settings, is_open=access.is_open)


@asynccontextmanager
async def open_gateway(settings: Settings) -> AsyncGenerator[Service]:
    """The gateway with its connections and its watcher, which end with the block.

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
        access = Access.of(settings, store)
        async with AsyncProducer(settings, store=store) as producer:
            hub = await producer.hub()
            await hub.start()
            async with (
                _enqueuer(settings) as enqueuer,
                _watching(store, settings, enqueuer) as (watcher, watching),
                _minding(store, settings) as (disconnects, minder),
                watching_fleet(store, settings, enqueuer) as (fleet, looking),
            ):
                streams = StreamEndpoint(settings, hub, access, disconnects.left)
                app = build_gateway(settings, producer, access, streams)
                async with announced(store, "gateway", settings.heartbeat_s, streams.facts):
                    yield Service(
                        app,
                        streams,
                        (watching, minder, *looking),
                        settings.max_connections,
                        lambda: (*stream_rows(streams, hub), *watcher_rows(watcher), *fleet.rows()),
                    )
    finally:
        await store.aclose()


@asynccontextmanager
async def _enqueuer(settings: Settings) -> AsyncGenerator[Enqueuer]:
    enqueuer = Enqueuer(settings.queue_url)
    try:
        yield enqueuer
    finally:
        await enqueuer.aclose()


@asynccontextmanager
async def _watching(
    store: Store, settings: Settings, enqueuer: Enqueuer
) -> AsyncGenerator[tuple[Watcher, asyncio.Task[None]]]:
    """The watcher at work. Where it ends by itself, something is broken, and the server stops for it."""
    watcher = Watcher(store, settings, enqueuer)
    watching = asyncio.create_task(watcher.run(), name="watcher")
    try:
        yield watcher, watching
    finally:
        watching.cancel()
        # Waits without raising: what made it fail is raised by who serves.
        await asyncio.wait([watching])


@asynccontextmanager
async def _minding(store: Store, settings: Settings) -> AsyncGenerator[tuple[Disconnects, asyncio.Task[None]]]:
    """Who cancels the jobs whose readers left, at work."""
    disconnects = Disconnects(store, settings)
    minder = asyncio.create_task(disconnects.run(), name="disconnects")
    try:
        yield disconnects, minder
    finally:
        minder.cancel()
        await asyncio.wait([minder])
        await disconnects.aclose()
