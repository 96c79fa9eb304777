"""One answer on its way: the streamed one, delta by delta, and the whole one after its time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

from tests.support.simulator import records
from tests.support.simulator.dialect import Dialect, Finish, Usage, dumps
from tests.support.simulator.records import RequestRecord
from tests.support.simulator.script import Plan, limited
from tests.support.simulator.ticker import Ticker

_BATCH = 64
_LAST_CHUNK = b"0\r\n\r\n"
# A comment is for nobody, and only a reader that takes \v, U+0085 or U+2028 for a line end sees data in it.
_COMMENT = ': \x0bdata: {"broken\u0085data: {"broken\u2028data: [DONE]\r\n'.encode()


class Line(Protocol):
    """The connection as an answer needs it."""

    paused: bool

    def write(self, data: bytes) -> None: ...

    def answered(self, outcome: str) -> None:
        """The answer ended on a message boundary: the connection can take the next request."""
        ...

    def close(self, outcome: str, *, reset: bool = False) -> None:
        """Close in mid-answer, with a FIN or, on `reset`, a RST."""
        ...


def frame(data: bytes) -> bytes:
    """`data` as one HTTP chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def planned(plan: Plan, dialect: Dialect) -> tuple[Sequence[str], Finish]:
    """The deltas of a healthy answer to this request, and how it ends."""
    ask = dialect.ask
    pieces = plan.pieces(ask.user_text)
    if ask.wants_json and plan.text is None and plan.chunks is None and not plan.echo and pieces:
        pieces = ['{"text": "' + pieces[0], *pieces[1:-1], (pieces[-1] if len(pieces) > 1 else "") + '"}']
    pieces, reason, sequence = limited(pieces, ask.max_tokens, ask.stop)
    if plan.fault == "refusal":
        pieces, reason, sequence = pieces[: plan.after or 0], "refusal", None
    return pieces, Finish(reason, sequence, raw=plan.finish, omit_usage=plan.omit_usage)


