"""``cancel_on_disconnect``: a job that asked for it is cancelled where its readers have left and nobody comes back.

A reader that leaves never stops a job that did not ask for it. Only a gateway's readers count as leaving, because the
relay does not write; any reader of the job, wherever it reads, keeps the job alive.

Who wins the race:

============================================  =========================================================================
a reader comes back and the grace             back first: the job goes on, and the next leaving begins a new grace
                                              grace first: the job is cancelled, and the reader gets ``cancelled``
one of two readers leaves                     the one that stays: the job goes on for as long as it reads
a reader leaves and the job ends              the end, whichever came first; nothing is cancelled that has ended
a reader leaves and this gateway stops        leaving first: it is on record, and any gateway sees to it
                                              the stop first: the reader did not leave, we did; the job goes on
two gateways look at one job                  either; the second finds it ended
a reader leaves while Redis is away           it is noted here, and goes on record when Redis is back
the gateway dies, by ``kill -9``              nobody has left: the job goes on
============================================  =========================================================================
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from promptmill import keys
from promptmill.errors import NotFound, StoreUnavailable
from promptmill.settings import Settings
from promptmill.store import Store
from promptmill.store.connection import store_errors
from promptmill.store.link import Command

logger = logging.getLogger(__name__)

_LOOK_S: Final = 1.0
_BATCH: Final = 200
_ROUNDS_MAX: Final = 100
_CLOSE_S: Final = 2.0


class Disconnects:
    """What becomes of jobs whose readers left. One per gateway; :meth:`run` does the work.

    On record is a job and when to look at it. Whoever looks asks the store who listens to the job's channel, so that
    readers of every process count. A look that finds a reader only puts the next one off: the entry goes with the job's
    end and not before, because a reader may leave between the look and the removal.
    """

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._grace_ms = int(settings.disconnect_grace_s * 1000)
        self._reason = f"its reader left and nobody came back within {settings.disconnect_grace_s:g} s"
        self._left: set[str] = set()
        self._wake = asyncio.Event()

    def left(self, job_id: str) -> None:
        """A reader of an unended job has left. Returns at once."""
        self._left.add(job_id)
        self._wake.set()

    async def run(self) -> None:
        """Put leavings on record as they come, and look at what is due every second, for ever."""
        away = False
        while True:
            try:
                await self.record()
                await self.look()
                away = False
            except StoreUnavailable as err:
                # Once an outage: this comes by every second.
                if not away:
                    logger.warning("jobs whose readers left wait: %s", err)
                away = True
                self._wake.clear()
            try:
                async with asyncio.timeout(_LOOK_S):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def aclose(self) -> None:
        """Put on record who left a moment ago; another gateway, or the next one here, sees to it."""
        try:
            async with asyncio.timeout(_CLOSE_S):
                await self.record()
        except (StoreUnavailable, TimeoutError) as err:
            logger.warning("%d jobs whose readers left go on: %s", len(self._left), err or "no answer in time")

    async def record(self) -> None:
        """Put on record which of the jobs that a reader left are to be cancelled for it."""
        while self._left:
            some = [self._left.pop() for _ in range(min(_BATCH, len(self._left)))]
            try:
                found = await self._store.find_many(some)
                await self._look_later([r.job_id for r in found if r is not None and r.tied and not r.ended])
            except BaseException:
                self._left.update(some)
                raise
        self._wake.clear()

    async def look(self) -> list[str]:
        """Cancel what nobody came back to within the grace. Answers the jobs that were cancelled."""
        with store_errors(self._store.address):
            first, time = await self._store.ask([("ZRANGE", keys.LEFT, 0, 0, "WITHSCORES"), ("TIME",)])
        now_ms = _ms(time)
        if not first or float(first[1]) > now_ms:
            return []
        cancelled: list[str] = []
        for _ in range(_ROUNDS_MAX):
            with store_errors(self._store.address):
                due: list[bytes] = await self._store.wire.call(
                    "ZRANGEBYSCORE", keys.LEFT, "-inf", now_ms, "LIMIT", 0, _BATCH
                )
            if due:
                cancelled += await self._look_at([raw.decode() for raw in due])
            if len(due) < _BATCH:
                break
        return cancelled

    async def _look_at(self, job_ids: list[str]) -> list[str]:
        records = await self._store.find_many(job_ids)
        with store_errors(self._store.address):
            counts = await self._store.listeners(job_ids)
        read: list[str] = []
        over: list[str] = []
        cancelled: list[str] = []
        for job_id, record, readers in zip(job_ids, records, counts, strict=True):
            if record is not None and not record.ended and readers:
                read.append(job_id)
                continue
            over.append(job_id)
            if record is not None and not record.ended and await self._cancel(job_id):
                cancelled.append(job_id)
        await self._look_later(read)
        if over:
            with store_errors(self._store.address):
                await self._store.ask([("ZREM", keys.LEFT, *over)])
        return cancelled

    async def _cancel(self, job_id: str) -> bool:
        try:
            cancelled = await self._store.cancel(job_id, self._reason, keys.new_token())
        except NotFound:
            return False
        if cancelled:
            logger.info("job %s is cancelled: %s", job_id, self._reason, extra={"job_id": job_id})
        return cancelled

    async def _look_later(self, job_ids: list[str]) -> None:
        if not job_ids:
            return
        with store_errors(self._store.address):
            due = _ms(await self._store.wire.call("TIME")) + self._grace_ms
            # Never earlier: another gateway may have seen a reader leave after ours did.
            renew: list[Command] = [("ZADD", keys.LEFT, "GT", due, job_id) for job_id in job_ids]
            await self._store.ask([*renew, ("EXPIRE", keys.LEFT, int(keys.INDEX_TTL.total_seconds()))])


def _ms(time: list[bytes]) -> int:
    """Redis's TIME in ms: its clock is the same for every gateway."""
    return int(time[0]) * 1000 + int(time[1]) // 1000
