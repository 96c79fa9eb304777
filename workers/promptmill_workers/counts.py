"""What a worker process has done, as its heartbeat tells it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

from promptmill.rolling import Rates, Recent
from promptmill.store import Record


class Listener(Protocol):
    """Who wants to hear of every job; see :class:`promptmill_workers.task_events.TaskEvents`."""

    def began(self, record: Record) -> None: ...

    def ended(self, job_id: str, state: str, end: dict[str, Any]) -> None: ...

    def stopped(self, job_id: str) -> None: ...

    def passed_over(self, job_id: str) -> None: ...

    def put_back(self, job_id: str) -> None: ...


class Counts:
    """Jobs by how they ended here, and who is told of them. Use from one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._rates = Rates()
        self._recent = Recent()
        self.by_state: Counter[str] = Counter()
        """``succeeded`` and ``failed``; ``stopped`` is what was cancelled, taken away or handed back."""
        self.listener: Listener | None = None

    def began(self, record: Record) -> None:
        """A job was claimed here."""
        if self.listener is not None:
            self.listener.began(record)

    def ended(self, job_id: str, state: str, end: dict[str, Any]) -> None:
        """A job ended here, and its end is stored."""
        self.by_state[state] += 1
        if "error" in end:
            self._recent.note(self._clock(), end["error"]["code"])
        if self.listener is not None:
            self.listener.ended(job_id, state, end)

    def stopped(self, job_id: str) -> None:
        """A job is no longer ours: cancelled, taken away, or handed back."""
        self.by_state["stopped"] += 1
        if self.listener is not None:
            self.listener.stopped(job_id)

    def passed_over(self, job_id: str) -> None:
        """A job's message came, and the claim was refused."""
        if self.listener is not None:
            self.listener.passed_over(job_id)

    def put_back(self, job_id: str) -> None:
        """A job that ran here waits again: for its model, for its turn, or for another family's worker."""
        if self.listener is not None:
            self.listener.put_back(job_id)

    def told(self, pieces: int) -> dict[str, Any]:
        """For the heartbeat: see :class:`promptmill.heartbeat.Done`."""
        now = self._clock()
        jobs_s, pieces_s = self._rates.note(now, self.by_state["succeeded"] + self.by_state["failed"], pieces)
        return {
            "up_s": round(now - self._began, 1),
            "ended": dict(self.by_state),
            "pieces": pieces,
            "jobs_s": jobs_s,
            "pieces_s": pieces_s,
            "failures": self._recent.counts(now),
        }
