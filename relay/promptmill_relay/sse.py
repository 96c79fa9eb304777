"""Server-Sent Events as bytes: events, the ``retry:`` line and comments.

Format: WHATWG HTML, "Server-sent events", section 9.2.5 and 9.2.6. No I/O here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

EventFrame = tuple[bytes | None, bytes, bytes]
"""``(id, type, data)``; an event without an id leaves the reader's last id as it is."""

KEEPALIVE: Final = b": keepalive\n\n"

_LINE_END: Final = re.compile(rb"\r\n|\r|\n")
# A reader ignores an id that holds NUL, and would then resume from the wrong place.
_FORBIDDEN_IN_FIELD: Final = b"\r\n\0"


def encode(frames: Sequence[EventFrame]) -> bytes:
    """The events one after the other, each whole, ready for one write."""
    if len(frames) == 1:
        return encode_frame(*frames[0])
    return b"".join([encode_frame(*frame) for frame in frames])


def encode_frame(event_id: bytes | None, kind: bytes, data: bytes) -> bytes:
    """One event. ``data`` passes as it is; our events are JSON on a single line."""
    if event_id is None:
        block, lines = b"event: %b\ndata: %b\n\n" % (kind, data), 3
    else:
        block, lines = b"id: %b\nevent: %b\ndata: %b\n\n" % (event_id, kind, data), 4
    if block.count(b"\n") != lines or b"\r" in block:
        return _encode_with_line_ends(event_id, kind, data)
    return block


def _encode_with_line_ends(event_id: bytes | None, kind: bytes, data: bytes) -> bytes:
    # A line end in a field would let data pose as another event. Never made by our writers.
    head = b"" if event_id is None else b"id: %b\n" % event_id.translate(None, _FORBIDDEN_IN_FIELD)
    head += b"event: %b\n" % kind.translate(None, _FORBIDDEN_IN_FIELD)
    return head + b"".join(b"data: %b\n" % line for line in _LINE_END.split(data)) + b"\n"


def retry(retry_ms: int) -> bytes:
    """How long a reader is to wait, in ms, before it reconnects."""
    return b"retry: %d\n\n" % retry_ms


def comment(text: str) -> bytes:
    """A line that every reader ignores."""
    return b": %b\n\n" % text.encode().translate(None, _FORBIDDEN_IN_FIELD)
