"""What a worker process has done, as its heartbeat tells it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from promptmill.rolling import Rates, Recent


class Counts:
    """Jobs by how they ended here, and pieces of text. Use from one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._rates = Rates()
        self._recent = Recent()
        self.ended: Counter[str] = Counter()
        """``succeeded`` and ``failed``; ``stopped`` is what was cancelled, taken away or handed back."""

    def note(self, state: str, code: str | None = None) -> None:
        """A job ended here; ``code`` is the error's."""
        self.ended[state] += 1
        if code is not None:
            self._recent.note(self._clock(), code)

    def told(self, pieces: int) -> dict[str, Any]:
        """For the heartbeat: see :class:`promptmill.heartbeat.Done`."""
        now = self._clock()
        jobs_s, pieces_s = self._rates.note(now, self.ended["succeeded"] + self.ended["failed"], pieces)
        return {
            "up_s": round(now - self._began, 1),
            "ended": dict(self.ended),
            "pieces": pieces,
            "jobs_s": jobs_s,
            "pieces_s": pieces_s,
            "failures": self._recent.counts(now),
        }
