"""What the simulator remembers of each request, and the sums over them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

OPEN = "open"
FINISHED = "finished"
DISCONNECTED = "client_disconnected"
FAULTED = "faulted"

_SECRET_HEADERS = ("authorization", "x-api-key", "x-goog-api-key")
_KEPT = 20_000


@dataclass(slots=True)
class RequestRecord:
    """One request to a provider path.

    `outcome` is `open` until the answer ended: `finished` (well), `faulted` (as its plan's `fault` wanted, or refused
    by a protocol check), `client_disconnected` (the client closed first, also during a `hang` or `stall`).
    `tokens_written` counts deltas given to the socket; `input_tokens` and `output_tokens` are what a provider would
    bill. `started_at` is Unix time; `started_s` and `ended_s` are `time.monotonic()`.
    """

    number: int
    method: str
    path: str
    protocol: str
    headers: dict[str, str]
    body: Any = None
    model: str | None = None
    stream: bool = False
    images: int = 0
    fault: str | None = None
    status: int | None = None
    outcome: str = OPEN
    tokens_written: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    started_at: float = field(default_factory=time.time)
    started_s: float = field(default_factory=time.monotonic)
    ended_s: float | None = None

    @property
    def open(self) -> bool:
        """Whether the answer is still under way and the client still there."""
        return self.outcome == OPEN

    def as_json(self, *, redact: bool = False) -> dict[str, Any]:
        """All fields and `open`; with `redact` the headers that carry keys read `***`."""
        values = {name: getattr(self, name) for name in self.__slots__}
        if redact:
            values["headers"] = {k: "***" if k in _SECRET_HEADERS else v for k, v in self.headers.items()}
        return values | {"open": self.open}


class Ledger:
    """All records since the last reset (the newest 20,000 ended ones; sums count all)."""

    def __init__(self) -> None:
        self._ended: deque[RequestRecord] = deque(maxlen=_KEPT)
        self._open: dict[int, RequestRecord] = {}
        self._sums: dict[tuple[str, str], list[int]] = {}
        self._count = 0
        self._number = 0

    def start(self, method: str, path: str, protocol: str, headers: Mapping[str, str]) -> RequestRecord:
        self._number += 1
        self._count += 1
        record = RequestRecord(self._number, method, path, protocol, dict(headers))
        self._open[record.number] = record
        return record

    def end(self, record: RequestRecord, outcome: str) -> None:
        """Close a record with its outcome; the first call counts."""
        if self._open.pop(record.number, None) is None:
            return
        record.outcome = outcome
        record.ended_s = time.monotonic()
        self._ended.append(record)
        self._add(self._sums, record)

    def reset(self) -> None:
        """Forget what ended. Open requests stay listed: they still hold a connection."""
        self._ended.clear()
        self._sums.clear()
        self._count = len(self._open)

    @property
    def records(self) -> list[RequestRecord]:
        """In the order of arrival."""
        return sorted([*self._ended, *self._open.values()], key=lambda record: record.number)

    @property
    def open_count(self) -> int:
        return len(self._open)

    def stats(self) -> dict[str, Any]:
        """`requests`, `open_requests`, `tokens_written`; `by_outcome` and `by_model` with the tokens billed."""
        sums = {key: list(values) for key, values in self._sums.items()}
        for record in self._open.values():
            self._add(sums, record)
        by_outcome: dict[str, dict[str, int]] = {}
        by_model: dict[str, dict[str, int]] = {}
        for (outcome, model), values in sums.items():
            for table, key in ((by_outcome, outcome), (by_model, model)):
                row = table.setdefault(key, dict.fromkeys(_COLUMNS, 0))
                for column, value in zip(_COLUMNS, values, strict=True):
                    row[column] += value
        return {
            "requests": self._count,
            "open_requests": len(self._open),
            "tokens_written": sum(values[1] for values in sums.values()),
            "by_outcome": by_outcome,
            "by_model": by_model,
        }

    @staticmethod
    def _add(sums: dict[tuple[str, str], list[int]], record: RequestRecord) -> None:
        row = sums.setdefault((record.outcome, record.model or ""), [0, 0, 0, 0])
        row[0] += 1
        row[1] += record.tokens_written
        row[2] += record.input_tokens
        row[3] += record.output_tokens


_COLUMNS = ("requests", "tokens_written", "billed_input_tokens", "billed_output_tokens")
