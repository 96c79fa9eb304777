"""Whether a day's sums are those of its entries."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import date
from typing import Any, Final

import orjson

from promptmill import keys
from promptmill.store import Store
from promptmill.usage.entries import total_tokens
from promptmill.usage.report import CELL, days, parse_days, scan_once

_AMOUNTS: Final = ("in", "out", "cache_read", "cache_write", "cost")


@dataclass(frozen=True, slots=True)
class Difference:
    """A sum that does not hold: its field, what the entries make, and what stands there."""

    day: str
    field: str
    expected: int
    found: int


@dataclass(frozen=True, slots=True)
class Verification:
    """The days looked at, how many entries they have, and every sum that differs, by day and field."""

    days: list[str]
    entries: int
    differences: list[Difference] = field(default_factory=list[Difference])

    @property
    def ok(self) -> bool:
        """True where every sum holds."""
        return not self.differences

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "ok": self.ok,
            "from": self.days[0],
            "to": self.days[-1],
            "entries": self.entries,
            "differences": [
                {"day": d.day, "field": d.field, "expected": d.expected, "found": d.found} for d in self.differences
            ],
        }


async def verify_usage(
    store: Store, from_day: date | str | None = None, to_day: date | str | None = None
) -> Verification:
    """Recompute the sums of some days from every single entry, and compare.

    Bookings may go on meanwhile: the sums are read before the entries and again behind them, and what the entries make
    must lie in between. Where nobody writes, that is equality.

    Raises
    ------
    BadRequest
        A day is none.
    StoreUnavailable
        Redis does not answer.
    """
    first, last = parse_days(from_day, to_day)
    looked = days(first, last)
    entries = 0
    differences: list[Difference] = []
    for day in looked:
        count, wrong = await _look(store, day)
        if wrong:
            # A presumed entry that was replaced meanwhile takes from the sums: what is wrong stays wrong.
            count, again = await _look(store, day)
            wrong = {name: values for name, values in again.items() if name in wrong}
        entries += count
        differences += [Difference(day, name, *values) for name, values in sorted(wrong.items())]
    return Verification(looked, entries, differences)


async def _look(store: Store, day: str) -> tuple[int, dict[str, tuple[int, int]]]:
    """The number of entries, and the sums that differ: expected and found."""
    before = await _sums(store, day)
    expected: Counter[str] = Counter()
    count = 0
    async for _, raw in scan_once(store, keys.ledger(day)):
        count += 1
        expected.update(sums_of(orjson.loads(raw)))
    after = await _sums(store, day)
    names = expected.keys() | before.keys() | after.keys()
    wrong = (name for name in names if not before[name] <= expected[name] <= after[name])
    return count, {name: (expected[name], after[name]) for name in wrong}


async def _sums(store: Store, day: str) -> Counter[str]:
    found: Counter[str] = Counter()
    async for name, raw in scan_once(store, keys.ledger_sums(day)):
        found[_name(name.decode())] = int(raw)
    return found


def sums_of(entry: dict[str, Any]) -> Counter[str]:
    """What an entry adds to each field of the sums; the same as the booking script, written once more to check it."""
    cell = _cell([entry[name] for name in CELL])
    sums = Counter({f"{metric}:{cell}": entry[metric] for metric in _AMOUNTS})
    sums[f"attempts:{cell}"] = 1
    sums[f"failed:{cell}"] = int(entry["outcome"] != "succeeded")
    for flag in ("estimated", "unpriced"):
        sums[f"{flag}:{cell}"] = int(entry.get(flag, False))
    sums[f"user_tokens:{entry['user']}"] = total_tokens(entry)
    sums[f"user_cost:{entry['user']}"] = entry["cost"]
    return sums


def _name(field_name: str) -> str:
    """A field with its cell written as :func:`_cell` does: Lua escapes some characters that Python does not."""
    metric, _, rest = field_name.partition(":")
    return field_name if metric.startswith("user_") else f"{metric}:{_cell(orjson.loads(rest))}"


def _cell(parts: list[str]) -> str:
    return orjson.dumps(parts).decode()
