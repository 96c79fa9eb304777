"""Ends a worker process whose event loop stands still, so that its jobs are picked up elsewhere.

The timer is faulthandler's own thread, written in C: it ends the process even while a library holds the interpreter's
lock, which no watchdog written in Python can. It writes where every thread stood to standard error and exits with
status 1; the guards of running programs see the worker's end and clear up after it.
"""

from __future__ import annotations

import asyncio
import faulthandler
from typing import Final

_TURNS_PER_LIMIT: Final = 4
_TURN_MAX_S: Final = 1.0


class Watchdog:
    """Armed by :meth:`start` in the loop that it watches; :meth:`stop` disarms it."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._every_s = min(_TURN_MAX_S, limit_s / _TURNS_PER_LIMIT)
        self._loop = asyncio.get_running_loop()
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """From now on the process ends when the loop has not turned for the limit."""
        # Each call replaces the timer of the last one.
        faulthandler.dump_traceback_later(self._limit_s, exit=True)
        self._handle = self._loop.call_later(self._every_s, self.start)

    def stop(self) -> None:
        """The loop may stand still again."""
        if self._handle is not None:
            self._handle.cancel()
        faulthandler.cancel_dump_traceback_later()
