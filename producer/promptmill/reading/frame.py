"""One event on its way to a reader, still as the bytes that were stored."""

from __future__ import annotations

from typing import Final, NamedTuple

_TYPE_AT: Final = len(b'{"type":"')
END_TYPES: Final = frozenset({b"done", b"error", b"cancelled"})


class Frame(NamedTuple):
    """``id`` is ``<epoch>-<n>`` (None where the reader's last id must stay), ``data`` the event's JSON on one line."""

    id: bytes | None
    type: bytes
    data: bytes

    @property
    def ends(self) -> bool:
        """True for the last frame of a job."""
        return self.type in END_TYPES


def frame(event_id: bytes | None, data: bytes) -> Frame:
    """A frame from an event's JSON, whose type is its first field (see :mod:`promptmill.contract.events`)."""
    return Frame(event_id, data[_TYPE_AT : data.index(b'"', _TYPE_AT)], data)
