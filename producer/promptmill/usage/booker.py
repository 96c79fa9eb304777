"""A worker's own booking: behind the jobs, in the background, many at once."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Final

from promptmill.errors import StoreUnavailable
from promptmill.registry import Registry
from promptmill.store import Store
from promptmill.store.tries import Try
from promptmill.usage.booking import book, keep_try

logger = logging.getLogger(__name__)

_TOLD_MAX: Final = 10_000
_BACKOFF_MAX_S: Final = 2.0


class Booker:
    """Books jobs in the background, and tells the store of attempts that no end of a job will tell. Never raises.

    ``registry`` answers the snapshot that holds at the moment. Use from one event loop. While the store is away, what
    is to be told waits here, 10,000 attempts at most; bookings do not, the sweep makes them.
    """

    def __init__(self, store: Store, registry: Callable[[], Registry], retention_s: float) -> None:
        self._store = store
        self._registry = registry
        self._retention_s = retention_s
        self._told: deque[tuple[str, Try, bool]] = deque(maxlen=_TOLD_MAX)
        self._waiting: dict[str, None] = {}
        self._task: asyncio.Task[None] | None = None

    def soon(self, job_id: str) -> None:
        """Book a job: at its end, or whenever there is something new."""
        self._waiting[job_id] = None
        if self._task is None:
            self._task = asyncio.create_task(self._drain(), name="booker")

    def keep(self, job_id: str, try_: Try) -> None:
        """Tell of an attempt that ended before its claim was taken away."""
        self._told.append((job_id, try_, False))
        self.soon(job_id)

    def lost(self, job_id: str, try_: Try) -> None:
        """Tell of the attempt that ran when its claim was taken away, or whose end came too late."""
        self._told.append((job_id, try_, True))
        self.soon(job_id)

    async def _drain(self) -> None:
        backoff_s = 0.05
        try:
            while self._told or self._waiting:
                try:
                    await self._tell()
                    job_ids = list(self._waiting)
                    self._waiting.clear()
                    await book(self._store, self._registry(), self._retention_s, job_ids)
                    backoff_s = 0.05
                except StoreUnavailable as err:
                    logger.info("usage is booked later: %s", err)
                    await asyncio.sleep(backoff_s)
                    backoff_s = min(backoff_s * 2, _BACKOFF_MAX_S)
        finally:
            self._task = None

    async def _tell(self) -> None:
        while self._told:
            told = self._told[0]
            await keep_try(self._store, told[0], told[1], lost=told[2])
            # What came meanwhile may have pushed it out.
            if self._told and self._told[0] is told:
                self._told.popleft()

    async def aclose(self, timeout_s: float = 5.0) -> None:
        """Wait until all is told and booked, but no longer than that."""
        task = self._task
        if task is None:
            return
        await asyncio.wait([task], timeout=timeout_s)
        if not task.done():
            logger.warning("the usage of %d attempts could not be told: the store is away", len(self._told))
            task.cancel()
            await asyncio.wait([task])
