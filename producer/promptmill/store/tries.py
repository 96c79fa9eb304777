"""The tries of a job, as they stand in its record: what each is called, and how two lists of them become one.

A try is a JSON object; see ``Attempt`` in :mod:`promptmill.contract.job`. Beside what that shows it may have:

- ``claim``: the first eight characters of the token of the claim that it was made under;
- ``lost``: the claim was taken away while it ran, so its worker told of it late;
- ``text_bytes``: how much text it had told, where nobody knows more (its worker died);
- ``ended_ms``, ``day``: when it ended and on which UTC day that counts, where it has no ``finished_at``.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Final

Try = dict[str, Any]

CLAIM_CHARS: Final = 8


def is_presumed(try_: Try) -> bool:
    """Nobody told what it used: all that is known is how much text readers had got from it."""
    return "text_bytes" in try_ and not try_.get("usage")


def try_id(try_: Try) -> str:
    """``CLAIM:ATTEMPT``, or ``CLAIM:lost`` for the attempt that ran when its claim was taken away.

    A claim loses one attempt at most, so what was presumed of it and what its worker told later have the same id,
    whatever number each side gave it.
    """
    claim = str(try_.get("claim") or "")[:CLAIM_CHARS] or str(try_.get("epoch") or "-")
    return f"{claim}:lost" if try_.get("lost") or is_presumed(try_) else f"{claim}:{try_.get('attempt', 0)}"


def ended_at(try_: Try) -> datetime:
    """When it ended, in UTC. A dead worker's epoch begins with its claim: better than nothing."""
    finished = try_.get("finished_at")
    if finished:
        return datetime.fromisoformat(finished).astimezone(UTC)
    return datetime.fromtimestamp(float(try_.get("ended_ms") or try_.get("epoch") or 0) / 1000, UTC)


def day_of(try_: Try) -> str:
    """The UTC day that it counts on, ``YYYY-MM-DD``."""
    return try_.get("day") or ended_at(try_).date().isoformat()


def merge_tries(tries: Iterable[Try], late: Iterable[Try]) -> list[Try]:
    """Every try once. What a worker told wins over what was presumed of it, and counts on the same day as that did."""
    found: dict[str, Try] = {}
    for try_ in (*tries, *late):
        name = try_id(try_)
        old = found.get(name)
        if old is None:
            found[name] = try_
        elif is_presumed(old) and not is_presumed(try_):
            found[name] = {**try_, "day": day_of(old)}
    return list(found.values())
