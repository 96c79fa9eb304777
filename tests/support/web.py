"""A server of ours in the test's own event loop, a hub without Redis, and a client that shows every byte."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from promptmill.errors import NotFound, StoreUnavailable
from promptmill.reading import Frame
from promptmill_relay.problem import ASGIApp
from promptmill_relay.server import Service, StreamServer
from promptmill_relay.stream import StreamEndpoint
from tests.support.event_source import EventSourceParser, Message
from tests.support.processes import PATIENCE_S, wait_until


@dataclass
class FakeJob:
    """A job whose events the test puts into ``events``; None ends it."""

    user: str = "default"
    finished_after: str | None = None
    events: asyncio.Queue[list[Frame] | Exception | None] = field(default_factory=asyncio.Queue)
    opened_after: list[str | None] = field(default_factory=list)


class FakeReader:
    def __init__(self, hub: FakeHub, job: FakeJob, after: str | None) -> None:
        self.user: str | None = None if hub.away else job.user
        self.trace: str | None = None
        self.finished = after is not None and after == job.finished_after
        self._hub = hub
        self._job = job
        hub.open_readers.add(self)

    def __aiter__(self) -> FakeReader:
        return self

    async def __anext__(self) -> list[Frame]:
        batch = await self._job.events.get()
        if batch is None:
            raise StopAsyncIteration
        if isinstance(batch, Exception):
            raise batch
        return batch

    async def aclose(self) -> None:
        self._hub.open_readers.discard(self)


class FakeHub:
    """Opens readers of the jobs that the test made. ``away``: as if Redis were away, nobody's owner is known."""

    def __init__(self) -> None:
        self.jobs: dict[str, FakeJob] = {}
        self.open_readers: set[FakeReader] = set()
        self.away = False

    async def open(self, job_id: str, after: str | None) -> FakeReader:
        job = self.jobs.get(job_id)
        if job is None:
            raise NotFound(f"there is no job {job_id}", field="id")
        job.opened_after.append(after)
        return FakeReader(self, job, after)


class MissingSecret:
    """A signing key that cannot be looked up, because Redis is away."""

    async def current(self) -> bytes:
        raise StoreUnavailable("Redis at nowhere cannot be reached")

    async def refreshed(self) -> bytes:
        raise StoreUnavailable("Redis at nowhere cannot be reached")


@dataclass
class Server:
    port: int
    server: StreamServer
    task: asyncio.Task[None]

    async def stop(self) -> None:
        """Stop as the first signal does, and wait for the end."""
        self.server.stop()
        await self.task


@asynccontextmanager
async def serving(app: ASGIApp, streams: StreamEndpoint) -> AsyncGenerator[Server]:
    """``app`` on a free port of 127.0.0.1, over real HTTP."""
    sock = socket.create_server(("127.0.0.1", 0))
    sock.setblocking(False)
    server = StreamServer(Service(app, streams))
    task = asyncio.create_task(server.serve(sockets=[sock]))
    running = Server(sock.getsockname()[1], server, task)
    try:
        await wait_until(lambda: server.started, "the server has started")
        yield running
    finally:
        await running.stop()


class Exchange:
    """One request and its answer, read as it comes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.status = 0
        self.headers: dict[str, str] = {}
        self.events = EventSourceParser()
        self.ended = False
        """The body ended properly, with its last chunk."""

    async def read_head(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            head = await self.reader.readuntil(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        self.status = int(lines[0].split(" ")[1])
        self.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:] if line)}

    async def read_chunk(self) -> bytes:
        """The next piece of a chunked body; empty at its proper end."""
        async with asyncio.timeout(PATIENCE_S):
            size = int(await self.reader.readuntil(b"\r\n"), 16)
            data = await self.reader.readexactly(size + 2)
        self.ended = size == 0
        return data[:-2]

    async def body(self) -> bytes:
        """The rest of the body, whichever way it is framed."""
        if "content-length" in self.headers:
            async with asyncio.timeout(PATIENCE_S):
                return await self.reader.readexactly(int(self.headers["content-length"]))
        pieces: list[bytes] = []
        while self.headers.get("transfer-encoding") == "chunked" and not self.ended:
            pieces.append(await self.read_chunk())
        return b"".join(pieces)

    async def read_events(self, count: int | None = None) -> list[Message]:
        """``count`` events, or all of them up to the end of the body."""
        found: list[Message] = []
        while not self.ended and (count is None or len(found) < count):
            found += self.events.feed(await self.read_chunk())
        return found


@asynccontextmanager
async def raw(port: int) -> AsyncGenerator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A bare connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):  # the server may have been first, and not politely
            await writer.wait_closed()


@asynccontextmanager
async def request(
    port: int, path: str, *, method: str = "GET", body: bytes = b"", headers: dict[str, str] | None = None
) -> AsyncGenerator[Exchange]:
    """Send a request and read the answer's head."""
    fields = {"Host": f"127.0.0.1:{port}", **({"Content-Length": str(len(body))} if body else {}), **(headers or {})}
    head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    async with raw(port) as (reader, writer):
        writer.write(head.encode() + b"\r\n" + body)
        exchange = Exchange(reader, writer)
        await exchange.read_head()
        yield exchange


async def call_asgi(
    app: Callable[..., Awaitable[None]], method: str, path: str, headers: dict[str, str]
) -> tuple[int, dict[str, str], bytes]:
    """One request straight into an ASGI application."""
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await app({"type": "http", "method": method, "path": path, "query_string": b"", "headers": raw}, receive, send)
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], found, b"".join(message.get("body", b"") for message in sent[1:])
