"""One reader of one job.

Subscribe, wait for the acknowledgement, read the log behind the last id, then follow. Within an epoch ids are
contiguous: the very next id is taken as it comes; anything else makes the reader look at the log.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from typing import Final, Self

import orjson

from promptmill.contract import Token
from promptmill.errors import StoreUnavailable
from promptmill.reading.channel import Channel, Subscriptions
from promptmill.reading.frame import END_TYPES, Frame, frame
from promptmill.store import START, EventId, Record

logger = logging.getLogger(__name__)

_QUEUE_MAX: Final = 512
"""Events that may wait for a slow reader; past it they are dropped here and read from the log instead."""
_BACKOFF_MAX_S: Final = 2.0


class Reader:
    """An asynchronous iterator over batches (lists) of :class:`Frame`.

    An empty batch means that nothing came for ``keepalive_s``. Iteration ends after the job's end event, or when the
    hub closes. Every event behind the starting point comes exactly once and in order, however late the reader is,
    whatever happens to its connection; while Redis is away nothing comes but empty batches.
    """

    def __init__(self, hub: Subscriptions, job_id: str, after: EventId | None, record: Record | None) -> None:
        self.job_id = job_id
        self.user = record.user if record else None
        """The job's owner; None while Redis is away."""
        self.trace = record.trace if record else None
        """The trace of its submitter, where it told one."""
        end_id = record.end_id if record else None
        self.finished = bool(end_id and after and after >= end_id)
        """True where ``after`` is the end event already: there is nothing to read."""
        self.spoke_at = asyncio.get_running_loop().time()
        self._hub = hub
        self._last = after or START
        self._next = b""
        self._queue: deque[bytes] = deque()
        self._wake = asyncio.Event()
        self._reread = True
        self._keepalive = False
        self._stopped = self._done = self.finished
        self._channel: Channel | None = None

    @property
    def over(self) -> bool:
        """True once the job's end was handed out, or was behind the starting point already."""
        return self._done

    @property
    def last_id(self) -> str | None:
        """The id of the last event that was handed out, to resume from; None before the first."""
        return None if self._last == START else str(self._last)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[Frame]:
        if self._stopped or self._done:
            await self.aclose()
            raise StopAsyncIteration
        if self._channel is None:
            self._channel = self._hub.attach(self)
        backoff = 0.1
        while not self._stopped:
            batch: list[Frame] = []
            if self._reread and self._channel.acked.is_set():
                try:
                    batch = await self._catch_up()
                except StoreUnavailable as err:
                    logger.debug("reader of %s waits: %s", self.job_id, err, extra={"job_id": self.job_id})
                    self._reread = True
                    await self._pause(backoff)
                    backoff = min(backoff * 2, _BACKOFF_MAX_S)
            elif self._queue:
                batch = self._take()
            if self._done and not batch:
                break
            if batch:
                self.spoke_at = asyncio.get_running_loop().time()
                return batch
            if self._keepalive:
                self._keepalive = False
                self.spoke_at = asyncio.get_running_loop().time()
                return []
            if not self._queue and not (self._reread and self._channel.acked.is_set()) and not self._stopped:
                self._wake.clear()
                await self._wake.wait()
        await self.aclose()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Leave the channel. Safe to repeat."""
        self._stopped = True
        self._wake.set()
        if self._channel is not None:
            self._hub.detach(self, self._channel)
            self._channel = None
        self._queue.clear()

    # -- called by the hub, never awaited -----------------------------------------------------------------------

    def offer(self, message: bytes) -> None:
        """A live message, ``<id> <json>`` or ``<id>`` alone."""
        if self._reread:
            return  # the log, read after this moment, holds it
        if len(self._queue) >= _QUEUE_MAX:
            self._queue.clear()
            self._reread = True
            self._hub.counted["overflows"] += 1
        else:
            self._queue.append(message)
        self._wake.set()

    def reread(self) -> None:
        """Messages may have been missed: look at the log."""
        self._reread = True
        self._queue.clear()
        self._wake.set()

    def keepalive(self) -> None:
        """Nothing came for long: look at the log, and say that we are alive."""
        self._keepalive = True
        self.reread()

    def stop(self) -> None:
        """The hub closes."""
        self._stopped = True
        self._wake.set()

    # -- internals ----------------------------------------------------------------------------------------------

    async def _pause(self, seconds: float) -> None:
        await asyncio.sleep(seconds * random.uniform(0.5, 1.5))  # noqa: S311 - spreads retries, no secret

    def _take(self) -> list[Frame]:
        """What waits, as far as it is contiguous."""
        batch: list[Frame] = []
        queue = self._queue
        while queue:
            event_id, _, data = queue.popleft().partition(b" ")
            if event_id == self._next and data:
                got = frame(event_id, data)
                self._advance(EventId(self._last.epoch, self._last.n + 1))
                batch.append(got)
                if got.type in END_TYPES:
                    self._done = True
                    break
            elif EventId.read(event_id) > self._last or data[9:14] in {b'done"', b"error", b"cance"}:
                # A gap, a new epoch, a large event, or an end that stands before what we were told to resume from.
                self._hub.counted["gaps"] += 1
                self._reread = True
                queue.clear()
        return batch

    def _advance(self, last: EventId) -> None:
        self._last = last
        self._next = b"%d-%d" % (last.epoch, last.n + 1)

    async def _catch_up(self) -> list[Frame]:
        # Cleared before the read: what is offered from now on may be newer than what the read returns.
        self._reread = False
        self._queue.clear()
        self._hub.counted["replays"] += 1
        entries, exists, more, known = await self._hub.store.resume_log(self.job_id, self._last)
        if self.user is None:
            # Redis was away when we were opened: whose job this is, is known only now.
            record = await self._hub.store.find(self.job_id)
            self.user = record.user if record else None
        batch: list[Frame] = []
        if entries and not known and entries[0][0].epoch > self._last.epoch:
            batch += await self._anew(entries[0][0])
        for event_id, data in entries:
            got = frame(bytes(event_id), data)
            self._advance(event_id)
            batch.append(got)
            if got.type in END_TYPES:
                self._done = True
                return batch
        if entries:
            # A full page has another one behind it. Live messages that the page held already are dropped as known.
            self._reread = self._reread or more
            return batch
        if not self._next:
            self._advance(self._last)
        return await self._without_log(exists)

    async def _anew(self, until: EventId) -> list[Frame]:
        """What stands in the place of an attempt that the store forgot (power loss, failover), up to ``until``.

        Events of another attempt follow, and what this reader saw of the forgotten one would stand before them.
        """
        text, last, more = "", START, True
        while more:
            entries, _, more = await self._hub.store.read_log(self.job_id, last)
            for event_id, data in entries:
                if event_id >= until:
                    more = False
                    break
                last = event_id
                got = frame(None, data)
                if got.type == b"restart":
                    text = ""
                elif got.type == b"token":
                    text += orjson.loads(data)["text"]
        # Without ids: a reader cut off right here resumes from where it was and gets this again.
        restart = {"type": "restart", "reason": "the store lost its last moments"}
        batch = [frame(None, orjson.dumps(restart))]
        if text:
            batch.append(frame(None, Token(text=text).to_json()))
        return batch

    async def _without_log(self, exists: bool) -> list[Frame]:
        """Nothing new in the log: still running, or ended before our starting point, or the log is gone."""
        if exists and not self._keepalive and self._last == START:
            return []
        record = await self._hub.store.find(self.job_id)
        if record is None:
            self._done = True
            gone = {"type": "error", "code": "not_found", "message": "the job is no longer stored", "retryable": False}
            return [frame(None, orjson.dumps(gone))]
        self.user = record.user
        end_id = record.end_id
        if end_id is None or (exists and self._last < end_id):
            return []
        self._done = True
        if self._last >= end_id:
            return []
        return _late(record, self._last, end_id)


def _late(record: Record, last: EventId, end_id: EventId) -> list[Frame]:
    """The end of a job whose log was deleted, and its text for a reader that lacks some of it."""
    token, end = record.late_events()
    batch: list[Frame] = []
    text_id = EventId(end_id.epoch, 0)
    if last < text_id and not record.seen_all(last) and not record.end.get("untold"):
        if last != START:
            # Without an id: a reader cut off right here resumes from where it was and gets this again.
            restart = {"type": "restart", "reason": "the log is no longer stored; the text follows whole"}
            batch.append(frame(None, orjson.dumps(restart)))
        if token is not None:
            batch.append(frame(bytes(text_id), token))
    batch.append(frame(bytes(end_id), end))
    return batch
