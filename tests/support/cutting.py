"""A TCP proxy that a test can cut, stall or make lossy: the network between one process and a server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Literal
from urllib.parse import urlsplit

Mode = Literal["open", "stalled", "cut", "deaf"]


class CuttingProxy:
    """Passes bytes on to ``127.0.0.1:port``, until it is told otherwise. Runs in the test's event loop.

    ``open`` passes everything on; ``stalled`` keeps connections and passes nothing (what came meanwhile follows once it
    is open again); ``cut`` resets connections and every new one; ``deaf`` passes requests on and drops the replies.
    """

    def __init__(self, port: int, path: str = "/0") -> None:
        self._target = port
        self._path = path
        self._server: asyncio.Server | None = None
        self._mode: Mode = "open"
        self._open = asyncio.Event()
        self._open.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._passing: set[asyncio.Task[None]] = set()
        self.port = 0
        self.dropped_bytes = 0
        """Of replies that nobody got."""

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}{self._path}"

    @property
    def connections(self) -> int:
        """How many pass through it now."""
        return len(self._writers) // 2

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accepted, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def aclose(self) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        for task in list(self._passing):
            task.cancel()
        await asyncio.gather(*self._passing, return_exceptions=True)

    def mend(self) -> None:
        """Let everything pass from now on."""
        self._mode = "open"
        self._open.set()

    def stall(self) -> None:
        """As where packets vanish: nobody is told anything."""
        self._mode = "stalled"
        self._open.clear()

    def cut(self) -> None:
        """Reset every connection, and refuse those to come."""
        self._mode = "cut"
        self._open.set()
        self.reset()

    def deafen(self) -> None:
        """Let requests arrive, and none of their replies."""
        self._mode = "deaf"
        self._open.set()

    def reset(self) -> None:
        """Break every connection of now."""
        for writer in list(self._writers):
            writer.transport.abort()

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A task of ours: of its own asyncio complains when they are cancelled.
        task = asyncio.create_task(self._connect(reader, writer))
        self._passing.add(task)
        task.add_done_callback(self._passing.discard)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with suppress(OSError):
                await self._open.wait()
                if self._mode == "cut":
                    writer.transport.abort()
                    return
                back_reader, back_writer = await asyncio.open_connection("127.0.0.1", self._target)
                self._writers |= {writer, back_writer}
                try:
                    async with asyncio.TaskGroup() as both:
                        both.create_task(self._pass(reader, back_writer, writer, replies=False))
                        both.create_task(self._pass(back_reader, writer, back_writer, replies=True))
                finally:
                    self._writers -= {writer, back_writer}
                    back_writer.transport.abort()
        finally:
            writer.transport.abort()

    async def _pass(
        self, source: asyncio.StreamReader, to: asyncio.StreamWriter, other: asyncio.StreamWriter, *, replies: bool
    ) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                await self._open.wait()
                if replies and self._mode == "deaf":
                    self.dropped_bytes += len(data)
                    continue
                to.write(data)
                await to.drain()
        # The end of one direction ends both: Redis's clients never half-close.
        to.transport.abort()
        other.transport.abort()


@asynccontextmanager
async def cutting_proxy(url: str) -> AsyncGenerator[CuttingProxy]:
    """A proxy in front of the server of a ``redis://`` address on this machine; it ends with the block."""
    where = urlsplit(url)
    assert where.port is not None
    proxy = CuttingProxy(where.port, where.path)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.aclose()
