"""Lines of batches come to a worker without messages: it takes their ids from a list whenever it has free slots.

A message costs more than the rest of a line's way through the queue. An id that was taken by a worker which then died
is found by the sweep, as a lost message is: the job's outbox entry goes with its claim, not before.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from promptmill import keys
from promptmill.errors import StoreUnavailable
from promptmill.store import Store
from promptmill.store.connection import store_errors
from promptmill_workers.capacity import Capacity

logger = logging.getLogger(__name__)

_AT_ONCE: Final = 500
"""How many ids one call takes."""


class Puller:
    """Takes lines of one queue. Use from one event loop.

    ``serve`` runs a job to its end. ``crowd`` answers how many messages wait in the queue, if the broker says.
    ``looks_s`` is how often the list is looked at where nobody told of anything.
    """

    def __init__(
        self,
        store: Store,
        queue: str,
        serve: Callable[[str, str], Awaitable[None]],
        crowd: Callable[[str], Awaitable[int | None]],
        looks_s: float,
    ) -> None:
        self._store = store
        self._queue = queue
        self._serve = serve
        self._crowd = crowd
        self._looks_s = looks_s
        self._capacity: Capacity | None = None
        self._slots_changed: Callable[[], None] = lambda: None
        self._news = asyncio.Event()
        self._more = False
        """Whether the list had more than there were slots for."""
        self._limit = 0
        self._told = 0
        """What the consumer of messages knows to be lent."""
        self._looked_at = -1e9
        self._serving: set[asyncio.Task[None]] = set()
        self.open = False
        """Whether lines may be taken: not before the worker is ready, and not once it drains."""

    def share(self, capacity: Capacity, slots_changed: Callable[[], None]) -> None:
        """Take slots of this capacity. ``slots_changed`` is called where messages may now come, or may not."""
        self._capacity, self._slots_changed = capacity, slots_changed

    def wake(self) -> None:
        """There may be something in the list."""
        self._news.set()

    async def run(self) -> None:
        """Take lines until cancelled."""
        while True:
            try:
                await self._look()
            except StoreUnavailable as err:
                logger.warning("no lines are taken: %s", err)
                await asyncio.sleep(self._looks_s / 4)
            try:
                async with asyncio.timeout(self._looks_s):
                    await self._news.wait()
            except TimeoutError:
                pass  # nothing was told: look by ourselves
            self._news.clear()

    async def _look(self) -> None:
        capacity = self._capacity
        if capacity is None:
            return
        if not self.open:
            self._lend(capacity, 0)
            return
        if not capacity.pulled and not await self._waits():
            # Without lines the slots are the messages'.
            self._lend(capacity, 0)
            return
        if asyncio.get_running_loop().time() - self._looked_at >= self._looks_s:
            await self._divide(capacity)
        self._lend(capacity, self._limit)
        await self._pull(capacity)

    async def _waits(self) -> bool:
        with store_errors(self._store.address):
            self._more = bool(await self._store.wire.call("EXISTS", keys.ready(self._queue)))
        return self._more

    async def _divide(self, capacity: Capacity) -> None:
        """All slots of batch jobs, or half of them while messages of batch jobs wait; the only one every other time."""
        self._looked_at = asyncio.get_running_loop().time()
        if not await self._crowd(self._queue):
            self._limit = capacity.batch_max
        elif capacity.batch_max > 1:
            self._limit = capacity.batch_max // 2
        else:
            self._limit = 1 - self._limit

    async def _pull(self, capacity: Capacity) -> None:
        """Take as many lines as there are slots for."""
        while self.open and (slots := capacity.pull(_AT_ONCE)):
            taken: list[bytes] = []
            try:
                with store_errors(self._store.address):
                    taken = await self._store.wire.call("LPOP", keys.ready(self._queue), slots) or []
            finally:
                if capacity.pulled_done(slots - len(taken)):
                    self._slots_changed()
            for raw in taken:
                task = asyncio.create_task(self._serve_one(raw.decode(), capacity), name="line")
                self._serving.add(task)
                task.add_done_callback(self._served)
            self._more = len(taken) == slots
            if not self._more:
                return
        # No slot is free: whoever ends looks for more.
        self._more = True

    async def _serve_one(self, job_id: str, capacity: Capacity) -> None:
        try:
            await self._serve(job_id, self._queue)
        finally:
            if capacity.pulled_done():
                self._slots_changed()
            if self._more or not capacity.pulled:
                self._news.set()

    def _served(self, task: asyncio.Task[None]) -> None:
        self._serving.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a line's job was not served, the sweep finds it: %r", error)

    def _lend(self, capacity: Capacity, slots: int) -> None:
        capacity.lend(slots)
        if slots != self._told:
            self._told = slots
            self._slots_changed()
