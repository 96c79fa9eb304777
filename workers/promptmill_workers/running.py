"""A job that this process runs."""

from __future__ import annotations

import asyncio
import time
from typing import Literal

from promptmill.store import Claimed
from promptmill.tracing import Span
from promptmill_workers.course import Course
from promptmill_workers.joblog import JobLog

StopReason = Literal["taken", "handback"]


class RunningJob:
    """A claim that this process holds, and the task that serves it."""

    __slots__ = (
        *("_age_s", "_claimed_at", "batch", "claim", "course", "ending"),
        *("job_id", "log", "priority", "span", "stop_reason", "task", "tries"),
    )

    def __init__(self, job_id: str, claim: str, log: JobLog, claimed: Claimed, span: Span) -> None:
        self.job_id = job_id
        self.batch = claimed.record.batch
        self.priority: str = claimed.record.head.get("priority", "interactive")
        # By the store's clock up to the claim, whose epoch is a time in ms; from then on by ours.
        self._age_s = (claimed.epoch - claimed.record.st["created"]) / 1000
        self._claimed_at = time.monotonic()
        self.claim = claim
        self.log = log
        self.span = span
        self.tries = claimed.tries
        self.course: Course | None = None
        self.task = asyncio.current_task()
        self.stop_reason: StopReason | None = None
        self.ending = False
        """All that is left to do is to store its end: handed back now, a whole answer would be paid for again."""

    @property
    def age_s(self) -> float:
        """Since it was submitted."""
        return self._age_s + time.monotonic() - self._claimed_at

    def stop(self, reason: StopReason) -> None:
        """End it from outside; the task closes its backend before it returns."""
        if self.stop_reason is None:
            self.stop_reason = reason
            if self.task is not None:
                self.task.cancel()
