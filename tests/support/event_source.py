"""A reader of Server-Sent Events by the letter of WHATWG HTML 9.2.6, fed with bytes cut anywhere. No I/O."""

from __future__ import annotations

import codecs
from dataclasses import dataclass, field

_UTF8 = codecs.getincrementaldecoder("utf-8")


@dataclass(frozen=True)
class Message:
    """A dispatched event; ``last_event_id`` is what a browser would send when it reconnects now."""

    type: str
    data: str
    last_event_id: str


@dataclass
class EventSourceParser:
    """What a browser keeps while it reads one stream."""

    last_event_id: str = ""
    retry_ms: int | None = None
    comments: list[str] = field(default_factory=list)
    _decoder: codecs.IncrementalDecoder = field(default_factory=lambda: _UTF8("replace"))
    _line: str = ""
    _after_cr: bool = False
    _type: str = ""
    _data: list[str] = field(default_factory=list)
    _id: str = ""

    def feed(self, chunk: bytes) -> list[Message]:
        """The events that ``chunk`` completes."""
        messages: list[Message] = []
        for char in self._decoder.decode(chunk):
            if char == "\n" and self._after_cr:
                self._after_cr = False
                continue
            self._after_cr = char == "\r"
            if char not in "\r\n":
                self._line += char
                continue
            line, self._line = self._line, ""
            if line:
                self._field(line)
            elif (message := self._dispatch()) is not None:
                messages.append(message)
        return messages

    def _field(self, line: str) -> None:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "":
            self.comments.append(value)
        elif name == "event":
            self._type = value
        elif name == "data":
            self._data.append(value)
        elif name == "id" and "\0" not in value:
            self._id = value
        elif name == "retry" and value.isascii() and value.isdigit():
            self.retry_ms = int(value)

    def _dispatch(self) -> Message | None:
        self.last_event_id = self._id
        data, kind = self._data, self._type
        self._data, self._type = [], ""
        return Message(kind or "message", "\n".join(data), self.last_event_id) if data else None
