"""The ledger: what was submitted, what was done to the system, and every event that every reader saw.

One JSON object a line, only ever appended. Times are Unix time in ms. ``kind`` says what a line is:

============  =======================================================================================================
submitted     ``job``, ``key``, ``prompt``, ``asked`` (model or role), ``via``, ``tries`` (how often it was asked)
reads         ``reader``, ``job``, ``how``: a reader begins
event         ``reader``, ``job``, ``id``, and of the event what :func:`essence` leaves
left          ``reader``, ``why``: it went, or its server did, and comes back behind its last id
refused       ``reader``, ``status``: an answer that no reader of an existing job may get
fault         ``fault``, ``target``, and what it hit: for a kill ``held`` (pairs of job and epoch)
cancelled     ``job``, ``asked_ms``, ``state``: what the job was when the call returned
log           ``job``, ``events``: all events of the store's log, as pairs of id and event
exit          ``part``, ``code``, ``expected``, ``told``: a process ended, and whether it was told to stop for good
record        ``job`` and what the store holds of it at the end
found         ``what`` (a part of :class:`ops.chaos.facts.Facts`) and its ``value``: what was found out at the end
============  =======================================================================================================
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import orjson

Row = dict[str, Any]
_ESSENTIAL: Final = ("type", "text", "code", "phase", "message")


def now_ms() -> int:
    """The wall clock, which the store's epochs use too."""
    return time.time_ns() // 1_000_000


def essence(event: Row) -> Row:
    """What two parties must agree on about an event."""
    return {name: event[name] for name in _ESSENTIAL if event.get(name) is not None}


class Ledger:
    """Appends to a file. A context manager that closes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=1 << 16)

    def write(self, kind: str, **fields: Any) -> None:
        """Append one line; ``at`` is added."""
        self._file.write(orjson.dumps({"kind": kind, "at": now_ms(), **fields}) + b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read_ledger(path: Path) -> Iterator[Row]:
    """Every line, in order."""
    with path.open("rb") as file:
        for line in file:
            yield orjson.loads(line)
