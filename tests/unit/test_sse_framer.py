"""The SSE framer against a naive reference, for any bytes cut anywhere."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from promptmill_workers.backends.sse import SseEvent, SseFramer, SseTooLongError


def reference(stream: bytes) -> list[SseEvent]:
    """The specification, word for word, on the whole stream; the unfinished event at the end counts, as in `flush`."""
    stream = stream.removeprefix(b"\xef\xbb\xbf")
    events: list[SseEvent] = []
    data: list[bytes] = []
    name = last_id = None
    for line in [*re.split(rb"\r\n|\n|\r", stream), b""]:
        field, _, value = line.partition(b":")
        value = value[1:] if value[:1] == b" " else value
        if not line:
            if data:
                events.append(SseEvent(b"\n".join(data), name, last_id))
            data, name = [], None
        elif field == b"data":
            data.append(value)
        elif field == b"event":
            name = value.decode("utf-8", "replace") or None
        elif field == b"id" and b"\0" not in value:
            last_id = value.decode("utf-8", "replace")
    return events


def framed(chunks: list[bytes]) -> list[SseEvent]:
    framer = SseFramer()
    return [event for chunk in chunks for event in framer.push(chunk)] + framer.flush()


def push_in_steps(framer: SseFramer, stream: bytes, size: int) -> list[SseEvent]:
    return [event for start in range(0, len(stream), size) for event in framer.push(stream[start : start + size])]


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(stream) + 1) for place in places), len(stream)]
    return [stream[a:b] for a, b in pairwise(edges)]


PIECES = st.sampled_from(
    [
        b"data: ",
        b"data:",
        b"data",
        b"data: [DONE]",
        b"event: ",
        b"event: error",
        b"id: 1",
        b"id",
        b"id: \0",
        b"retry: 10",
        b": comment",
        b":",
        b" ",
        b"\n",
        b"\r",
        b"\r\n",
        b"\n\n",
        b"\r\r",
        b"\r\n\r\n",
        b"\xef\xbb\xbf",
        b'{"text": "\\ud83d"}',
        "\u2028".encode(),
        "\u2029".encode(),
        "\u0085".encode(),
        b"\x0b",
        b"\x0c",
        b"\x1c",
        "日本👩".encode(),
        b"\xff",
        b"\xe6\x97",
    ]
)
STREAMS = st.lists(PIECES | st.binary(max_size=6), max_size=30).map(b"".join)


@given(STREAMS, st.lists(st.integers(min_value=0, max_value=10_000), max_size=30))
@example(b"data: a\r\n\r\n", [8])
@example(b"\xef\xbb\xbfdata: a\n\n", [1, 2])
@example(b"data: a\r\rdata: b\n\n", [8, 9])
@example(b"data: x\n\n", [])
def test_any_bytes_cut_anywhere_give_the_events_of_the_specification(stream: bytes, places: list[int]) -> None:
    assert framed(cut(stream, places)) == reference(stream)


@given(STREAMS)
def test_bytes_that_come_one_by_one_give_the_same_events(stream: bytes) -> None:
    assert framed([bytes([byte]) for byte in stream]) == reference(stream)


# Chunks as servers send them: whole events, which take the framer's fast path, and what may stand before one.
CHUNKS = st.sampled_from(
    [
        b"data: one\n\n",
        b"data: \n\n",
        b"data: two\r\n\n",
        b"data: a\rdata: b\n\n",
        b"\ndata: three\n\n",
        b"data: four\n\ndata: five\n\n",
        b"event: x\ndata: six\n\n",
        b"event: y\n",
        b"id: 7\n",
        b"data: part",
        b"data: line\n",
        b"x",
        b"\n",
        b"\r",
        b"\r\n",
        b"",
        b"\xef\xbb",
        b"\xbf",
    ]
)


@given(st.lists(CHUNKS, max_size=12))
@example([b"data: one\n\n"])
@example([b"data: part", b"data: one\n\n"])
@example([b"data: line\n", b"data: one\n\n"])
@example([b"event: y\n", b"data: one\n\n", b"data: one\n\n"])
@example([b"\xef\xbb", b"data: one\n\n"])
@example([b"\r", b"\ndata: three\n\n"])
@example([b"\n", b"data: a\rdata: b\n\n"])
@example([b"\n", b"x", b"data: one\n\n"])
def test_whole_events_in_chunks_of_their_own_are_no_different(chunks: list[bytes]) -> None:
    assert framed(chunks) == reference(b"".join(chunks))


TEXTS = st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters="\r\n")
    | st.sampled_from("\u2028\u2029\x85\x0b\x0c\x1c"),
    max_size=40,
)


@given(
    st.lists(TEXTS, max_size=10),
    st.sampled_from([b"\n", b"\r", b"\r\n"]),
    st.lists(st.integers(min_value=0, max_value=10_000), max_size=20),
)
def test_every_text_arrives_as_it_was_sent(texts: list[str], end: bytes, places: list[int]) -> None:
    stream = b"".join(b"data: " + text.encode() + end + end for text in texts)
    assert [event.data.decode() for event in framed(cut(stream, places))] == texts


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
def test_an_event_comes_with_its_blank_line_and_not_later(end: bytes) -> None:
    framer = SseFramer()
    assert framer.push(b"data: one" + end) == []
    assert framer.push(end) == [SseEvent(b"one")]


def test_a_line_feed_after_a_carriage_return_in_the_chunk_before_makes_no_blank_line() -> None:
    framer = SseFramer()
    assert framer.push(b"data: a\r") == []
    assert framer.push(b"\ndata: b\r") == []
    assert framer.push(b"\n\r") == [SseEvent(b"a\nb")]
    assert framer.push(b"\n") == []


def test_an_empty_chunk_between_the_halves_of_an_ending_changes_nothing() -> None:
    assert framed([b"data: a\r", b"", b"\ndata: b\n\n"]) == [SseEvent(b"a\nb")]


def test_fields_are_read_and_the_id_stays() -> None:
    framer = SseFramer()
    events = framer.push(b"event: token\nid: 7\nretry: 250\ndata: a\ndata:b\nother: x\n\n: comment\n\ndata: c\n\n")
    assert events == [SseEvent(b"a\nb", "token", "7"), SseEvent(b"c", None, "7")]
    assert framer.retry_ms == 250


@pytest.mark.parametrize("value", [b"-1", b"1.5", b"x", b"", b"9" * 40])
def test_a_retry_that_is_no_number_of_milliseconds_is_ignored(value: bytes) -> None:
    framer = SseFramer()
    framer.push(b"retry: " + value + b"\n\n")
    assert framer.retry_ms is None


def test_an_event_without_its_blank_line_comes_at_the_end() -> None:
    framer = SseFramer()
    assert framer.push(b"data: a\n\ndata: [DO") == [SseEvent(b"a")]
    assert framer.push(b"NE]") == []
    assert framer.flush() == [SseEvent(b"[DONE]")]
    assert framer.flush() == []


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_line_over_the_limit_is_refused_however_it_is_cut(size: int) -> None:
    line = b"data: " + b"x" * 200 + b"\n\n"
    framer = SseFramer(limit_bytes=100)
    with pytest.raises(SseTooLongError):
        push_in_steps(framer, line, size)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_an_event_of_many_lines_is_bounded_as_well(size: int) -> None:
    stream = b"data: xxxxxxxx\n" * 20
    framer = SseFramer(limit_bytes=100)
    with pytest.raises(SseTooLongError):
        push_in_steps(framer, stream, size)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_lines_within_the_limit_pass_however_many_there_are(size: int) -> None:
    stream = (b"data: " + b"x" * 94 + b"\n\n") * 50
    framer = SseFramer(limit_bytes=100)
    assert len(push_in_steps(framer, stream, size)) == 50
