"""One pub/sub connection for all readers of a process.

redis-py's own pub/sub object reconnects in silence and what was published meanwhile is gone. Here the connection is
ours: when it breaks, every channel is subscribed again and, once acknowledged, every reader reads its log again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import Counter
from typing import Any, Final, cast

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from promptmill import keys
from promptmill.errors import NotFound, StoreUnavailable
from promptmill.reading.channel import Channel, Listener
from promptmill.reading.reader import Reader
from promptmill.store import EventId, Store
from promptmill.store.connection import reason
from promptmill.store.link import Link

logger = logging.getLogger(__name__)

_PING_EVERY_S: Final = 10.0
_SILENCE_MAX_S: Final = 25.0
_BACKOFF_MAX_S: Final = 2.0


class Hub:
    """Subscriptions and readers of one process. Use from one event loop.

    ``keepalive_s`` is how long a reader may stay silent before it is woken to say so and to look at its log: a lost
    last message has no successor that would show the gap.
    """

    def __init__(self, store: Store, *, keepalive_s: float = 20.0) -> None:
        self.store = store
        self.keepalive_s = keepalive_s
        self.counted: Counter[str] = Counter()
        """Since the start: ``replays``, ``gaps`` and ``overflows`` of readers, ``connections`` of ours."""
        self._channels: dict[bytes, Channel] = {}
        self._link: Link | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._heard_at = 0.0
        self._closed = False

    async def start(self) -> None:
        """Begin to connect; does not wait for Redis. Does nothing once closed."""
        if not self._tasks and not self._closed:
            self._tasks = [asyncio.create_task(self._run()), asyncio.create_task(self._tick())]

    async def aclose(self) -> None:
        """Wake every reader for its end, then close the connection."""
        self._closed = True
        for channel in list(self._channels.values()):
            for reader in list(channel.readers):
                reader.stop()
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._tasks = []

    @property
    def channels(self) -> int:
        """How many jobs are followed."""
        return len(self._channels)

    @property
    def readers(self) -> int:
        """How many readers are open."""
        return sum(len(c.readers) for c in tuple(self._channels.values()))

    async def open(self, job_id: str, after: str | None = None) -> Reader:
        """A reader of a job's events behind ``after`` (``<epoch>-<n>``; None is the beginning).

        Raises
        ------
        NotFound
            There is no such job.
        BadRequest
            ``job_id`` or ``after`` is malformed.

        If Redis is away nothing is raised: the reader waits for it, silent but for keepalives, because
        ``EventSource`` gives up for good on an error status.
        """
        keys.check_job_id(job_id)
        last = EventId.parse(after) if after else None
        try:
            record = await self.store.find(job_id)
            if record is None:
                raise NotFound(f"there is no job {job_id}", field="id")
        except StoreUnavailable as err:
            logger.warning("reader of %s waits: %s", job_id, err, extra={"job_id": job_id})
            record = None
        await self.start()
        return Reader(self, job_id, last, record)

    # -- subscriptions ------------------------------------------------------------------------------------------

    def attach(self, reader: Listener) -> Channel:
        """Add a reader to its job's channel and subscribe where it is the first. ``acked`` says when it counts."""
        name = keys.channel(reader.job_id).encode()
        channel = self._channels.get(name)
        if channel is None:
            channel = self._channels[name] = Channel(name)
            self._send(b"SUBSCRIBE", name)
        channel.readers.add(reader)
        if self._closed:
            # Opened before the hub closed, read only now: nobody else would end it.
            reader.stop()
        return channel

    def detach(self, reader: Listener, channel: Channel) -> None:
        """Take a reader off its channel; the last one unsubscribes it, once the subscription was acknowledged."""
        channel.readers.discard(reader)
        # Before its acknowledgement a channel is kept: the acknowledgement could be taken for a later subscription's.
        if not channel.readers and channel.acked.is_set():
            self._drop(channel)

    def _drop(self, channel: Channel) -> None:
        if self._channels.get(channel.name) is channel:
            del self._channels[channel.name]
            self._send(b"UNSUBSCRIBE", channel.name)

    def _send(self, *command: bytes) -> None:
        # Without a link nothing is lost: the next one subscribes to everything.
        if self._link is not None:
            self._link.send([command])

    # -- the connection -----------------------------------------------------------------------------------------

    async def _run(self) -> None:
        backoff = 0.05
        while not self._closed:
            try:
                link = await Link.connect(self.store.redis, self._received)
            except (RedisError, OSError) as err:
                logger.warning("pub/sub connection not made: %s", reason(err))
                await asyncio.sleep(backoff * random.uniform(0.5, 1.5))  # noqa: S311 - spreads reconnects, no secret
                backoff = min(backoff * 2, _BACKOFF_MAX_S)
                continue
            backoff = 0.05
            try:
                self._resubscribe(link)
                logger.warning("pub/sub connection lost: %s", await link.lost)
            finally:
                self._link = None
                for channel in self._channels.values():
                    channel.acked.clear()
                await link.aclose()

    def _resubscribe(self, link: Link) -> None:
        self._heard_at = asyncio.get_running_loop().time()
        self._link = link
        self.counted["connections"] += 1
        for name in [n for n, c in self._channels.items() if not c.readers]:
            del self._channels[name]
        names = list(self._channels)
        link.send([(b"SUBSCRIBE", *names[i : i + 1000]) for i in range(0, len(names), 1000)])

    def _received(self, message: Any) -> None:
        self._heard_at = asyncio.get_running_loop().time()
        if not isinstance(message, list):
            # Without any subscription PING is answered as on any connection.
            if message != b"PONG" and self._link is not None:
                self._link.fail(RedisConnectionError(f"unexpected on the pub/sub connection: {message}"))
            return
        parts = cast("list[bytes]", message)
        if parts[0] == b"message":
            channel = self._channels.get(parts[1])
            if channel is not None:
                for reader in channel.readers:
                    reader.offer(parts[2])
        elif parts[0] == b"subscribe":
            self._acknowledged(parts[1])

    def _acknowledged(self, name: bytes) -> None:
        channel = self._channels.get(name)
        if channel is None:
            return
        channel.acked.set()
        for reader in channel.readers:
            # What was published before this moment is in the log; what comes after arrives here.
            reader.reread()
        if not channel.readers:
            self._drop(channel)

    async def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        period = min(1.0, self.keepalive_s / 4)
        pinged_at = 0.0
        while True:
            await asyncio.sleep(period)
            now = loop.time()
            due = now - self.keepalive_s
            for channel in list(self._channels.values()):
                for reader in channel.readers:
                    if reader.spoke_at <= due:
                        reader.keepalive()
            if self._link is not None:
                if now - self._heard_at > _SILENCE_MAX_S:
                    self._link.fail(RedisConnectionError(f"silent for {_SILENCE_MAX_S:g} s"))
                elif now - max(self._heard_at, pinged_at) > _PING_EVERY_S:
                    pinged_at = now
                    self._send(b"PING")
