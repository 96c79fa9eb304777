"""Whether the event loop turns, for the threads that bring it work.

A backend that holds the loop up is a fault, and the watchdog ends the process for it after a while. What the process
took from the broker until then would die with it, and be found only by the sweep: so it takes nothing meanwhile.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Final

_EVERY_S: Final = 0.2
_STILL_S: Final = 1.0
"""Longer than the collector, an import or a busy machine hold a loop up."""
_TAKEN_S: Final = 2.0
"""How long a loop that turns may take to begin with a job: many may have come at once."""


class Turning:
    """Made and started in the loop that it follows; all else may be asked from any thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._turned_at = time.monotonic()
        self._handle: asyncio.TimerHandle | None = None
        self.found: Callable[[], None] = lambda: None
        """Called from a thread that found the loop standing still."""

    def start(self) -> None:
        """Note each turn from now on."""
        self._turned_at = time.monotonic()
        self._handle = self._loop.call_later(_EVERY_S, self.start)

    def stop(self) -> None:
        """Note no more."""
        if self._handle is not None:
            self._handle.cancel()

    @property
    def stands_still(self) -> bool:
        """Whether the last turn is too long ago."""
        return time.monotonic() - self._turned_at > _STILL_S

    def begins(self, begin: Begin) -> bool:
        """Wait until the loop has begun; False where it does not, and then it never will."""
        if begin.begun.wait(0 if self.stands_still else _TAKEN_S) or not begin.decide():
            return True
        self.found()
        return False


class Begin:
    """Either the loop begins with a job, or the thread that brought it takes it back: whoever is first."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self._decided = threading.Lock()

    def decide(self) -> bool:
        """True for the first caller only."""
        return self._decided.acquire(blocking=False)