def reported(plan: Plan, dialect: Dialect, output_tokens: int) -> Usage:
    """The usage of an answer: the plan's numbers, else a quarter of the prompt's characters and the deltas sent."""
    given = {"input_tokens": max(1, dialect.ask.characters // 4), "output_tokens": output_tokens} | dict(
        plan.usage or {}
    )
    return Usage(**given)


class Answer:
    """A streamed answer. Driven by the ticker and by the connection (`resume`, `stop`)."""

    def __init__(self, line: Line, ticker: Ticker, dialect: Dialect, plan: Plan, record: RequestRecord) -> None:
        self._line = line
        self._ticker = ticker
        self._dialect = dialect
        self._plan = plan
        self._record = record
        self._pieces, self._finish = planned(plan, dialect)
        self._count = self._stop_at = len(self._pieces)
        after = min(self._count, self._count // 2 if plan.after is None else plan.after)
        self._broken_at = after if plan.fault == "malformed" else -1
        if plan.fault in {"stall", "cut", "reset", "truncated", "error_event"}:
            self._stop_at = after
        self._next = 0
        self._interval = 1 / plan.rate if plan.rate else 0.0
        self._sliced = plan.fault == "split" or plan.wire is not None
        self._slices: deque[bytes] = deque()
        self._closing = False
        self._over = False
        self._waiting = False
        self._stamps = plan.stamp and plan.text is None and plan.chunks is None and not plan.echo
        self._start = 0.0

    def begin(self, head: bytes) -> None:
        """Send the response head and what precedes the text, and start the clock."""
        usage = reported(self._plan, self._dialect, 0)
        self._record.input_tokens = usage.input_tokens
        now = time.monotonic()
        self._start = now + self._plan.first
        if self._sliced:
            self._line.write(head)
            self._send(self._dialect.prelude(usage))
        else:
            self._line.write(head + b"".join(map(frame, self._dialect.prelude(usage))))
        if self._plan.first or self._sliced:
            self._ticker.at(now if self._slices else self._start, self)
        else:
            self.tick(now)

    def stop(self) -> None:
        """The connection is gone: write no more."""
        self._over = True

    def resume(self) -> None:
        """The reader caught up."""
        if self._waiting:
            self._waiting = False
            self._ticker.at(time.monotonic(), self)

    def tick(self, now: float) -> None:
        """Write what is due."""
        if self._over:
            return
        if self._line.paused:
            self._waiting = True
            return
        if self._slices:
            self._line.write(self._slices.popleft())
            # One slice a tick: slices written together would reach the reader in one piece.
            if self._slices:
                self._ticker.at(now + 0.001, self)
                return
        if self._closing:
            self._end()
            return
        events = self._due(now)
        if self._next >= self._stop_at:
            self._closing = True
            events += self._closing_events()
        if events:
            self._send(events)
        if self._slices:
            self._ticker.at(now + 0.001, self)
        elif self._closing:
            self._end()
        else:
            self._ticker.at(self._start + self._next * self._interval, self)

    def _due(self, now: float) -> list[bytes]:
        """The events of the deltas whose time has come, at most one batch."""
        prefix, suffix, interval = self._dialect.prefix, self._dialect.suffix, self._interval
        events: list[bytes] = []
        i, end = self._next, min(self._stop_at, self._next + _BATCH)
        while i < end and self._start + i * interval <= now:
            if i == self._broken_at:
                events.append(self._dialect.malformed())
            if self._stamps:
                events.append(b'%b"%d "%b' % (prefix, time.monotonic_ns(), suffix))
            else:
                events.append(prefix + dumps(self._pieces[i]) + suffix)
            i += 1
        self._next = self._record.tokens_written = self._record.output_tokens = i
        return events

    def _send(self, events: list[bytes]) -> None:
        if not self._sliced:
            self._line.write(b"".join(map(frame, events)) if len(events) > 1 else frame(events[0]))
            return
        for event in events:
            data = event
            if self._plan.fault == "split":
                data = _COMMENT + event.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
            self._slices.extend(map(frame, sliced(data, self._plan.wire)))

    def _closing_events(self) -> list[bytes]:
        fault = self._plan.fault
        if fault == "error_event":
            return self._dialect.error_event(self._plan.message, self._plan.done)
        if fault in {"stall", "cut", "reset", "truncated"}:
            return []
        events = [self._dialect.malformed()] if self._broken_at == self._count else []
        self._finish.usage = reported(self._plan, self._dialect, self._count)
        self._record.output_tokens = self._finish.usage.output_tokens
        return [*events, *self._dialect.ending(self._finish)]

    def _end(self) -> None:
        fault = self._plan.fault
        if fault == "stall":
            return
        self._over = True
        if fault in {"cut", "reset"}:
            self._line.close(records.FAULTED, reset=fault == "reset")
            return
        self._line.write(_LAST_CHUNK)
        broken = fault in {"truncated", "error_event", "malformed", "refusal", "empty"}
        self._line.answered(records.FAULTED if broken else records.FINISHED)


class WholeAnswer:
    """An answer that is not streamed: nothing until the last token's time, then all of it."""

    def __init__(self, line: Line, ticker: Ticker, dialect: Dialect, plan: Plan, record: RequestRecord) -> None:
        self._line = line
        self._ticker = ticker
        self._dialect = dialect
        self._plan = plan
        self._record = record
        self._pieces, self._finish = planned(plan, dialect)
        self._over = False

    def begin(self, head: bytes) -> None:
        """`head` is the response head up to, and without, `Content-Length`."""
        self._head = head
        plan = self._plan
        self._finish.usage = reported(plan, self._dialect, len(self._pieces))
        self._record.input_tokens = self._finish.usage.input_tokens
        wait = plan.first + (len(self._pieces) / plan.rate if plan.rate else 0.0)
        self._ticker.at(time.monotonic() + wait, self)

    def stop(self) -> None:
        self._over = True

    def resume(self) -> None:
        return

    def tick(self, now: float) -> None:
        """Send the answer, or as much of it as its fault leaves."""
        if self._over:
            return
        stamp = f"{time.monotonic_ns()} "
        text = stamp * len(self._pieces) if self._plan.stamp else "".join(self._pieces)
        body = self._dialect.whole(text, self._finish)
        fault = self._plan.fault
        sent = body
        if fault in {"stall", "cut", "reset"}:
            sent = body[: len(body) // 2]
        elif fault in {"malformed", "truncated"}:
            sent = body = body[: len(body) // 2]
        self._record.tokens_written = len(self._pieces)
        self._record.output_tokens = self._finish.usage.output_tokens
        self._line.write(b"%bContent-Length: %d\r\n\r\n%b" % (self._head, len(body), sent))
        if fault == "stall":
            return
        self._over = True
        if fault in {"cut", "reset"}:
            self._line.close(records.FAULTED, reset=fault == "reset")
        else:
            broken = fault in {"malformed", "truncated", "refusal", "empty"}
            self._line.answered(records.FAULTED if broken else records.FINISHED)


def sliced(data: bytes, width: int | None) -> list[bytes]:
    """`data` cut every `width` bytes, or at the places where a careless reader breaks.

    These are: inside each multi-byte character, between CR and LF, inside the word `data`, and before a colon.
    """
    if width is not None:
        return [data[i : i + width] for i in range(0, len(data), width)]
    cuts = [
        i
        for i in range(1, len(data))
        if 0x80 <= data[i] < 0xC0 or data[i - 1 : i + 1] == b"\r\n" or data[i - 2 : i + 2] == b"data"
    ]
    edges = [0, *cuts, len(data)]
    return [data[a:b] for a, b in pairwise(edges)]
