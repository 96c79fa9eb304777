"""One timer for all streams: thousands of deltas a second cost one wake-up a millisecond at most."""

from __future__ import annotations

import asyncio
import heapq
import time
from typing import Protocol


class Ticking(Protocol):
    """What a ticker calls."""

    def tick(self, now: float) -> None: ...


class Ticker:
    """Calls `tick(time.monotonic())` of what is due, up to 2 ms late and never early.

    An entry is called once; it asks again for its next turn. There is no removal: an entry whose work is over ignores
    its call.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._slots: dict[int, list[Ticking]] = {}
        self._order: list[int] = []
        self._timer: asyncio.TimerHandle | None = None
        self._timer_slot = 0
        self._floor = 0

    def at(self, due_s: float, entry: Ticking) -> None:
        """Call `entry.tick` at `due_s` (`time.monotonic()`) or soon after, but never within the running round."""
        slot = max(int(due_s * 1000) + 1, self._floor)
        waiting = self._slots.get(slot)
        if waiting is not None:
            waiting.append(entry)
            return
        self._slots[slot] = [entry]
        heapq.heappush(self._order, slot)
        if self._timer is None or slot < self._timer_slot:
            self._arm()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._slots.clear()
        self._order.clear()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if self._order:
            self._timer_slot = self._order[0]
            wait = self._timer_slot / 1000 - time.monotonic()
            # uvloop rounds to whole milliseconds: a shorter wait would fire at once and spin.
            self._timer = self._loop.call_later(max(0.001, wait) if wait > 0 else 0.0, self._run)

    def _run(self) -> None:
        self._timer = None
        self._timer_slot = 0
        now = time.monotonic()
        limit = int(now * 1000)
        # An entry that is behind its time and asks for more must not starve the loop in this round.
        self._floor = limit + 1
        try:
            while self._order and self._order[0] <= limit:
                # Popped one by one: an entry that raises must not take its neighbours' turns with it.
                waiting = self._slots[self._order[0]]
                while waiting:
                    waiting.pop().tick(now)
                del self._slots[heapq.heappop(self._order)]
        finally:
            self._arm()
