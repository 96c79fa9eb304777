"""Reading the sums: what was used in some days, grouped as asked."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final

import orjson

from promptmill import keys
from promptmill.errors import BadRequest
from promptmill.store import Store
from promptmill.store.connection import store_errors
from promptmill.usage.entries import NANO

DAYS_MAX: Final = 400
CELL: Final = ("user", "model", "backend", "role")
"""What a sum is of, in the order in which the ledger's fields name it."""
DIMENSIONS: Final = (*CELL, "day")
DEFAULT_BY: Final = ("user", "model")
METRICS: Final = {
    "attempts": "attempts",
    "failed": "failed",
    "in": "input_tokens",
    "out": "output_tokens",
    "cache_read": "cache_read_tokens",
    "cache_write": "cache_write_tokens",
    "estimated": "estimated",
    "unpriced": "unpriced",
    "cost": "cost_nano_usd",
}
"""The ledger's name of each sum, and the reports'."""
_DAY: Final = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)
_PAGE: Final = 1000

Cell = tuple[str, ...]


@dataclass(slots=True)
class Sums:
    """Sums over attempts. ``estimated`` and ``unpriced`` count attempts; the cost of the latter is not in here."""

    attempts: int = 0
    failed: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    estimated: int = 0
    unpriced: int = 0
    cost_nano_usd: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of all four kinds."""
        return self.input_tokens + self.output_tokens + self.cache_read_tokens + self.cache_write_tokens

    @property
    def cost_usd(self) -> float:
        """Dollars."""
        return self.cost_nano_usd / NANO

    def to_dict(self) -> dict[str, Any]:
        """As JSON, with the cost in dollars."""
        fields = asdict(self)
        del fields["cost_nano_usd"]
        return {**fields, "cost_usd": self.cost_usd}


@dataclass(frozen=True, slots=True)
class UsageRow:
    """The sums of one group: ``group`` holds what it was grouped by, such as ``{"user": "ann", "model": "sonnet"}``.

    A model, backend or role is empty where the attempt had none, or nobody knows it.
    """

    group: dict[str, str]
    sums: Sums

    def to_dict(self) -> dict[str, Any]:
        """As flat JSON."""
        return {**self.group, **self.sums.to_dict()}


@dataclass(frozen=True, slots=True)
class UsageReport:
    """What was used from one UTC day through another; ``rows`` by day, then by cost and tokens, most first."""

    from_day: date
    to_day: date
    by: tuple[str, ...]
    rows: list[UsageRow]
    total: Sums = field(default_factory=Sums)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "from": self.from_day.isoformat(),
            "to": self.to_day.isoformat(),
            "by": list(self.by),
            "rows": [row.to_dict() for row in self.rows],
            "total": self.total.to_dict(),
        }


def today() -> date:
    """The UTC day that it is."""
    return datetime.now(UTC).date()


def parse_day(value: date | str | None, field_name: str) -> date | None:
    """A day: a date, ``YYYY-MM-DD``, ``today`` or ``yesterday``. Raises ``bad_request``."""
    if value is None or (isinstance(value, date) and not isinstance(value, datetime)):
        return value
    text = str(value)
    if text in {"today", "yesterday"}:
        return today() - timedelta(days=text == "yesterday")
    if _DAY.fullmatch(text):
        try:
            return date.fromisoformat(text)
        except ValueError:
            pass  # a month or day that there is not; the message is the same
    raise BadRequest(
        f"{field_name}: {text[:40]!r} is not a day such as 2026-01-31, today or yesterday", field=field_name
    )


def parse_days(from_day: date | str | None, to_day: date | str | None) -> tuple[date, date]:
    """First and last day; without either today, without one the other. Raises ``bad_request``."""
    last = parse_day(to_day, "to")
    first = parse_day(from_day, "from")
    if last is None:
        last = max(today(), first or today())
    first = last if first is None else first
    if first > last:
        raise BadRequest(f"from: {first} is after {last}", field="from")
    if (last - first).days >= DAYS_MAX:
        raise BadRequest(f"from: more than {DAYS_MAX} days", field="from", limit=DAYS_MAX)
    return first, last


def parse_by(value: str | Iterable[str] | None) -> tuple[str, ...]:
    """What to group by, such as ``user,day``; user and model where nothing is said. Raises ``bad_request``."""
    if value is None:
        return DEFAULT_BY
    names = [part.strip() for part in value.split(",")] if isinstance(value, str) else list(value)
    names = [name for name in names if name]
    for name in names:
        if name not in DIMENSIONS:
            raise BadRequest(f"by: {name[:40]!r} is none of {', '.join(DIMENSIONS)}", field="by")
    return tuple(dict.fromkeys(names))


def days(first: date, last: date) -> list[str]:
    """Every day from ``first`` through ``last``."""
    return [(first + timedelta(days=n)).isoformat() for n in range((last - first).days + 1)]


async def scan_hash(store: Store, key: str) -> AsyncGenerator[tuple[bytes, bytes]]:
    """A hash's fields and values, each at least once, without holding the server up."""
    cursor = 0
    while True:
        with store_errors(store.address):
            reply: tuple[bytes, list[bytes]] = await store.wire.call("HSCAN", key, cursor, "COUNT", _PAGE)
        cursor = int(reply[0])
        for pair in zip(reply[1][::2], reply[1][1::2], strict=True):
            yield pair
        if cursor == 0:
            return


def read_field(name: bytes) -> tuple[str, Cell] | None:
    """The metric and the cell of a field of the sums; None for a user's own sum."""
    metric, _, cell = name.decode().partition(":")
    return (metric, tuple(orjson.loads(cell))) if metric in METRICS else None


async def read_usage(
    store: Store,
    from_day: date | str | None = None,
    to_day: date | str | None = None,
    by: str | Iterable[str] | None = None,
    user: str | None = None,
) -> UsageReport:
    """What was used, grouped. Attempts count on the UTC day on which they ended, and appear within a second of it.

    Raises
    ------
    BadRequest
        A day or a dimension is none; names the field.
    StoreUnavailable
        Redis does not answer.
    """
    first, last = parse_days(from_day, to_day)
    group_by = parse_by(by)
    groups: dict[tuple[str, ...], Sums] = defaultdict(Sums)
    total = Sums()
    for day in days(first, last):
        async for name, raw in scan_once(store, keys.ledger_sums(day)):
            found = read_field(name)
            if found is None or (user is not None and found[1][0] != user):
                continue
            metric, cell = found
            at: Mapping[str, str] = {**dict(zip(CELL, cell, strict=True)), "day": day}
            for sums in (groups[tuple(at[name] for name in group_by)], total):
                attribute = METRICS[metric]
                setattr(sums, attribute, getattr(sums, attribute) + int(raw))
    rows = [UsageRow(dict(zip(group_by, group, strict=True)), sums) for group, sums in groups.items()]
    rows = sorted((row for row in rows if row.sums.attempts), key=_order)
    return UsageReport(first, last, group_by, rows, total)


async def scan_once(store: Store, key: str) -> AsyncGenerator[tuple[bytes, bytes]]:
    """As :func:`scan_hash`, each field once: a scan repeats some where the hash grows meanwhile."""
    seen: set[bytes] = set()
    async for name, value in scan_hash(store, key):
        if name not in seen:
            seen.add(name)
            yield name, value


def _order(row: UsageRow) -> tuple[Any, ...]:
    return row.group.get("day", ""), -row.sums.cost_nano_usd, -row.sums.tokens, tuple(row.group.values())
