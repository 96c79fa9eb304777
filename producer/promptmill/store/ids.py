"""Event ids: ``<epoch>-<n>``, compared as two numbers."""

from __future__ import annotations

import re
from typing import NamedTuple

from promptmill.errors import BadRequest

_FORM = re.compile(r"^([0-9]{1,19})-([0-9]{1,19})$", re.ASCII)


class EventId(NamedTuple):
    """The place of an event in its job's log. Tuples compare as the log does."""

    epoch: int
    n: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.n}"

    def __bytes__(self) -> bytes:
        return b"%d-%d" % self

    @classmethod
    def parse(cls, text: str) -> EventId:
        """From ``<epoch>-<n>``; raises ``bad_request`` for anything else."""
        match = _FORM.match(text)
        if not match:
            raise BadRequest(f"{text[:80]!r} is not an event id of the form <epoch>-<n>", field="last_event_id")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def read(cls, raw: bytes) -> EventId:
        """From what Redis holds; raises ValueError where that is not ours."""
        epoch, _, n = raw.partition(b"-")
        return cls(int(epoch), int(n))


START = EventId(0, 0)
