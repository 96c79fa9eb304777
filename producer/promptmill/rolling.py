"""What a process has done lately, from counters that only rise."""

from __future__ import annotations

from collections import Counter, deque
from typing import Final

RATE_OVER_S: Final = 10.0
RECENT_S: Final = 300.0
_SLICE_S: Final = 10.0


class Rates:
    """How fast some counters rose over the last ten seconds. Call :meth:`note` every few seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, tuple[int, ...]]] = deque()

    def note(self, now: float, *counters: int) -> list[float]:
        """Take the counters down as they are at ``now``; answers what each rose by in a second."""
        self._seen.append((now, counters))
        # One that is older than the span stays: else a beat every ten seconds would have nothing to compare with.
        while len(self._seen) > 2 and self._seen[1][0] <= now - RATE_OVER_S:
            self._seen.popleft()
        since, before = self._seen[0]
        passed_s = now - since
        if passed_s <= 0:
            return [0.0] * len(counters)
        return [round((new - old) / passed_s, 3) for new, old in zip(counters, before, strict=True)]


class Recent:
    """How often each thing happened within the last five minutes, to ten seconds."""

    def __init__(self) -> None:
        self._slices: deque[tuple[float, Counter[str]]] = deque()

    def note(self, now: float, what: str) -> None:
        """It happened once more."""
        if not self._slices or now - self._slices[-1][0] >= _SLICE_S:
            self._slices.append((now, Counter()))
        self._slices[-1][1][what] += 1

    def counts(self, now: float) -> dict[str, int]:
        """By name; what did not happen is not in it."""
        while self._slices and self._slices[0][0] < now - RECENT_S:
            self._slices.popleft()
        total: Counter[str] = Counter()
        for _, counted in self._slices:
            total.update(counted)
        return dict(total)
