"""Server-sent events out of bytes, however they were cut; no I/O.

Format: https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation.
A line ends at LF, CR or CRLF and nowhere else: ``str.splitlines()`` also splits at U+2028, U+0085, ``\\v`` and ``\\f``,
which providers send unescaped inside JSON strings.

One deviation: what stands unfinished at the end of the stream is not thrown away but returned by ``flush``, because
some servers leave out the last blank line. A caller that needs to know whether the stream was cut must look for its
protocol's own end.
"""

from __future__ import annotations

from typing import Final, NamedTuple

DEFAULT_LIMIT_BYTES: Final = 8 * 1024 * 1024
_BOM: Final = b"\xef\xbb\xbf"
_RETRY_DIGITS: Final = 12


class SseEvent(NamedTuple):
    """One event. ``data`` is as it was sent (UTF-8 by the specification, not checked), its lines joined with LF."""

    data: bytes
    event: str | None = None
    """The ``event`` field, or None where there was none (readers call that ``message``)."""
    id: str | None = None
    """The last ``id`` seen in the stream up to this event, or None."""


class SseTooLongError(ValueError):
    """A line, or the data of one event, is longer than the framer's limit."""


class SseFramer:
    """Push bytes, get the events that they complete.

    ``retry_ms`` is the last ``retry`` field. Lines and events are bounded by ``limit_bytes``, so a provider that never
    ends a line cannot fill the memory; time is linear in what is pushed, also for a line that comes byte by byte.
    """

    __slots__ = (
        "_after_cr",
        "_data",
        "_data_size",
        "_event",
        "_id",
        "_limit",
        "_line",
        "_line_size",
        "_start",
        "retry_ms",
    )

    def __init__(self, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> None:
        self._limit = limit_bytes
        self._line: list[bytes] = []  # the unfinished line, in the pieces that came
        self._line_size = 0
        self._data: list[bytes] = []  # the unfinished event's data lines
        self._data_size = 0
        self._event: str | None = None
        self._id: str | None = None
        self._after_cr = False
        self._start: bytes | None = b""  # what may be a byte order mark; None once that is settled
        self.retry_ms: int | None = None

    def push(self, chunk: bytes) -> list[SseEvent]:
        """The events that ``chunk`` completes, in order; may be empty.

        Raises
        ------
        SseTooLongError
            A line or an event is over the limit. The framer is of no use afterwards.
        """
        # The token path: one whole event in the chunk, and nothing carried over from the one before.
        if (
            chunk.find(b"\n") == len(chunk) - 2
            and chunk.startswith(b"data: ")
            and chunk.endswith(b"\n\n")
            and not (self._line or self._data or self._after_cr)
            and self._start is None
            and b"\r" not in chunk
            and len(chunk) <= self._limit
        ):
            event, self._event = self._event, None
            return [SseEvent(chunk[6:-2], event, self._id)]
        if self._start is not None:
            chunk = self._skip_bom(chunk)
        return self._lines(chunk) if chunk else []

    def flush(self) -> list[SseEvent]:
        """At the end of the stream: the event that lacks its blank line, if it has data. The framer is then spent."""
        rest = b"".join((*self._line, self._start or b""))
        self._line.clear()
        self._start = None
        if rest:
            self._field(rest)
        events: list[SseEvent] = []
        self._dispatch(events)
        return events

    def _skip_bom(self, chunk: bytes) -> bytes:
        chunk = (self._start or b"") + chunk
        if len(chunk) < len(_BOM) and _BOM.startswith(chunk):
            self._start = chunk
            return b""
        self._start = None
        return chunk.removeprefix(_BOM)

    def _lines(self, chunk: bytes) -> list[SseEvent]:
        if self._after_cr:
            # The CR before this chunk has ended its line already; this LF is the other half of a CRLF.
            self._after_cr = False
            chunk = chunk.removeprefix(b"\n")
        if b"\r" in chunk:
            self._after_cr = chunk.endswith(b"\r")
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        lines = chunk.split(b"\n")
        rest = lines.pop()
        events: list[SseEvent] = []
        if lines and self._line:
            lines[0] = b"".join((*self._line, lines[0]))
            self._line.clear()
            self._line_size = 0
        for line in lines:
            if line:
                self._field(line)
            else:
                self._dispatch(events)
        if rest:
            self._line.append(rest)
            self._line_size += len(rest)
            self._check(self._line_size)
        return events

    def _field(self, line: bytes) -> None:
        self._check(len(line))
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
            self._data_size += len(value) + 1
            self._check(self._data_size - 1)
        elif name == b"event":
            self._event = value.decode("utf-8", "replace") or None
        elif name == b"id" and b"\0" not in value:
            self._id = value.decode("utf-8", "replace")
        elif name == b"retry" and value.isdigit() and len(value) <= _RETRY_DIGITS:
            self.retry_ms = int(value)

    def _dispatch(self, events: list[SseEvent]) -> None:
        if self._data:
            data = self._data[0] if len(self._data) == 1 else b"\n".join(self._data)
            events.append(SseEvent(data, self._event, self._id))
            self._data.clear()
            self._data_size = 0
        self._event = None

    def _check(self, size: int) -> None:
        if size > self._limit:
            raise SseTooLongError(f"a line or an event of the stream is over {self._limit} bytes")
