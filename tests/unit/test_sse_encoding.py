import itertools
import json

from hypothesis import given
from hypothesis import strategies as st

from promptmill.contract import Token
from promptmill.text import clean_text
from promptmill_relay import sse
from tests.support.event_source import EventSourceParser, Message

AWKWARD = st.text(st.sampled_from('a{"\\ \r\n\v\f\x1c\x85\u2028\u2029\u00e9\u20ac\U0001f600:\0\ufeff'))
TEXT = st.one_of(st.text(), AWKWARD)


def read(data: bytes, cuts: list[int]) -> list[Message]:
    parser = EventSourceParser()
    bounds = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    found: list[Message] = []
    for start, end in itertools.pairwise(bounds):
        found += parser.feed(data[start:end])
    return found


@given(texts=st.lists(TEXT), cuts=st.lists(st.integers(min_value=0)))
def test_every_text_arrives_as_it_was_wherever_the_bytes_are_cut(texts: list[str], cuts: list[int]) -> None:
    frames = [(b"7-%d" % n, b"token", Token(text=clean_text(t)).to_json()) for n, t in enumerate(texts, 1)]
    messages = read(sse.encode(frames), cuts)
    assert [json.loads(m.data)["text"] for m in messages] == [clean_text(t) for t in texts]
    assert [m.last_event_id for m in messages] == [f"7-{n}" for n in range(1, len(texts) + 1)]


@given(low=st.integers(0xDC00, 0xDFFF), cuts=st.lists(st.integers(min_value=0)))
def test_a_lone_surrogate_escaped_in_json_passes_untouched(low: int, cuts: list[int]) -> None:
    data = b'{"type":"token","text":"\\u%04x"}' % low
    assert [m.data for m in read(sse.encode_frame(b"1-1", b"token", data), cuts)] == [data.decode()]


@given(event_id=st.binary(), kind=st.binary(), data=st.binary(), cuts=st.lists(st.integers(min_value=0)))
def test_no_bytes_in_any_field_can_pose_as_another_event(
    event_id: bytes, kind: bytes, data: bytes, cuts: list[int]
) -> None:
    block = sse.encode([(event_id, kind, data), (b"9-9", b"done", b"{}")])
    messages = read(block, cuts)
    assert len(messages) == 2
    assert messages[1] == Message("done", "{}", "9-9")
    assert "\n" not in messages[0].type


def test_line_ends_in_data_become_lines_that_a_reader_joins_again() -> None:
    messages = read(sse.encode_frame(None, b"token", b'{"a":\r\n1,\r"b":\n2}'), [])
    assert messages == [Message("token", '{"a":\n1,\n"b":\n2}', "")]


def test_an_event_without_an_id_leaves_the_last_id_as_it_is() -> None:
    messages = read(sse.encode([(b"5-1", b"token", b"{}"), (None, b"restart", b"{}")]), [])
    assert [m.last_event_id for m in messages] == ["5-1", "5-1"]


def test_retry_and_comments_dispatch_nothing() -> None:
    parser = EventSourceParser()
    assert parser.feed(sse.retry(1500) + sse.KEEPALIVE + sse.comment("bye\ndata: forged")) == []
    assert parser.retry_ms == 1500
    assert parser.comments == ["keepalive", "byedata: forged"]


def test_no_frames_are_no_bytes() -> None:
    assert sse.encode([]) == b""
