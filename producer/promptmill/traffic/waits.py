"""How long those wait that a limit keeps back, so that they do not all ask at once, and Redis is asked by few."""

from __future__ import annotations

import heapq
import random
from typing import Final

from promptmill.settings import ModelLimits
from promptmill.traffic.rules import Reason

SLOT_WAIT_S: Final = 0.1
"""How often somebody looks for a free place among calls at once."""
_SPREAD_MAX_S: Final = 5.0
_PACED_SPREAD_MAX_S: Final = 60.0
"""Whose place in a paced line is known need not ask before it could be their turn."""
_SLOT_SPREAD_S: Final = 0.005
_BURST: Final = 0.04
"""The part of a minute's requests and tokens that may go at once: with it, any minute stays within 5 %."""
_US: Final = 1_000_000


class Paces:
    """A model's limits as the script takes them. ``window_s`` is what counts as a minute."""

    __slots__ = ("burst_requests_us", "burst_tokens_us", "concurrency", "request_us", "token_us")

    def __init__(self, limits: ModelLimits, window_s: float) -> None:
        requests, tokens = limits.requests_per_minute, limits.tokens_per_minute
        self.concurrency = limits.concurrency or 0
        self.request_us = window_s * _US / requests if requests else 0.0
        self.token_us = window_s * _US / tokens if tokens else 0.0
        # Whole requests: a part of one would let the next come early, and one too many into a minute.
        self.burst_requests_us = int((requests or 0) * _BURST) * self.request_us
        self.burst_tokens_us = window_s * _US * _BURST if tokens else 0.0


class Line:
    """One user's callers that wait here for one model."""

    __slots__ = ("_due", "closed_until", "reason")

    def __init__(self) -> None:
        self._due: list[float] = []
        self.closed_until = 0.0
        """Asking Redis before this is of no use."""
        self.reason: Reason = "concurrency"

    def waiting(self, now: float) -> int:
        """How many were told to wait and are not yet due."""
        while self._due and self._due[0] <= now:
            heapq.heappop(self._due)
        return len(self._due)

    def wait_s(self, now: float, request_us: float) -> float:
        """For one more caller: until asking is of use, and then spread, four times as dense as places come free."""
        others = self.waiting(now)
        each = request_us / _US / 4 if self.reason == "requests" else _SLOT_SPREAD_S
        most_s = _PACED_SPREAD_MAX_S if self.reason == "requests" else _SPREAD_MAX_S
        spread = min(others * each, most_s) + min(SLOT_WAIT_S, self.closed_until - now) / 5
        wait_s = max(self.closed_until - now, 0.0) + random.uniform(0, max(spread, 0.005))  # noqa: S311 - no secret
        heapq.heappush(self._due, now + wait_s)
        return wait_s
