"""What must hold for any bytes: of the framers, and of the decoders that read what providers and programs write.

Plain functions, called by the tests with Hypothesis's bytes and by ``python -m ops.fuzz`` with those of a fuzzer that
follows the code's branches. Each raises where something does not hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Final

from tests.support.event_source import EventSourceParser

from promptmill.contract import Usage
from promptmill.errors import CODES, BackendError
from promptmill.rates import RateInfo
from promptmill_relay import sse as relay_sse
from promptmill_workers.backends.anthropic_stream import MessagesDecoder
from promptmill_workers.backends.base import Finished, Item, StartedAnew, TextDelta, UsageUpdate
from promptmill_workers.backends.claude_stream import ClaudeDecoder
from promptmill_workers.backends.decoding import AnswerDecoder
from promptmill_workers.backends.gemini_stream import GeminiDecoder, GeminiTextDecoder
from promptmill_workers.backends.openai_stream import ChatDecoder
from promptmill_workers.backends.program_lines import LineDecoder
from promptmill_workers.backends.sse import SseEvent, SseFramer, SseTooLongError
from promptmill_workers.programs.lines import LineFramer, LineTooLong

LIMIT_BYTES: Final = 64
"""Small, so that a fuzzer's short inputs reach it."""
_BOM: Final = b"\xef\xbb\xbf"


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    """``data`` in pieces."""
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


def _expect(held: bool, message: str) -> None:
    # Not an assert statement: those are left out where Python runs with -O.
    if not held:
        raise AssertionError(message)


def check_sse(data: bytes, places: Sequence[int]) -> None:
    """Where the bytes are cut makes no difference, and the events are those of another reader's."""
    framer, whole = SseFramer(), SseFramer()
    completed = [event for piece in cut(data, places) for event in framer.push(piece)]
    _expect(completed == whole.push(data), "events differ by where the bytes are cut")
    _expect(framer.retry_ms == whole.retry_ms, "retry differs")
    _expect(framer.flush() == whole.flush(), "the last event differs")
    if _BOM not in data:
        seen = EventSourceParser().feed(data)
        texts = [event.data.decode("utf-8", "replace") for event in completed]
        _expect(texts == [message.data for message in seen], "another reader sees other data")
        names = [event.event or "message" for event in completed]
        _expect(names == [message.type for message in seen], "another reader sees other types")
    _check_bounded(data, places)


def _check_bounded(data: bytes, places: Sequence[int]) -> None:
    framer = SseFramer(LIMIT_BYTES)
    try:
        for piece in cut(data, places):
            for event in framer.push(piece):
                _expect(len(event.data) <= LIMIT_BYTES, "an event over the limit")
        framer.flush()
    except SseTooLongError:
        _expect(len(data) > LIMIT_BYTES, "too long, but it is not")


def check_lines(data: bytes, places: Sequence[int]) -> None:
    """Lines are what splits at LF; a line is too long exactly where it is over the bound."""
    framer = LineFramer(LIMIT_BYTES)
    lines: list[bytes] = []
    try:
        for piece in cut(data, places):
            lines += framer.push(piece)
    except LineTooLong:
        _expect(max(map(len, data.split(b"\n"))) > LIMIT_BYTES, "too long, but no line is")
        _expect(framer.flush() == b"", "something of a line that is too long is kept")
        return
    _expect([*lines, framer.flush()] == data.split(b"\n"), "other lines")


def check_relay(data: bytes, places: Sequence[int]) -> None:
    """Whatever stands in an event's fields, a reader sees that event and no other."""
    event_id, kind, text = [*cut(data, places[:2]), b"", b""][:3]
    block = relay_sse.encode([(event_id, kind, text), (b"9-9", b"done", b"{}")])
    for seen in (EventSourceParser().feed(block), _messages(block)):
        _expect(len(seen) == 2, "one event posed as several, or as none")
        _expect(seen[1] == ("done", "{}") or getattr(seen[1], "data", "") == "{}", "the next event was changed")


def _messages(block: bytes) -> list[tuple[str, str]]:
    found: list[SseEvent] = SseFramer().push(block)
    return [(event.event or "message", event.data.decode("utf-8", "replace")) for event in found]


def _check_items(items: Sequence[Item], failure: BackendError | None) -> None:
    """An answer ends with ``Finished`` and only so, or with a failure whose code is known; all text can be written."""
    for item in items:
        if isinstance(item, TextDelta):
            _expect(isinstance(item.text, str) and item.text != "", "a delta without text")
            item.text.encode()
        elif isinstance(item, UsageUpdate):
            Usage.model_validate(item.usage.model_dump())
        elif isinstance(item, Finished):
            _expect(item is items[-1], "something follows the end")
            _expect(isinstance(item.reason, str), "a reason that is no text")
            _expect(isinstance(item.provider_request_id, str | None), "a request id that is no text")
        else:
            _expect(isinstance(item, RateInfo | StartedAnew), f"an item of another kind: {item!r}")
    if failure is None:
        _expect(bool(items) and isinstance(items[-1], Finished), "neither an end nor a failure")
    else:
        _expect(failure.code in CODES, f"an unknown code: {failure.code}")
        _expect(isinstance(failure.provider_request_id, str | None), "a request id that is no text")
        _expect(not any(isinstance(item, Finished) for item in items), "an end and a failure")


