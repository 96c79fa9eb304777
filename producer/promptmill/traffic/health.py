"""A worker's own copy of the fleet's health, and what operators see of it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from promptmill.traffic.rules import Reason

_US: Final = 1_000_000
_REASONS: Final[Mapping[str, Reason]] = {"requests": "requests", "tokens": "tokens"}
_PROBE_AGAIN_S: Final = 0.25
_CLOCK_STEP_US: Final = 10 * _US
"""What seems older by more than this is not: Redis's clock was set back, or another server took over."""


@dataclass(frozen=True, slots=True)
class Cooldown:
    """What keeps calls of a model or a host back. ``for_s`` is how much longer, as far as is known.

    ``state``: ``open`` (the breaker: nobody is admitted), ``half-open`` (one call may find out), ``held`` (the provider
    said how long to wait), ``reduced`` (``concurrency`` calls at once, learned from the provider's refusals),
    ``failing`` (it failed lately and is still asked). ``code`` is the last failure's.
    """

    kind: Literal["model", "host"]
    name: str
    state: Literal["open", "half-open", "held", "reduced", "failing"]
    for_s: float = 0.0
    code: str | None = None
    reason: Reason = "cooldown"
    concurrency: int | None = None


@dataclass(slots=True)
class Health:
    """One subject's health as it was last told. Times are this process's monotonic clock, in s."""

    told_us: int
    hold_until: float = 0.0
    why: Reason = "cooldown"
    open: bool = False
    open_until: float = 0.0
    failing: bool = False
    code: str | None = None
    cap: int = 0
    cap_until: float = 0.0
    probe_after: float = 0.0
    """Somebody's probe runs: asking for one before this is of no use."""

    @classmethod
    def of(cls, fields: Mapping[str, str], now_us: int, now: float) -> Health:
        """From the fields of ``health`` (:mod:`promptmill.traffic.scripts`) at Redis's ``now_us``, which is ``now``."""

        def local(name: str) -> float:
            return now + (int(fields[name]) - now_us) / _US if name in fields else 0.0

        return cls(
            now_us,
            local("hold"),
            _REASONS.get(fields.get("why", ""), "cooldown"),
            "open" in fields,
            local("until"),
            "ring" in fields,
            fields.get("code"),
            int(fields.get("cap", 0)),
            local("capend"),
        )

    def capped(self, now: float) -> bool:
        """True where calls at once are limited by what was learned."""
        return self.cap > 0 and self.cap_until > now

    def refusal(self, now: float) -> tuple[float, Reason] | None:
        """For how long nobody is admitted, spread so that not all come at once, and why; None: ask further."""
        left, why = max((self.hold_until - now, self.why), (self.open_until - now if self.open else 0.0, "cooldown"))
        if left <= 0:
            return None
        return left + random.uniform(0, min(left / 4, 2.0)), why  # noqa: S311 - spreads callers, no secret

    def cooldowns(self, subject: str, now: float) -> list[Cooldown]:
        """The same for people; empty where nothing is wrong any more."""
        name = subject.partition(":")[2]
        kind: Literal["model", "host"] = "model" if subject.startswith("model:") else "host"
        found: list[Cooldown] = []
        if self.open:
            left = self.open_until - now
            found.append(Cooldown(kind, name, "open" if left > 0 else "half-open", max(left, 0.0), self.code))
        elif self.failing:
            found.append(Cooldown(kind, name, "failing", 0.0, self.code))
        if self.hold_until > now:
            code = self.code if self.why == "cooldown" else None
            found.append(Cooldown(kind, name, "held", self.hold_until - now, code, self.why))
        if self.capped(now):
            found.append(Cooldown(kind, name, "reduced", self.cap_until - now, None, "concurrency", self.cap))
        return found


class Book:
    """Every subject of which something is known; who is well is not in it."""

    def __init__(self) -> None:
        self.entries: dict[str, Health] = {}
        self._well_us: dict[str, int] = {}

    def tell(self, subject: str, fields: Mapping[str, str], now_us: int, now: float) -> Health | None:
        """Take over what was told at Redis's ``now_us``, unless something newer is known. Answers what holds now."""
        known = self.entries.get(subject)
        newest_us = known.told_us if known else self._well_us.get(subject, 0)
        if newest_us - _CLOCK_STEP_US < now_us < newest_us:
            return known
        entry = Health.of(fields, now_us, now)
        if known is not None and known.hold_until > max(entry.hold_until, now):
            # Learned here while Redis was away; nobody ever shortens one.
            entry.hold_until, entry.why = known.hold_until, known.why
        if not fields and not entry.hold_until:
            self.entries.pop(subject, None)
            # So that an answer to an earlier question does not bring the old state back.
            self._well_us[subject] = now_us
            return None
        self._well_us.pop(subject, None)
        self.entries[subject] = entry
        if known is not None and known.open and entry.open:
            entry.probe_after = known.probe_after
        return entry

    def hold(self, subject: str, seconds: float, why: Reason, now: float) -> None:
        """What this process learned itself: it holds here at once, and where Redis is away."""
        entry = self.entries.setdefault(subject, Health(self._well_us.get(subject, 0)))
        if entry.hold_until < now + seconds:
            entry.hold_until, entry.why = now + seconds, why

    def probed(self, subject: str, now: float) -> None:
        """Somebody asks for the probe, or has it."""
        if subject in self.entries:
            self.entries[subject].probe_after = now + random.uniform(1, 2) * _PROBE_AGAIN_S  # noqa: S311 - no secret
