"""One connection shared by every caller of an event loop.

redis-py gives each concurrent call a connection and a write of its own. Here commands go out in the order in which they
were asked, all of one turn of the event loop together, and replies come back in the same order: no caller waits for
another's work, only for the server's.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, TypeVar

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

from promptmill.store.connection import COMMAND_TIMEOUT_S
from promptmill.store.link import Command, Link

_LOOK_S: Final = 1.0

T = TypeVar("T")


async def shared(task: asyncio.Task[T]) -> T:
    """What a task brings that several wait for: one's cancellation is not everybody's.

    Raises redis-py's ``ConnectionError`` where the task was cancelled, as those of a node that leaves its cluster are:
    its cancellation would pass for the caller's own, and end whoever should try again.
    """
    await asyncio.wait([task])
    if task.cancelled():
        raise RedisConnectionError("the connection was closed")
    return task.result()


class Wire:
    """Connects at the first call and again at the first call after a failure. Never repeats a command by itself."""

    def __init__(self, redis: Any) -> None:
        self._redis = redis
        self._queue: _Queue | None = None
        self._attempt: asyncio.Task[_Queue] | None = None
        self._connected = 0

    @property
    def serial(self) -> int:
        """The number of the connection, which rises with each new one; 0 where there is none at the moment."""
        return self._connected if self._queue is not None and self._queue.open else 0

    async def connected(self) -> int:
        """Connect where that is needed; answers the serial. Raises what :meth:`many` raises."""
        if not self.serial:
            await self._connect()
        return self.serial

    async def call(self, *command: bytes | str | int | float) -> Any:
        """One reply. Raises ``ResponseError`` for an error reply, and what :meth:`many` raises."""
        reply = (await self.many((command,)))[0]
        if isinstance(reply, ResponseError):
            raise reply
        return reply

    async def many(self, commands: Sequence[Command], *, first: int = 0) -> list[Any]:  # noqa: ARG002 - on one server
        """The replies, in order; an error reply stands in its place as a ``ResponseError``.

        The commands go out together, uninterrupted by those of others. The ``first`` so many are done before the others
        begin; on one server that is always so, and it matters on a cluster only.

        Raises redis-py's ``ConnectionError`` or an ``OSError`` for a connection that fails, that stays silent for 10 s,
        or whose server is not ready (it loads its data); whether the commands took effect is then unknown.
        """
        queue = self._queue
        if queue is None or not queue.open:
            queue = await self._connect()
        if not commands:
            return []
        return await queue.ask(commands)

    def start(self, commands: Sequence[Command]) -> asyncio.Future[list[Any]]:
        """As :meth:`many`; what is asked is on its way, in its place among the others, before this returns."""
        queue = self._queue
        if queue is None or not queue.open:
            return asyncio.ensure_future(self.many(commands))
        return queue.begin(commands)

    async def many_on(self, serial: int, commands: Sequence[Command]) -> list[Any]:
        """As :meth:`many`, on that very connection.

        Raises redis-py's ``ConnectionError`` where another one has taken its place, with nothing sent: the server may
        have lost what it had acknowledged on the old one.
        """
        queue = self._queue
        if queue is None or not serial or self.serial != serial:
            raise RedisConnectionError("the connection was lost")
        return await queue.ask(commands)

    def tell(self, commands: Sequence[Command]) -> None:
        """Send without waiting and without learning what became of it: for hints that a sweep repairs.

        Nothing is sent where there is no connection at the moment.
        """
        if commands and self._queue is not None and self._queue.open:
            self._queue.put(commands, None)

    async def _connect(self) -> _Queue:
        """One attempt at a time, whose outcome is everyone's: a server that hangs is waited for once, not in turn."""
        if self._attempt is None:
            self._attempt = asyncio.create_task(self._open())
            self._attempt.add_done_callback(self._attempted)
        return await shared(self._attempt)

    def _attempted(self, attempt: asyncio.Task[_Queue]) -> None:
        self._attempt = None
        if not attempt.cancelled():
            attempt.exception()  # told to whoever waits; nobody may be left

    async def _open(self) -> _Queue:
        old, self._queue = self._queue, None
        if old is not None:
            await old.link.aclose()
        self._queue = await _Queue.start(self._redis)
        self._connected += 1
        return self._queue

    async def aclose(self) -> None:
        """Close the connection; calls that wait fail. Safe to repeat."""
        if self._attempt is not None:
            self._attempt.cancel()
        queue, self._queue = self._queue, None
        if queue is not None:
            await queue.link.aclose()


class _Call:
    __slots__ = ("asked_at", "done", "left", "replies")

    def __init__(self, left: int, done: asyncio.Future[list[Any]] | None, asked_at: float) -> None:
        self.left = left
        self.done = done
        self.replies: list[Any] = []
        self.asked_at = asked_at


class _Queue:
    """The calls that wait for replies of one link."""

    link: Link

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[_Call] = deque()
        self._timer = self._loop.call_later(_LOOK_S, self._look)

    @classmethod
    async def start(cls, redis: Any) -> _Queue:
        queue = cls()
        try:
            queue.link = await Link.connect(redis, queue._replied)
        except BaseException:
            queue._timer.cancel()
            raise
        queue.link.lost.add_done_callback(queue._lost)
        return queue

    @property
    def open(self) -> bool:
        return self.link.open

    async def ask(self, commands: Sequence[Command]) -> list[Any]:
        return await self.begin(commands)

    def begin(self, commands: Sequence[Command]) -> asyncio.Future[list[Any]]:
        done: asyncio.Future[list[Any]] = self._loop.create_future()
        self.put(commands, done)
        return done

    def put(self, commands: Sequence[Command], done: asyncio.Future[list[Any]] | None) -> None:
        self._waiting.append(_Call(len(commands), done, self._loop.time()))
        self.link.send(commands, urgent=done is not None)

    def _replied(self, reply: Any) -> None:
        if isinstance(reply, RedisError) and not isinstance(reply, ResponseError):
            # Of the server and not of the command: it still loads its data, or wants a password. Handed on as a reply,
            # it would pass for one, and an event for written.
            self.link.fail(reply)
            return
        call = self._waiting[0]
        call.replies.append(reply)
        call.left -= 1
        if not call.left:
            self._waiting.popleft()
            if call.done is not None and not call.done.done():
                call.done.set_result(call.replies)

    def _look(self) -> None:
        """A server that is silent for too long: the age of the oldest call tells, instead of a timer for each."""
        self._timer = self._loop.call_later(_LOOK_S, self._look)
        if self._waiting and self._loop.time() - self._waiting[0].asked_at > COMMAND_TIMEOUT_S:
            self.link.fail(RedisConnectionError(f"no answer within {COMMAND_TIMEOUT_S:g} s"))

    def _lost(self, lost: asyncio.Future[Exception]) -> None:
        """Every caller learns of it; none is repeated here, for only the caller knows whether that makes sense."""
        self._timer.cancel()
        err = lost.result()
        kind = type(err) if isinstance(err, RedisConnectionError) else RedisConnectionError
        while self._waiting:
            done = self._waiting.popleft().done
            if done is not None and not done.done():
                done.set_exception(kind(str(err)))
