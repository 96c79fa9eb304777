"""One connection shared by every caller of an event loop: what is asked in the same moment travels in one write.

redis-py gives each concurrent call a connection and a write of its own; on the token path and around each job that
costs several times what the commands themselves cost. Replies come back in the order of the commands, so no caller
waits for another's work, only for the server's.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

import hiredis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

from promptmill.store.connection import COMMAND_TIMEOUT_S, CONNECT_TIMEOUT_S

_LOOK_S: Final = 1.0
_pack: Any = getattr(hiredis, "pack_command")  # noqa: B009 - its stub names a tuple of one

Command = tuple[bytes | str | int | float, ...]


class Wire:
    """Connects at the first call and again at the first call after a failure. Never repeats a command by itself."""

    def __init__(self, redis: Any) -> None:
        self._pool = redis.connection_pool
        self._link: _Link | None = None
        self._connecting: asyncio.Lock = asyncio.Lock()

    async def call(self, *command: bytes | str | int | float) -> Any:
        """One reply. Raises ``ResponseError`` for an error reply, and what :meth:`many` raises."""
        reply = (await self.many((command,)))[0]
        if isinstance(reply, ResponseError):
            raise reply
        return reply

    async def many(self, commands: Sequence[Command]) -> list[Any]:
        """The replies, in order; an error reply stands in its place as a ``ResponseError``.

        The commands go out together, uninterrupted by those of others.

        Raises redis-py's ``ConnectionError`` or an ``OSError`` for a connection that fails, or that stays silent for
        10 s; whether the commands took effect is then unknown.
        """
        link = self._link
        if link is None or link.broken:
            link = await self._connect()
        return await link.ask(commands)

    def tell(self, commands: Sequence[Command]) -> None:
        """Send without waiting and without learning what became of it: for hints that a sweep repairs.

        Nothing is sent where there is no connection at the moment.
        """
        link = self._link
        if link is not None and not link.broken:
            link.tell(commands)

    async def _connect(self) -> _Link:
        async with self._connecting:
            if self._link is None or self._link.broken:
                if self._link is not None:
                    await self._link.aclose()
                connection = self._pool.make_connection()
                # The link watches the age of the oldest unanswered command instead of bounding each read.
                connection.socket_timeout = None
                try:
                    async with asyncio.timeout(CONNECT_TIMEOUT_S):
                        await connection.connect()
                except BaseException:
                    await connection.disconnect(nowait=True)
                    raise
                self._link = _Link(connection)
            return self._link

    async def aclose(self) -> None:
        """Close the connection; calls that wait fail. Safe to repeat."""
        link, self._link = self._link, None
        if link is not None:
            await link.aclose()


class _Call:
    __slots__ = ("asked_at", "done", "left", "replies")

    def __init__(self, left: int, done: asyncio.Future[list[Any]] | None, asked_at: float) -> None:
        self.left = left
        self.done = done
        self.replies: list[Any] = []
        self.asked_at = asked_at


class _Link:
    """One connection's life: a task that writes, a task that reads, and the calls in between."""

    def __init__(self, connection: Any) -> None:
        self.broken = False
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._out: list[bytes] = []
        self._waiting: deque[_Call] = deque()
        self._wake = asyncio.Event()
        self._tasks = [asyncio.create_task(self._write()), asyncio.create_task(self._read())]
        self._timer = self._loop.call_later(_LOOK_S, self._look)

    async def ask(self, commands: Sequence[Command]) -> list[Any]:
        if not commands:
            return []
        done: asyncio.Future[list[Any]] = self._loop.create_future()
        self._put(commands, done)
        return await done

    def tell(self, commands: Sequence[Command]) -> None:
        self._put(commands, None)

    def _put(self, commands: Sequence[Command], done: asyncio.Future[list[Any]] | None) -> None:
        self._out += [_pack(c) for c in commands]
        self._waiting.append(_Call(len(commands), done, self._loop.time()))
        self._wake.set()

    async def _write(self) -> None:
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                data = b"".join(self._out)
                self._out.clear()
                await self._connection.send_packed_command(data, check_health=False)
        except (RedisError, OSError) as err:
            self._break(err)

    async def _read(self) -> None:
        receive = self._connection.read_response
        waiting = self._waiting
        try:
            while True:
                try:
                    reply = await receive(disable_decoding=True)
                except ResponseError as err:
                    reply = err
                call = waiting[0]
                call.replies.append(reply)
                call.left -= 1
                if not call.left:
                    waiting.popleft()
                    if call.done is not None and not call.done.done():
                        call.done.set_result(call.replies)
        except (RedisError, OSError, asyncio.IncompleteReadError) as err:
            self._break(err)

    def _look(self) -> None:
        self._timer = self._loop.call_later(_LOOK_S, self._look)
        if self._waiting and self._loop.time() - self._waiting[0].asked_at > COMMAND_TIMEOUT_S:
            self._break(RedisConnectionError(f"no answer within {COMMAND_TIMEOUT_S:g} s"))

    def _break(self, err: BaseException) -> None:
        """Replies of this connection can no longer be told apart: every caller learns of it, none is repeated."""
        self.broken = True
        self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        while self._waiting:
            done = self._waiting.popleft().done
            if done is not None and not done.done():
                done.set_exception(RedisConnectionError(str(err) or type(err).__name__))

    async def aclose(self) -> None:
        if not self.broken:
            self._break(RedisConnectionError("the connection was closed"))
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._connection.disconnect(nowait=True)
