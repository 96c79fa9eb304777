"""A TCP proxy that fails as networks do, on demand.

========  ============================================================================================================
cut       every connection ends at once
torn      the next piece of data passes in part, then its connection ends; the others end a little later
mute      what the client says arrives, what the server answers does not; then as ``cut``
stall     nothing passes for a while, then all of it
slow      each piece of data waits a little, for a while
refuse    as ``cut``, and nobody connects for a while
========  ============================================================================================================

Everything that the parts say to the store passes here, so what does not fail costs little: a call a piece.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Final, cast

_SLOW_S: Final = 0.03
_RESET: Final = struct.pack("ii", 1, 0)


class Proxy:
    """One way from one part to one server. Use it from one event loop; ``chance`` decides where data is torn."""

    def __init__(self, name: str, host: str, port: int, chance: random.Random) -> None:
        self.name = name
        self.port = 0
        self.chance = chance
        self.pairs: set[_Pair] = set()
        self.target = (host, port)
        self.state = ""
        """The way in which it fails now; empty where everything passes."""
        self.lasting: Callable[[float], Awaitable[object]] = asyncio.sleep
        """What is waited for while it fails."""
        self._server: asyncio.Server | None = None
        self._one_at_a_time = asyncio.Lock()

    @property
    def connections(self) -> int:
        """How many there are now."""
        return len(self.pairs)

    async def start(self) -> None:
        """Listen on a free port of 127.0.0.1; sets ``port``."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Pair(self).client, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def aclose(self) -> None:
        """End every connection and stop listening."""
        if self._server is not None:
            self._server.close()
        self._cut()
        await asyncio.sleep(0)

    async def disturb(self, how: str, lasts_s: float) -> int:
        """Fail in one of the ways above; returns when it is over, with the number of connections that it met."""
        async with self._one_at_a_time:
            met = self.connections
            if how in {"cut", "refuse"}:
                self._cut()
            if how != "cut":
                self.state = how
                await self.lasting(lasts_s)
                self.state = ""
            if how in {"torn", "mute"}:
                self._cut()
            for pair in list(self.pairs):
                pair.resume()
            return met

    def _cut(self) -> None:
        for pair in list(self.pairs):
            pair.reset()


class _Side(asyncio.Protocol):
    """One end of a pair of connections: what it receives goes to the other end."""

    def __init__(self, pair: _Pair) -> None:
        self.transport: asyncio.Transport | None = None
        self._pair = pair
        self._waiting: list[bytes] = []
        self._free_at = 0.0
        """When the last piece that was made to wait is passed on: none behind it may overtake it."""

    @property
    def _other(self) -> _Side:
        return self._pair.server if self is self._pair.client else self._pair.client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._pair.made(self)

    def data_received(self, data: bytes) -> None:
        proxy, loop = self._pair.proxy, asyncio.get_running_loop()
        if self._other.transport is None or proxy.state == "stall" or self._waiting:
            self._waiting.append(data)
        elif proxy.state == "slow" or loop.time() < self._free_at:
            delay_s = _SLOW_S * proxy.chance.random() if proxy.state == "slow" else 0
            self._free_at = max(self._free_at, loop.time() + delay_s)
            loop.call_at(self._free_at, self._pass, data)
        elif proxy.state == "torn":
            self._pass(data[: proxy.chance.randrange(len(data))])
            self._pair.close()
        elif proxy.state != "mute" or self is self._pair.client:
            self._pass(data)

    def _pass(self, data: bytes) -> None:
        other = self._other.transport
        if other is not None and not other.is_closing():
            other.write(data)

    def flush(self) -> None:
        """Pass on what waited."""
        waiting, self._waiting = self._waiting, []
        for data in waiting:
            self._pass(data)

    def pause_writing(self) -> None:
        if self._other.transport is not None:
            self._other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self._other.transport is not None:
            self._other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._pair.close()


class _Pair:
    """A client's connection and the one that was made to the server for it."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self.client = _Side(self)
        self.server = _Side(self)
        self._connecting: asyncio.Task[None] | None = None

    def made(self, side: _Side) -> None:
        """One of the two connections is there."""
        if side is self.server:
            if self.proxy.state != "stall":
                self.resume()
        elif self.proxy.state == "refuse":
            _reset(side.transport)
        else:
            self.proxy.pairs.add(self)
            self._connecting = asyncio.create_task(self._connect())

    async def _connect(self) -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: self.server, *self.proxy.target)
        except OSError:
            self.reset()

    def resume(self) -> None:
        """Pass on what waited for either side."""
        if self.server.transport is not None:
            self.client.flush()
            self.server.flush()

    def close(self) -> None:
        """End both connections, with what was written to them."""
        self._end()
        for side in (self.client, self.server):
            if side.transport is not None:
                side.transport.close()

    def reset(self) -> None:
        """End both connections as a broken network does: with a reset, and with nothing of what still waits."""
        self._end()
        for side in (self.client, self.server):
            _reset(side.transport)

    def _end(self) -> None:
        self.proxy.pairs.discard(self)
        if self._connecting is not None and self.server.transport is None:
            self._connecting.cancel()


def _reset(transport: asyncio.Transport | None) -> None:
    if transport is None:
        return
    sock: socket.socket | None = transport.get_extra_info("socket")
    if sock is not None and not transport.is_closing():
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    transport.abort()
