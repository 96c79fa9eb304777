"""One connection to Redis whose replies are handled where they arrive, without a task and without a queue.

redis-py opens it (address forms, TLS, credentials, database) and then gives it up: from there on its transport is ours.
Its own reading and writing costs several times what the commands of the token path cost, and adds turns of the event
loop to each; under load those are the latency.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final

import hiredis
from redis.asyncio.connection import DefaultParser
from redis.exceptions import ConnectionError as RedisConnectionError

CONNECT_TIMEOUT_S: Final = 5.0

Command = tuple[bytes | str | int | float, ...]

_error_of: Any = getattr(DefaultParser, "parse_error")  # noqa: B009 - untyped there
_pack: Any = getattr(hiredis, "pack_command")  # noqa: B009 - its stub names a tuple of one
_NOTHING: Final = object()
_PATIENCE_S: Final = 0.005


class Link(asyncio.Protocol):
    """``on_reply`` gets every reply, an error reply as an exception instance; it is called from the event loop and must
    not block. ``lost`` is done, with the reason, once the link is of no more use. Made by :meth:`connect`.
    """

    def __init__(self, connection: Any, on_reply: Callable[[Any], None]) -> None:
        self.open = True
        self.lost: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        self._connection = connection
        self._on_reply = on_reply
        self._loop = asyncio.get_running_loop()
        self._out: list[bytes] = []
        self._urgent = False
        self._flushing: asyncio.Handle | None = None
        self._reader: Any = hiredis.Reader(
            replyError=_error_of,  # redis-py's own classes: NoScriptError, OutOfMemoryError …
            notEnoughData=_NOTHING,
        )
        # redis-py has no public way to hand a connection over; a test fails where these names change.
        self._transport: asyncio.Transport = connection._writer.transport
        self._transport.set_protocol(self)

    @classmethod
    async def connect(cls, redis: Any, on_reply: Callable[[Any], None]) -> Link:
        """Open one. Raises what redis-py raises, or ``TimeoutError`` after 5 s."""
        connection = redis.connection_pool.make_connection()
        connection.socket_timeout = None
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await connection.connect()
        except RuntimeError as err:
            await connection.disconnect(nowait=True)
            # uvloop's word for a connection that broke while it was made.
            raise RedisConnectionError(str(err)) from err
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return cls(connection, on_reply)

    def send(self, commands: Sequence[Command], *, urgent: bool = True) -> None:
        """Write commands, with all others of this turn of the event loop in one system call.

        What is not urgent waits a few milliseconds for others to travel with. Nothing happens on a lost link.
        """
        if not self.open:
            return
        self._out += [_pack(c) for c in commands]
        if urgent and not self._urgent:
            self._urgent = True
            if self._flushing is not None:
                self._flushing.cancel()
            self._flushing = self._loop.call_soon(self._flush)
        elif self._flushing is None:
            self._flushing = self._loop.call_later(_PATIENCE_S, self._flush)

    def _flush(self) -> None:
        self._flushing, self._urgent = None, False
        out, self._out = self._out, []
        if self.open and out:
            self._transport.write(b"".join(out))

    def data_received(self, data: bytes) -> None:
        reader = self._reader
        reader.feed(data)
        try:
            while self.open and (reply := reader.gets()) is not _NOTHING:
                self._on_reply(reply)
        except hiredis.ProtocolError as err:
            self.fail(RedisConnectionError(f"not the Redis protocol: {err}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.fail(RedisConnectionError(str(exc) if exc else "the server closed the connection"))

    def fail(self, err: Exception) -> None:
        """Give the link up. Safe to repeat; the first reason counts."""
        if self.open:
            self.open = False
            if self._flushing is not None:
                self._flushing.cancel()
            self._transport.abort()
            if not self.lost.done():
                self.lost.set_result(err)

    async def aclose(self) -> None:
        """Close it. Safe to repeat."""
        self.fail(RedisConnectionError("the connection was closed"))
        # Not waiting: redis-py would wait for a protocol that it no longer has.
        await self._connection.disconnect(nowait=True)
