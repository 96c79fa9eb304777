"""One pub/sub connection and the channels that are followed on it.

redis-py's own pub/sub object reconnects in silence and what was published meanwhile is gone. Here the connection is
ours: when it breaks, every channel is subscribed again and, once acknowledged, every reader reads its log again.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Any, Final, cast

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

from promptmill.reading.channel import Channel
from promptmill.store.connection import reason
from promptmill.store.link import Link

logger = logging.getLogger(__name__)

_PING_EVERY_S: Final = 10.0
_SILENCE_MAX_S: Final = 25.0
_BACKOFF_MAX_S: Final = 2.0
_ASK_AGAIN_S: Final = 0.1


class Subscriber:
    """Follows channels of one server, or of one shard (``refused`` is given): then with SSUBSCRIBE.

    ``redis`` is whom to connect to. ``empty`` is told of a channel that nobody follows any more, once it is off.
    ``refused`` hears why the node does not take a subscription; ``connected``, that there is a new
    connection; ``lost``, that it broke or was not made.
    """

    def __init__(
        self,
        redis: Any,
        empty: Callable[[Channel], None],
        *,
        refused: Callable[[ResponseError], None] | None = None,
        connected: Callable[[], None],
        lost: Callable[[], None] = lambda: None,
    ) -> None:
        self.channels: dict[bytes, Channel] = {}
        self.link: Link | None = None
        self.heard_at = 0.0
        self._redis = redis
        self._empty = empty
        self._refused = refused
        self._connected = connected
        self._lost = lost
        prefix = b"s" if refused is not None else b""
        self._told = (prefix + b"message", prefix + b"subscribe", prefix + b"unsubscribe")
        self._subscribe, self._unsubscribe = self._told[1].upper(), self._told[2].upper()
        self._pinged_at = 0.0
        self._asking: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to connect."""
        self._task = asyncio.create_task(self._run(), name="subscriber")

    def cancel(self) -> None:
        """Close the connection soon; wait for the end with :meth:`ended`."""
        if self._asking is not None:
            self._asking.cancel()
        if self._task is not None:
            self._task.cancel()

    async def ended(self) -> None:
        """Return once the connection is closed, after :meth:`cancel`."""
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    # -- channels -----------------------------------------------------------------------------------------------

    def add(self, channel: Channel) -> None:
        """Follow a channel."""
        self.channels[channel.name] = channel
        self._send(self._subscribe, channel.name)

    def drop(self, channel: Channel) -> None:
        """Follow it no more."""
        if self.channels.get(channel.name) is channel:
            del self.channels[channel.name]
            self._send(self._unsubscribe, channel.name)

    def _send(self, *command: bytes) -> None:
        # Without a link nothing is lost: the next one subscribes to everything.
        if self.link is not None:
            self.link.send([command])

    # -- the connection -----------------------------------------------------------------------------------------

    async def _run(self) -> None:
        backoff = 0.05
        while True:
            try:
                link = await Link.connect(self._redis, self._received)
            except (RedisError, OSError) as err:
                logger.warning("pub/sub connection not made: %s", reason(err))
                self._lost()
                await asyncio.sleep(backoff * random.uniform(0.5, 1.5))  # noqa: S311 - spreads reconnects, no secret
                backoff = min(backoff * 2, _BACKOFF_MAX_S)
                continue
            backoff = 0.05
            try:
                self._resubscribe(link)
                logger.warning("pub/sub connection lost: %s", await link.lost)
            finally:
                self.link = None
                for channel in self.channels.values():
                    channel.acked.clear()
                await link.aclose()
            self._lost()

    def _resubscribe(self, link: Link) -> None:
        self.heard_at = asyncio.get_running_loop().time()
        self.link = link
        self._connected()
        for channel in [c for c in self.channels.values() if not c.readers]:
            del self.channels[channel.name]
            self._empty(channel)
        names = list(self.channels)
        # A shard takes several channels in one command only where they are of one slot.
        at_once = 1000 if self._refused is None else 1
        link.send([(self._subscribe, *names[i : i + at_once]) for i in range(0, len(names), at_once)])

    def _received(self, message: Any) -> None:
        self.heard_at = asyncio.get_running_loop().time()
        if not isinstance(message, list):
            if self._refused is not None and isinstance(message, ResponseError):
                self._refused(message)
                self._ask_again(_ASK_AGAIN_S)
            # Without any subscription PING is answered as on any connection.
            elif message != b"PONG" and self.link is not None:
                self.link.fail(RedisConnectionError(f"unexpected on the pub/sub connection: {message}"))
            return
        parts = cast("list[bytes]", message)
        if parts[0] == self._told[0]:
            channel = self.channels.get(parts[1])
            if channel is not None:
                for reader in channel.readers:
                    reader.offer(parts[2])
        elif parts[0] == self._told[1]:
            self._acknowledged(parts[1])
        elif parts[0] == self._told[2] and self._refused is not None:
            self._taken_off(parts[1])

    def _acknowledged(self, name: bytes) -> None:
        channel = self.channels.get(name)
        if channel is None:
            return
        channel.acked.set()
        for reader in channel.readers:
            # What was published before this moment is in the log; what comes after arrives here.
            reader.reread()
        if not channel.readers:
            self.drop(channel)
            self._empty(channel)

    def _taken_off(self, name: bytes) -> None:
        """The slot went to another node. Asked again, this one says to which."""
        channel = self.channels.get(name)
        if channel is not None and channel.acked.is_set():
            channel.acked.clear()
            self._ask_again(0)

    def _ask_again(self, delay_s: float) -> None:
        if self._asking is None:
            self._asking = asyncio.get_running_loop().call_later(delay_s, self._ask)

    def _ask(self) -> None:
        self._asking = None
        for channel in self.channels.values():
            if not channel.acked.is_set():
                self._send(self._subscribe, channel.name)

    def look(self, now: float) -> None:
        """Called now and then: a connection that is silent although it was asked is given up."""
        if self.link is not None:
            if now - self.heard_at > _SILENCE_MAX_S:
                self.link.fail(RedisConnectionError(f"silent for {_SILENCE_MAX_S:g} s"))
            elif now - max(self.heard_at, self._pinged_at) > _PING_EVERY_S:
                self._pinged_at = now
                self._send(b"PING")
