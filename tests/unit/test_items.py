"""The lines between a worker and an isolated backend: whatever is said arrives as it was said, or is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from promptmill.contract import Timeouts, Usage, parse_request
from promptmill.contract.job import TOKENS_MAX
from promptmill.errors import CODES, BackendError
from promptmill.settings import ModelConfig
from promptmill.text import clean_text
from promptmill_workers.backends.base import Call, Finished, Item, StartedAnew, TextDelta, UsageUpdate
from promptmill_workers.items import Order, decode_line, encode_error, encode_item

texts = st.text(st.characters(exclude_categories=["Cs"]))
broken_texts = st.text(st.characters())
counts = st.integers(0, TOKENS_MAX)
seconds = st.floats(min_value=0, allow_nan=False, allow_infinity=False)
usages = st.builds(Usage, input_tokens=counts, output_tokens=counts, cache_read_tokens=counts, estimated=st.booleans())
items = st.one_of(
    st.builds(TextDelta, texts),
    st.builds(UsageUpdate, usages, st.none() | seconds),
    st.builds(StartedAnew, texts),
    st.builds(Finished, texts, st.none() | texts),
)
errors = st.builds(
    BackendError,
    texts,
    code=st.sampled_from(sorted(CODES)) | texts.filter(bool),
    retryable=st.booleans(),
    field=st.none() | texts,
    limit=st.none() | st.integers(0, 2**53) | seconds,
    retry_after_s=st.none() | seconds,
    provider_request_id=st.none() | texts,
)
options = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@given(items)
def test_an_item_is_one_line_and_comes_back_as_it_was(item: Item) -> None:
    line = encode_item(item)
    assert (line[-1:], line.count(b"\n")) == (b"\n", 1)
    assert decode_line(line) == decode_line(line[:-1]) == item


@given(broken_texts)
def test_a_text_that_no_backend_may_send_arrives_cleaned(text: str) -> None:
    assert decode_line(encode_item(TextDelta(text))) == TextDelta(clean_text(text))
    assert decode_line(encode_item(StartedAnew(text))) == StartedAnew(clean_text(text))
    assert decode_line(encode_item(Finished(text, text))) == Finished(clean_text(text), clean_text(text))


@given(errors)
def test_an_error_keeps_every_field(error: BackendError) -> None:
    line = encode_error(error)
    assert (line[-1:], line.count(b"\n")) == (b"\n", 1)
    back = decode_line(line)
    assert isinstance(back, BackendError)
    assert back.to_dict() == error.to_dict()
    assert back.provider_request_id == error.provider_request_id


@given(st.binary() | texts.map(str.encode) | options.map(lambda value: json.dumps(value).encode()))
def test_what_is_no_line_of_the_protocol_is_malformed_and_nothing_of_it_is_told(line: bytes) -> None:
    try:
        known = json.loads(line)["type"] in {"text", "usage", "restart", "finished", "error"}
    except (ValueError, KeyError, TypeError):
        known = False
    assume(not known)
    with pytest.raises(BackendError) as caught:
        decode_line(line)
    assert caught.value.code == "malformed"
    said = "the isolated backend wrote a line that is not the protocol's"
    assert str(caught.value) == f"{said} ({len(line)} bytes)"


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"null",
        b"[]",
        b'"text"',
        b'{"type":"text"}',
        b'{"type":"text","text":5}',
        b'{"type":"text","text":"\\ud800"}',
        b'{"type":"text","text":"half',
        b'{"type":["text"],"text":"x"}',
        b'{"type":"unheard of"}',
        b'{"type":"usage","usage":{"input_tokens":-1}}',
        b'{"type":"usage","usage":null}',
        b'{"type":"finished"}',
        b'{"type":"restart","reason":null}',
        b'{"type":"error","code":"cut"}',
        b'{"type":"error","code":"cut","message":"m","retryable":"yes"}',
        b"[" * 100_000,
    ],
)
def test_a_garbled_line_is_malformed(line: bytes) -> None:
    with pytest.raises(BackendError) as caught:
        decode_line(line)
    assert caught.value.code == "malformed"


def test_fields_of_a_newer_version_are_ignored() -> None:
    assert decode_line(b'{"type":"text","text":"x","new":1}') == TextDelta("x")
    assert decode_line(b'{"type":"finished","reason":"stop","new":1}') == Finished("stop")


@given(
    st.dictionaries(texts, options, max_size=3),
    st.dictionaries(st.from_regex(r"[A-Z_]{1,9}", fullmatch=True), texts, max_size=2),
    texts.filter(lambda text: text.strip()),
    st.none() | st.floats(0.1, 1e6),
)
def test_an_order_comes_back_as_it_was(
    given_options: dict[str, Any], variables: dict[str, str], prompt: str, total_s: float | None
) -> None:
    request = parse_request({"prompt": prompt, "system": prompt, "stop": [prompt[:9]], "metadata": {"k": [None, 1.5]}})
    call = Call("job", 2, request, Timeouts(total_s=total_s))
    config = ModelConfig(type="echo", options=given_options, timeouts=Timeouts(idle_s=3))
    order = Order.model_validate_json(Order.of("a model", config, variables, call).to_json())
    assert (order.name, order.config, order.variables, order.call) == ("a model", config, variables, call)


def test_a_responses_form_and_a_picture_survive_the_way() -> None:
    request = parse_request(
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "url": "https://example.org/i.png"}]},
                {"role": "assistant", "content": "a picture"},
                {"role": "user", "content": [{"type": "text", "text": "of"}]},
            ],
            "response_format": {"type": "json_schema", "json_schema": {"type": "object"}},
        }
    )
    call = Call("job", 1, request, Timeouts())
    order = Order.model_validate_json(Order.of("m", ModelConfig(type="echo"), {}, call).to_json())
    assert order.call == call


def test_an_order_shows_neither_secrets_nor_the_prompt_when_it_is_printed() -> None:
    call = Call("job", 1, parse_request('{"prompt": "planted prompt"}'), Timeouts())
    assert "planted" not in repr(Order.of("m", ModelConfig(type="echo"), {"KEY": "planted secret"}, call))
