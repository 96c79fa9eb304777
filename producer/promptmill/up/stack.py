"""Everything that ``promptmill up`` runs, as one thing that becomes ready, keeps itself alive and ends."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import urlsplit

from promptmill.errors import PromptmillError, StoreUnavailable
from promptmill.extras import require_extras
from promptmill.queues import API_FAMILY
from promptmill.settings import Settings, addresses_to_hand_on, child_environment, default_data_dir
from promptmill.store import Store
from promptmill.store.connection import open_redis, store_errors, where
from promptmill.up.datadir import DataDir, RunningUp
from promptmill.up.embedded import EmbeddedStore
from promptmill.up.listen import bind, check_exposure, url_of
from promptmill.up.part import PartDied, PartSpec
from promptmill.up.supervisor import Supervisor

READY_LIMIT_S: Final = 60.0
STORE_NAME: Final = "redis"
_READY_POLL_S: Final = 0.05
_ANSWER_S: Final = 5.0
_STORE_LOOK_S: Final = 5.0
_HAND_BACK_S: Final = 22.0
_GATEWAY_STOP_S: Final = 13.0
"""The gateway ends its streams and leaves within 12 s of a TERM; see promptmill_relay.server."""


class Stack:
    """Store, workers, gateway, and what else is given as ``extra``. An async context manager; leaving it ends all.

    ``extra`` are functions from the lifeline's descriptor to a part; these are started first. ``hurry`` set: whatever
    is waited for at the end is killed instead. ``tell`` must not block.

    Entering raises, with nothing left behind:

    - ConfigError: the configuration cannot work, or the gateway would be open to other machines without a key
    - MissingExtra: a part is not installed
    - PromptmillError ``data_dir_in_use``, ``port_in_use``, ``not_ready`` (60 s were not enough)
    - StoreUnavailable: the store cannot be reached or started, refuses us, is too old, or its disk is full
    - PartDied: a part ended before everything was ready
    """

    def __init__(
        self,
        settings: Settings,
        tell: Callable[[str], None],
        *,
        hurry: asyncio.Event | None = None,
        extra: Sequence[Callable[[int], PartSpec]] = (),
    ) -> None:
        self.settings = settings
        self.url = ""
        self._tell = tell
        self._hurry = hurry
        self._extra = extra
        self._exits = AsyncExitStack()
        self._store: EmbeddedStore | None = None
        self._redis_url = settings.store_url
        self._data_dir: DataDir | None = None
        self._supervisor: Supervisor | None = None
        self._ready = False

    @property
    def supervisor(self) -> Supervisor:
        """Its parts; only once entered."""
        if self._supervisor is None:
            raise RuntimeError("the stack was not entered")
        return self._supervisor

    def about(self) -> RunningUp:
        """Its addresses and pids as they are now. Those of store and broker hold their passwords."""
        broker_url = self.settings.broker_url or self._redis_url
        return RunningUp(os.getpid(), self.url, self._redis_url, broker_url, self.supervisor.pids())

    async def __aenter__(self) -> Self:
        require_extras("workers", "gateway")
        check_exposure(self.settings)
        self._data_dir = await asyncio.to_thread(DataDir.take, data_dir_of(self.settings))
        self._exits.callback(self._data_dir.close)
        try:
            await self._start(self._data_dir)
        except BaseException:
            await self._exits.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._exits.aclose()

    async def _start(self, data_dir: DataDir) -> None:
        listener = self._exits.enter_context(bind(self.settings.host, self.settings.port))
        self.url = url_of(listener)
        supervisor = Supervisor(self._tell, self._changed, self._hurry)
        self._supervisor = await self._exits.enter_async_context(supervisor)
        # Left first: once the gateway has closed its own copy, who connects is refused and not kept waiting.
        self._exits.callback(listener.close)
        died = asyncio.create_task(supervisor.first_death())
        starting = asyncio.create_task(self._start_parts(supervisor, data_dir, listener))
        try:
            await asyncio.wait({died, starting}, timeout=None, return_when=asyncio.FIRST_COMPLETED)
            if died.done() and not starting.done():
                raise self._explained(died.result())
            await starting
        finally:
            for task in (died, starting):
                task.cancel()
            await asyncio.gather(died, starting, return_exceptions=True)
        supervisor.settled()
        self._ready = True
        self._changed()
        if self._store is not None:
            watching = asyncio.create_task(self._watch_store(self._store))
            self._exits.push_async_callback(_cancel, watching)

    async def _start_parts(self, supervisor: Supervisor, data_dir: DataDir, listener: socket.socket) -> None:
        for make in self._extra:
            await supervisor.start(make(supervisor.lifeline))
        if self.settings.redis_url is None:
            await self._start_store(supervisor, data_dir)
        else:
            await (await Store.connect(self._redis_url, max_connections=1)).aclose()
        for spec in self._part_specs(supervisor, data_dir, listener):
            await supervisor.start(spec)
        await self._wait_ready()

    async def _start_store(self, supervisor: Supervisor, data_dir: DataDir) -> None:
        store = EmbeddedStore.plan(data_dir)
        self._store, self._redis_url = store, store.url
        await supervisor.start(
            PartSpec(
                name=STORE_NAME,
                command=tuple(store.command),
                stdin=store.configuration,
                lock_fd=data_dir.lock_fd,
                guarded=True,
                stop_order=3,
            )
        )
        await store.wait_ready()

    def _part_specs(self, supervisor: Supervisor, data_dir: DataDir, listener: socket.socket) -> list[PartSpec]:
        settings = self.settings
        config = ("--config", str(settings.config_file)) if settings.config_file else ()
        shared: dict[str, Any] = {
            **addresses_to_hand_on(settings.config_file, self._redis_url, settings.broker_url or self._redis_url),
            "host": settings.host,
            "port": listener.getsockname()[1],
            "concurrency": settings.concurrency,
            "data_dir": data_dir.path,
        }
        first = settings.metrics_port
        # The gateway has the port itself, the workers those behind it.
        ports = itertools.repeat(first) if not first else itertools.count(first)
        gateway_shared = shared | {"metrics_port": next(ports)}
        workers = [
            PartSpec(
                name=name,
                command=(sys.executable, "-m", "promptmill_workers", "--name", name, "--family", family, *config),
                env=child_environment(shared | {"metrics_port": next(ports)}, lifeline_fd=supervisor.lifeline),
                stop_order=1,
                # The worker hands its jobs back when drain_s is over, and is gone 20 s later, whatever does not answer.
                stop_s=settings.drain_s + _HAND_BACK_S,
            )
            for family in settings.served_families
            for name in _worker_names(family, settings.workers_of(family))
        ]
        gateway = PartSpec(
            name="gateway",
            command=(sys.executable, "-m", "promptmill_gateway", *config),
            env=child_environment(gateway_shared, lifeline_fd=supervisor.lifeline, listen_fd=listener.fileno()),
            fds=(listener.fileno(),),
            stop_order=2,
            stop_s=_GATEWAY_STOP_S,
        )
        return [*workers, gateway]

    async def _wait_ready(self) -> None:
        # Without workers of our own, others may come and go: ready is then what the gateway says of itself.
        path = "/readyz" if any(map(self.settings.workers_of, self.settings.served_families)) else "/healthz"
        deadline = time.monotonic() + READY_LIMIT_S
        status = "no answer"
        while time.monotonic() < deadline:
            status = await _http_status(self.url, path)
            if status == "200":
                return
            await asyncio.sleep(_READY_POLL_S)  # another process becomes ready: there is nothing to wait on
        raise PromptmillError(
            f"not ready after {READY_LIMIT_S:.0f} s: {self.url}{path} answers {status}; see what the parts said above",
            code="not_ready",
        )

    def _explained(self, died: PartDied) -> PromptmillError:
        if self._store is None or not str(died).startswith("redis "):
            return died
        return StoreUnavailable(
            f"the embedded store ({self._store.program.path}) did not start:\n{self._store.explain_failure()}"
        )

    def _changed(self) -> None:
        """Tell who looks for us: the file is always whole, and there only while we are ready."""
        if not self._ready or self._data_dir is None:
            return
        about = self.about()
        try:
            self._data_dir.write(
                "up.json",
                asdict(about),
            )
        except PromptmillError as err:
            # Clients can still be given the address; ending everything would be worse.
            self._tell(f"error [{err.code}]: {err}")

    async def _watch_store(self, store: EmbeddedStore) -> None:
        """Say once when the store stops taking writes because its disk is full, and when it takes them again."""
        redis = open_redis(store.url, max_connections=1)
        refuses = False
        try:
            while True:
                try:
                    with store_errors(where(store.url)):
                        info: dict[str, Any] = await redis.info("persistence")  # pyright: ignore[reportUnknownMemberType]
                except StoreUnavailable:
                    info = {}  # it is being restarted, and the supervisor says so
                failing = info.get("aof_last_write_status", "ok") != "ok"
                if failing and not refuses:
                    self._tell(
                        f"error [store_unavailable]: the embedded store cannot write to {store.directory}: the disk is "
                        "full or broken. New jobs are refused until there is room"
                    )
                elif refuses and not failing and info:
                    self._tell("the embedded store can write again")
                refuses = failing or (refuses and not info)
                await asyncio.sleep(_STORE_LOOK_S)
        finally:
            await redis.aclose()


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _http_status(url: str, path: str) -> str:
    """The status of one GET as digits, or why there is none. Small enough not to need a client."""
    parts = urlsplit(url)
    try:
        async with asyncio.timeout(_ANSWER_S):
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
            try:
                writer.write(f"GET {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n\r\n".encode())
                await writer.drain()
                status_line = await reader.readline()
            finally:
                writer.close()
    except (OSError, ValueError) as err:  # TimeoutError is an OSError
        return f"nothing ({type(err).__name__})"
    words = status_line.decode("latin-1").split()
    return words[1] if len(words) > 1 else "nothing"


def data_dir_of(settings: Settings) -> Path:
    """The data directory that ``up`` would use with these settings."""
    return (settings.data_dir or default_data_dir()).expanduser()


def _worker_names(family: str, count: int) -> list[str]:
    first = "worker" if family == API_FAMILY else family
    return [f"{first}-{n}" for n in range(1, count + 1)]