def _stream(make: Callable[[], AnswerDecoder]) -> Callable[[bytes, Sequence[int]], None]:
    def check(data: bytes, places: Sequence[int]) -> None:
        texts: list[str] = []
        for pieces in (cut(data, places), [data]):
            decoder = make()
            items = [item for piece in pieces for item in decoder.push(piece)] + decoder.end()
            _check_items(items, decoder.failure)
            texts.append("".join(item.text for item in items if isinstance(item, TextDelta)))
        _expect(texts[0] == texts[1], "the text differs by where the bytes are cut")

    return check


def _program(make: Callable[[], LineDecoder]) -> Callable[[bytes, Sequence[int]], None]:
    def check(data: bytes, places: Sequence[int]) -> None:
        *lines, stderr = data.split(b"\n")
        decoder = make()
        items = [item for line in lines for item in decoder.line(line)]
        items += decoder.exited((None, 0, 1, 55, -9)[sum(places) % 5], stderr)
        _check_items(items, decoder.failure)

    return check


TARGETS: Final[dict[str, Callable[[bytes, Sequence[int]], None]]] = {
    "sse": check_sse,
    "lines": check_lines,
    "relay": check_relay,
    "openai": _stream(lambda: ChatDecoder(secret="a-secret", thinking_in_total=True)),
    "anthropic": _stream(lambda: MessagesDecoder(secret="a-secret")),
    "claude": _program(lambda: ClaudeDecoder(secret="a-secret", renewable=True)),
    "gemini": _program(lambda: GeminiDecoder(secret="a-secret", max_tokens=3)),
    "gemini-text": _program(lambda: GeminiTextDecoder(secret="a-secret")),
}
"""By the name that the command line knows; each takes bytes and where to cut them."""

SEEDS: Final[dict[str, Sequence[bytes]]] = {
    "sse": (b"event: a\nid: 1\ndata: x\ndata:y\n\n: c\r\nretry: 5\r\rdata\n\n", b"\xef\xbb\xbfdata: \xe2\x80\xa8\n\n"),
    "lines": (b"one\ntwo\r\n\n" + b"x" * 70 + b"\nrest",),
    "relay": (b'7-1token{"type":"token"}', b"7-1\n\nevent: done\ndata: {}\n\n"),
    "openai": (
        b'data: {"id":"c","choices":[{"delta":{"content":"hi"},"finish_reason":null}]}\n\n'
        b'data: {"choices":[{"delta":{"refusal":"no"},"finish_reason":"stop"}]}\n\n'
        b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2,"total_tokens":9,'
        b'"prompt_tokens_details":{"cached_tokens":1}}}\n\ndata: [DONE]\n\n',
        b'{"id":"c","choices":[{"message":{"content":[{"text":"\\ud83d"}]},"finish_reason":"length"}],"usage":{}}',
        b'data: {"error":{"code":429,"message":"slow","details":[{"retryDelay":"3s"}]}}\n\n',
    ),
    "anthropic": (
        b'event: message_start\ndata: {"type":"message_start","message":{"id":"m","usage":{"input_tokens":3}}}\n\n'
        b'data: {"type":"content_block_start","content_block":{"type":"text","text":""}}\n\n'
        b'data: {"type":"content_block_delta","delta":{"type":"text_delta","text":"hi"}}\n\n'
        b'data: {"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":2}}\n\n'
        b'data: {"type":"message_stop"}\n\n',
        b'data: {"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}\n\n',
        b'{"type":"message","id":"m","content":[{"type":"text","text":"hi"}],"stop_reason":"max_tokens","usage":{}}',
    ),
    "claude": (
        b'{"type":"system","subtype":"init"}\n'
        b'{"type":"stream_event","event":{"type":"message_start"}}\n'
        b'{"type":"stream_event","event":{"type":"content_block_delta","delta":{"type":"text_delta","text":"hi"}}}\n'
        b'{"type":"assistant","message":{"content":[{"type":"text","text":"hi"}]},"request_id":"r"}\n'
        b'{"type":"rate_limit_event","rate_limit_info":{"status":"rejected","resetsAt":1}}\n'
        b'{"type":"result","subtype":"success","is_error":false,"result":"hi","stop_reason":"end_turn",'
        b'"session_id":"s","usage":{"input_tokens":1,"output_tokens":3},"total_cost_usd":0.1}\nnotes on standard error',
        b'{"type":"result","subtype":"error","is_error":true,"result":"API Error: 429 {\\"error\\":{}}"}\n',
    ),
    "gemini": (
        b'{"type":"init","session_id":"s"}\n{"type":"message","role":"assistant","content":"hi","delta":true}\n'
        b'{"type":"result","status":"success","stats":{"input_tokens":1,"output_tokens":3,"total_tokens":9}}\n',
        b'{"type":"error","severity":"error","message":"[API Error: {\\"error\\":{\\"code\\":429}}]"}\n'
        b'{"type":"result","status":"error","error":{"message":"quota"}}\nstatus: 429',
    ),
    "gemini-text": (b"Loaded cached credentials.\nhello\n\nworld\n[API Error: quota]", b"\nstatus: 401"),
}
"""Where a fuzzer begins."""
