"""The providers' decoders on recorded forms that the simulator does not send."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptmill.errors import CODES
from promptmill_workers.backends.anthropic_stream import MessagesDecoder
from promptmill_workers.backends.base import Finished, Item, UsageUpdate
from promptmill_workers.backends.decoding import AnswerDecoder
from promptmill_workers.backends.openai_stream import ChatDecoder
from promptmill_workers.testing import text_of


def sse(*events: Any) -> bytes:
    return b"".join(b"data: " + (e if isinstance(e, bytes) else orjson.dumps(e)) + b"\n\n" for e in events)


def chat(text: Any = None, finish: str | None = None, **more: Any) -> dict[str, Any]:
    return {"id": "chatcmpl-1", "choices": [{"delta": {"content": text}, "finish_reason": finish}], **more}


def run(decoder: AnswerDecoder, *chunks: bytes) -> list[Item]:
    items = [item for chunk in chunks for item in decoder.push(chunk)]
    return items + decoder.end()


def code_of(decoder: AnswerDecoder) -> str | None:
    return decoder.failure.code if decoder.failure else None


def test_done_without_a_finish_reason_is_a_proper_end() -> None:
    decoder = ChatDecoder()
    items = run(decoder, sse(chat("hi"), b"[DONE]"))
    assert (text_of(items), items[-1]) == ("hi", Finished("stop", "chatcmpl-1"))


def test_a_finish_reason_without_done_is_a_proper_end() -> None:
    items = run(ChatDecoder(), sse(chat("hi"), chat(None, "length")))
    assert items[-1] == Finished("length", "chatcmpl-1")


def test_done_without_its_blank_line_is_a_proper_end() -> None:
    assert run(ChatDecoder(), sse(chat("hi")) + b"data: [DONE]")[-1] == Finished("stop", "chatcmpl-1")


def test_an_event_cut_in_the_middle_is_cut_and_not_malformed() -> None:
    decoder = ChatDecoder()
    items = run(decoder, sse(chat("hi")) + b'data: {"choices": [{"del')
    assert (text_of(items), code_of(decoder)) == ("hi", "cut")


def test_what_follows_done_is_not_read() -> None:
    decoder = ChatDecoder()
    assert text_of(run(decoder, sse(chat("hi"), b"[DONE]", chat("more")), sse(chat("again")))) == "hi"


def test_an_error_after_deltas_in_the_same_chunk_comes_after_them() -> None:
    decoder = ChatDecoder()
    items = run(decoder, sse(chat("hi"), {"error": {"message": "x", "type": "server_error"}}, b"[DONE]"))
    assert (text_of(items), code_of(decoder)) == ("hi", "overloaded")
    assert not any(isinstance(item, Finished) for item in items)


def test_an_error_beside_choices_is_an_error() -> None:
    decoder = ChatDecoder()
    run(decoder, sse(chat("hi"), chat("", "error", error={"code": 502, "message": "provider disconnected"})))
    assert code_of(decoder) == "unreachable"


GOOGLES = {"error": {"code": 429, "message": "slow down", "status": "RESOURCE_EXHAUSTED", "details": []}}


@pytest.mark.parametrize("value", [GOOGLES, [GOOGLES]])
@pytest.mark.parametrize("kind", [ChatDecoder, MessagesDecoder])
def test_googles_error_is_found_as_a_body_and_in_a_stream(kind: type[AnswerDecoder], value: Any) -> None:
    for body in (orjson.dumps(value), b"\n" + orjson.dumps(value)):
        decoder = kind()
        assert run(decoder, body) == []
        assert code_of(decoder) == "rate_limited"
    decoder = ChatDecoder()
    assert text_of(run(decoder, sse(chat("hi"), value))) == "hi"
    assert code_of(decoder) == "rate_limited"


@pytest.mark.parametrize("body", [b"[]", b"[1]", b"[{}]", b'["error"]', b"[" * 100_000])
def test_a_list_without_an_error_is_malformed(body: bytes) -> None:
    decoder = ChatDecoder()
    run(decoder, body)
    assert code_of(decoder) == "malformed"


@pytest.mark.parametrize("reason", ["content_filter", "content_filter: SAFETY", "content_filter: PROHIBITED_CONTENT"])
def test_an_answer_that_a_filter_ended_is_refused(reason: str) -> None:
    decoder = ChatDecoder()
    assert text_of(run(decoder, sse(chat("hi"), chat(None, reason), b"[DONE]"))) == "hi"
    assert code_of(decoder) == "refused"


@pytest.mark.parametrize(
    ("asked", "said", "total", "counted"),
    [(10, 5, 115, 105), (10, 5, 15, 5), (10, 5, 0, 5), (10, 0, 60, 50), (10, 5, 12, 5), (10, 5, None, 5)],
)
def test_thinking_that_only_the_total_counts_is_output_where_the_provider_counts_so(
    asked: int, said: int, total: int | None, counted: int
) -> None:
    usage = {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": total}
    for decoder, wanted in ((ChatDecoder(thinking_in_total=True), counted), (ChatDecoder(), said)):
        items = run(decoder, sse(chat("hi", "stop", usage=usage), b"[DONE]"))
        assert [i.usage.output_tokens for i in items if isinstance(i, UsageUpdate)] == [wanted]
        assert [i.usage.input_tokens for i in items if isinstance(i, UsageUpdate)] == [asked]


def test_a_null_error_in_each_chunk_is_none() -> None:
    items = run(ChatDecoder(), sse(chat("hi", error=None), {"choices": [], "error": None}, chat("", "stop"), b"[DONE]"))
    assert isinstance(items[-1], Finished)


def test_reasoning_and_unknown_events_are_left_out() -> None:
    thinking = {"choices": [{"delta": {"reasoning_content": "hm", "content": None}}]}
    items = run(ChatDecoder(), sse({"sources": []}, thinking, chat("hi"), chat(None, "stop"), b"[DONE]"))
    assert text_of(items) == "hi"


def test_content_in_parts_is_joined() -> None:
    parts = [{"type": "thinking", "thinking": []}, {"type": "text", "text": "hi"}]
    assert text_of(run(ChatDecoder(), sse(chat(parts), b"[DONE]"))) == "hi"


def test_a_refusal_in_its_own_field_is_a_refusal_with_its_words() -> None:
    decoder = ChatDecoder()
    run(decoder, sse({"choices": [{"delta": {"refusal": "I cannot "}}]}, chat(None, "stop"), b"[DONE]"))
    assert decoder.failure is not None
    assert (decoder.failure.code, str(decoder.failure)) == (
        "refused",
        "the provider refused to answer: I cannot",
    )


def test_tool_calls_without_text_are_an_empty_answer() -> None:
    decoder = ChatDecoder()
    run(decoder, sse({"choices": [{"delta": {"tool_calls": [{}]}}]}, chat(None, "tool_calls"), b"[DONE]"))
    assert code_of(decoder) == "empty"


def test_a_server_that_ignores_stream_is_understood() -> None:
    body = {
        "id": "chatcmpl-9",
        "choices": [{"message": {"role": "assistant", "content": "whole \u2028 text"}, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4},
    }
    data = b" \n" + orjson.dumps(body)
    items = run(ChatDecoder(), *(data[i : i + 7] for i in range(0, len(data), 7)))
    assert text_of(items) == "whole \u2028 text"
    assert [item.usage.output_tokens for item in items if isinstance(item, UsageUpdate)] == [4]
    assert items[-1] == Finished("length", "chatcmpl-9")


def test_a_message_that_is_not_streamed_is_understood() -> None:
    body = {
        "type": "message",
        "content": [{"type": "text", "text": "who"}, {"type": "text", "text": "le"}],
        "stop_reason": "end_turn",
        "usage": {"input_tokens": 3, "output_tokens": 4, "cache_creation_input_tokens": 5},
    }
    items = run(MessagesDecoder(request_id="req_1"), orjson.dumps(body))
    assert (text_of(items), items[-1]) == ("whole", Finished("stop", "req_1"))
    assert [item.usage.cache_write_tokens for item in items if isinstance(item, UsageUpdate)] == [5]


def test_a_whole_answer_that_breaks_off_is_malformed() -> None:
    decoder = ChatDecoder()
    run(decoder, b'{"choices": [{"mess')
    assert code_of(decoder) == "malformed"


def delta(text: str) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}


def stop(reason: str | None, **usage: int) -> dict[str, Any]:
    return {"type": "message_delta", "delta": {"stop_reason": reason}, "usage": usage}


def test_usage_is_merged_over_the_events() -> None:
    start = {
        "type": "message_start",
        "message": {"usage": {"input_tokens": 9, "cache_read_input_tokens": 8, "output_tokens": 1}},
    }
    items = run(MessagesDecoder(), sse(start, delta("x"), stop("end_turn", output_tokens=5), {"type": "message_stop"}))
    usage = [item.usage for item in items if isinstance(item, UsageUpdate)]
    assert [(u.input_tokens, u.cache_read_tokens, u.output_tokens) for u in usage] == [(9, 8, 1), (9, 8, 5)]


@pytest.mark.parametrize(
    ("reason", "ours"),
    [
        ("end_turn", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("stop_sequence", "stop_sequence"),
        ("pause_turn", "pause_turn"),
    ],
)
def test_stop_reasons_become_ours_or_stay_the_providers(reason: str, ours: str) -> None:
    assert run(MessagesDecoder(), sse(delta("x"), stop(reason), {"type": "message_stop"}))[-1] == Finished(ours)


def test_thinking_is_left_out() -> None:
    thinking = {"type": "content_block_delta", "delta": {"type": "thinking_delta", "thinking": "hm"}}
    assert text_of(run(MessagesDecoder(), sse(thinking, delta("x"), stop("end_turn")))) == "x"


def test_a_stream_without_a_stop_reason_was_cut() -> None:
    decoder = MessagesDecoder()
    run(decoder, sse(delta("x"), {"type": "content_block_stop"}, stop(None)))
    assert code_of(decoder) == "cut"


def test_a_pair_of_surrogates_in_two_events_is_joined_and_a_lone_half_replaced() -> None:
    halves = [rb'{"choices":[{"delta":{"content":"%b"}}]}' % half for half in (rb"\ud83d", rb"\ude00", rb"\ud800")]
    assert text_of(run(ChatDecoder(), sse(*halves, b"[DONE]"))) == "😀\ufffd"


JSONISH = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "choices",
                    "delta",
                    "content",
                    "usage",
                    "error",
                    "message",
                    "type",
                    "finish_reason",
                    "id",
                    "detail",
                    "text",
                    "prompt_tokens",
                    "prompt_tokens_details",
                    "cached_tokens",
                    "stop_reason",
                    "content_block",
                    "refusal",
                ]
            ),
            inner
            | st.sampled_from(
                ["message_start", "message_delta", "content_block_delta", "content_block_start", "error"]
            ),
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(st.lists(JSONISH, max_size=5), st.booleans())
@pytest.mark.parametrize("kind", [ChatDecoder, MessagesDecoder])
def test_json_of_any_form_ends_in_an_answer_or_in_a_documented_code(
    kind: type[AnswerDecoder], values: list[Any], whole: bool
) -> None:
    decoder = kind()
    items = run(decoder, orjson.dumps(values[0]) if whole and values else sse(*values))
    if decoder.failure is None:
        assert isinstance(items[-1], Finished)
    else:
        assert decoder.failure.code in CODES
        assert not any(isinstance(item, Finished) for item in items)
