"""What the feeder sees of a batch at one moment, and what it remembers of it between two."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from promptmill.batch.models import BATCH_END_STATES, BatchLine
from promptmill.batch.store import StoredHead
from promptmill.queues import API_FAMILY

FIELDS: Final = (
    *("state", "ending", "feeder", "deadline", "cost_nano", "lines", "fed", "sent", "linked", "freed"),
    *("succeeded", "failed", "cancelled", "expired"),
)


@dataclass(frozen=True, slots=True)
class View:
    """A batch at one moment; see the fields in :mod:`promptmill.batch.scripts`."""

    state: str
    ending: str
    """What a batch in the state ``cancelling`` is to become."""
    feeder: str
    deadline_ms: int
    cost_nano: int
    """What the lines that ended have cost, in billionths of a dollar."""
    lines: int
    fed: int
    sent: int
    linked: int
    freed: int
    done: int

    @classmethod
    def read(cls, row: list[bytes | None]) -> View | None:
        """From the values of :data:`FIELDS`; None where there is no batch."""
        state, ending, feeder, *numbers = row
        if state is None:
            return None
        deadline, cost, lines, fed, sent, linked, freed, *counts = (int(number or 0) for number in numbers)
        state, ending, feeder = (word.decode() if word else "" for word in (state, ending, feeder))
        return cls(state, ending, feeder, deadline, cost, lines, fed, sent, linked, freed, sum(counts))

    @property
    def over(self) -> bool:
        """True once the batch has ended."""
        return self.state in BATCH_END_STATES

    @property
    def feeds(self) -> bool:
        """Whether lines may be given to the queue."""
        return self.state in {"uploading", "running"}

    @property
    def left(self) -> int:
        """How many lines are there that were not fed yet."""
        return self.lines - self.fed

    @property
    def in_flight(self) -> int:
        """How many lines hold a place in the window: fed, not ended, and not waiting for an equal one."""
        # A cancellation counts lines that were never fed.
        return max(0, self.fed - self.done - self.linked)


@dataclass(slots=True)
class Known:
    """What is remembered of a batch. Losing it costs a few reads."""

    batch_id: str
    stored: StoredHead
    low: int = 0
    """Every line below is counted."""
    family: str = API_FAMILY
    """Whose workers the line that is next, or was last, is for."""
    chunk: tuple[int, list[BatchLine]] = field(default_factory=lambda: (-1, []))
    """The chunk that was read last, and its number."""
    rest_until: float = 0.0
    """On the loop's clock: nothing is fed before."""
    repaired_at: float = 0.0


def shares(window: int, demands: list[int]) -> list[int]:
    """Divide ``window`` places: everybody gets what they ask for, or as much as those who get most; one at least."""
    given = [0] * len(demands)
    order = sorted(range(len(demands)), key=lambda i: demands[i])
    for place, i in enumerate(order):
        fair = window // (len(order) - place)
        given[i] = max(1, min(demands[i], fair))
        window -= given[i]
    return given


def open_lines(counted: bytes, start: int, stop: int) -> list[int]:
    """The lines from ``start`` up to ``stop`` whose bit is not set. ``counted``: the bits from ``start``'s byte on."""
    base = start // 8
    found: list[int] = []
    for byte_place in range(base, -(-stop // 8)):
        byte = counted[byte_place - base] if byte_place - base < len(counted) else 0
        if byte != 0xFF:
            # As the store numbers them: the highest bit of a byte comes first.
            found += [byte_place * 8 + bit for bit in range(8) if not byte & (0x80 >> bit)]
    return [index for index in found if start <= index < stop]
