"""All readers of a process: one pub/sub connection, or on a cluster one to each shard."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter

from promptmill import keys
from promptmill.errors import NotFound, StoreUnavailable
from promptmill.reading.channel import Channel, Listener
from promptmill.reading.reader import Reader
from promptmill.reading.shards import One, Shards
from promptmill.store import EventId, Store

logger = logging.getLogger(__name__)


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
        self.subscribers: One | Shards = (
            One(store, self._forget, self._connected)
            if store.cluster is None
            else Shards(store.cluster, self._channels, self._forget, self._connected)
        )
        self._ticker: asyncio.Task[None] | None = None
        self._closed = False

    async def start(self) -> None:
        """Begin to connect; does not wait for Redis. Does nothing once closed."""
        if self._ticker is None and not self._closed:
            self.subscribers.start()
            self._ticker = asyncio.create_task(self._tick())

    async def aclose(self) -> None:
        """Wake every reader for its end, then close the connection."""
        self._closed = True
        for channel in list(self._channels.values()):
            for reader in list(channel.readers):
                reader.stop()
        if self._ticker is not None:
            self._ticker.cancel()
            await self.subscribers.aclose()
            with contextlib.suppress(asyncio.CancelledError):
                await self._ticker
            self._ticker = None

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
            self.subscribers.add(channel)
        channel.readers.add(reader)
        if self._closed:
            # Opened before the hub closed, read only now: nobody else would end it.
            reader.stop()
        return channel

    def detach(self, reader: Listener, channel: Channel) -> None:
        """Take a reader off its channel; the last one unsubscribes it, once the subscription was acknowledged."""
        channel.readers.discard(reader)
        # Before its acknowledgement a channel is kept: the acknowledgement could be taken for a later subscription's.
        if not channel.readers and channel.acked.is_set() and self._channels.get(channel.name) is channel:
            self._forget(channel)
            self.subscribers.drop(channel)

    def _forget(self, channel: Channel) -> None:
        if self._channels.get(channel.name) is channel:
            del self._channels[channel.name]

    def _connected(self) -> None:
        self.counted["connections"] += 1

    async def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        period = min(1.0, self.keepalive_s / 4)
        while True:
            await asyncio.sleep(period)
            now = loop.time()
            due = now - self.keepalive_s
            for channel in list(self._channels.values()):
                for reader in channel.readers:
                    if reader.spoke_at <= due:
                        reader.keepalive()
            self.subscribers.look(now)
