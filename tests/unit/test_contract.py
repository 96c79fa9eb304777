"""What a request may be, and what a bad one is told."""

from __future__ import annotations

import base64
import json
import pickle
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

import promptmill
from promptmill import errors, keys
from promptmill.contract import (
    Done,
    ImagePart,
    JobRequest,
    Limits,
    Timeouts,
    Token,
    Unknown,
    parse_event,
    parse_request,
)
from promptmill.errors import BadRequest, PromptmillError
from promptmill.store.head import pack_head

PNG = base64.b64encode(b"\x89PNG....").decode()


def image(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "image", **fields}]}]}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def nested(depth: int) -> dict[str, Any]:
    """A dict whose lists make it so deep."""
    inner: list[Any] = []
    for _ in range(depth - 2):
        inner = [inner]
    return {"k": inner}


def endless() -> dict[str, Any]:
    """A dict that contains itself."""
    made: dict[str, Any] = {}
    made["self"] = made
    return made


@pytest.mark.parametrize(
    ("request_", "field", "says"),
    [
        ({}, "request", "give prompt or messages"),
        ({"prompt": ""}, "messages.0.content.text", "at least 1"),
        ({"prompt": "  \n"}, "request", "prompt is empty"),
        ({"prompt": "x", "messages": [user("y")]}, "request", "not both"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [user("x"), {"role": "assistant", "content": "y"}]}, "request", "last message"),
        ({"prompt": "x", "model": "m", "slot": "primary"}, "request", "model or slot, not both"),
        ({"prompt": "x", "model": "m", "role": "r"}, "request", "model or role, not both"),
        ({"prompt": "x", "slot": "primary"}, "request", "slot needs role"),
        ({"prompt": "x", "max_token": 5}, "max_token", "no such field"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens", "greater than 0"),
        ({"prompt": "x", "temperature": float("nan")}, "temperature", ""),
        ({"prompt": "x", "timeouts": {"idle_s": 0}}, "timeouts.idle_s", "greater than 0"),
        ({"prompt": "x", "timeouts": {"idle": 1}}, "timeouts.idle", "no such field"),
        ({"prompt": "x", "user": "a\nb"}, "user", "match pattern"),
        ({"prompt": "x", "priority": "high"}, "priority", "'interactive' or 'batch'"),
        ({"prompt": "x", "metadata": {"a": object()}}, "metadata.a", "JSON"),
        ({"prompt": "x", "metadata": nested(65)}, "metadata", "64 levels"),
        ({"prompt": "x", "metadata": nested(900)}, "metadata", "64 levels"),
        ({"prompt": "x", "metadata": endless()}, "metadata", "64 levels"),
        ({"prompt": "x", "metadata": {"n": 10**29}}, "metadata", "64 bits"),
        ({"prompt": "x", "metadata": {"n": [2**63]}}, "metadata", "64 bits"),
        ({"prompt": "x", "metadata": {"n": -(2**63) - 1}}, "metadata", "64 bits"),
        ({"prompt": "x", "metadata": {"n": float("nan")}}, "metadata", "not finite"),
        (b'{"prompt": "x", "metadata": {"n": [{"m": 1e999}]}}', "metadata", "not finite"),
        ({"prompt": 3}, "messages.0.content.text", "string"),
        ({"system": "s", "messages": [{"role": "system", "content": "t"}, user("x")]}, "request", "system once"),
        (image(), "messages.0.content.parts.0.image", "data or url"),
        (image(data=PNG), "messages.0.content.parts.0.image", "media_type"),
        (image(data="%%", media_type="image/png"), "messages.0.content.parts.0.image", "base64"),
        (image(url="file:///etc/passwd"), "messages.0.content.parts.0.image.url", "pattern"),
        (b"\xff\xfe", "request", "not UTF-8"),
        (b"{", "request", "not JSON"),
        (b"[]", "request", "JSON object"),
        (b"[" * 100_000, "request", "not JSON"),
    ],
)
def test_a_bad_request_is_told_what_is_wrong_and_where(request_: Any, field: str, says: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_request(request_)
    assert caught.value.code == "bad_request"
    assert caught.value.field == field
    assert says in caught.value.message
    assert len(caught.value.message) < 500


@pytest.mark.parametrize(
    ("request_", "limits", "field", "limit"),
    [
        ({"prompt": "é" * 6}, Limits(text_bytes=11), "messages.text", 11),
        ({"prompt": "x", "system": "y" * 11}, Limits(text_bytes=11), "messages.text", 11),
        ({"messages": [user("x")] * 3}, Limits(messages=2), "messages", 2),
        (image(data=PNG, media_type="image/png"), Limits(images=0), "messages.images", 0),
        (image(data=PNG, media_type="image/png"), Limits(image_bytes=4), "messages.image", 4),
        ({"prompt": "x", "metadata": {"k": "v" * 50}}, Limits(metadata_bytes=20), "metadata", 20),
        ({"prompt": "x", "max_tokens": 99}, Limits(max_tokens=98), "max_tokens", 98),
        ({"prompt": "x", "stop": ["a", "b"]}, Limits(stop_sequences=1), "stop", 1),
        (json.dumps({"prompt": "x" * 100}).encode(), Limits(request_bytes=50), "request", 50),
    ],
)
def test_what_is_too_large_names_field_and_limit(request_: Any, limits: Limits, field: str, limit: int) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_request(request_, limits)
    assert (caught.value.code, caught.value.field, caught.value.limit) == ("too_large", field, limit)


def test_the_forms_of_a_request_become_one() -> None:
    by_prompt = parse_request({"prompt": "x", "stop": "END"})
    by_messages = parse_request({"messages": [user("x")], "stop": ["END"]})
    assert by_prompt == by_messages
    with_system = parse_request({"messages": [{"role": "system", "content": "s"}, user("x")]})
    assert with_system == parse_request({"prompt": "x", "system": "s"})
    assert parse_request(by_prompt.to_json()) == by_prompt


@given(st.text(st.characters(), min_size=1).filter(lambda t: t.strip()))
def test_any_text_can_be_stored(text: str) -> None:
    request = parse_request(
        {"prompt": text, "metadata": {text[:50].strip("\x00") or "k": text}} if text.isprintable() else {"prompt": text}
    )
    stored = JobRequest.model_validate_json(request.to_json())
    assert stored.messages[0].text.encode().decode() == request.messages[0].text


def test_lone_surrogates_are_joined_or_replaced() -> None:
    request = parse_request(rb'{"prompt": "\ud83d\ude00 \ud83d x", "metadata": {"a": ["\udc00"]}}')
    assert request.messages[0].text == "😀 \ufffd x"
    assert request.metadata == {"a": ["\ufffd"]}


def test_metadata_at_its_bounds_is_stored_and_read_as_it_was() -> None:
    metadata = {"n": [2**63 - 1, -(2**63), 1.5e308, True, None, "é"], **nested(64)}
    request = parse_request({"prompt": "x", "metadata": metadata})
    assert orjson.loads(pack_head(request, "q"))["metadata"] == metadata
    assert JobRequest.model_validate_json(request.to_json()).metadata == metadata


def test_timeouts_fall_back_one_by_one() -> None:
    asked = Timeouts(idle_s=1).over(Timeouts(idle_s=2, total_s=3)).over(Timeouts(queue_s=4))
    assert asked == Timeouts(idle_s=1, total_s=3, queue_s=4)


def test_an_image_counts_its_decoded_bytes() -> None:
    part = ImagePart(media_type="image/png", data=base64.b64encode(b"x" * 300).decode())
    assert part.size_bytes == 300


def test_events_begin_with_their_type_and_come_back_equal() -> None:
    for event in (Token(text='a"é\u2028'), Done(text="t", attempt=1)):
        data = event.to_json()
        assert data.startswith(b'{"type":"%s"' % event.type.encode())
        assert b"\n" not in data
        assert parse_event(data) == event


def test_an_unknown_event_and_unknown_fields_are_kept_out_of_the_way() -> None:
    event = parse_event(b'{"type":"later","x":1}', "1-2")
    assert isinstance(event, Unknown)
    assert (event.id, event.ends) == ("1-2", False)
    assert parse_event(b'{"type":"token","text":"a","new":1}') == Token(text="a")
    with pytest.raises(ValueError, match="text"):
        parse_event(b'{"type":"token"}')


def every_error() -> list[PromptmillError]:
    made: list[PromptmillError] = []
    for name in dir(errors):
        kind = getattr(errors, name)
        if isinstance(kind, type) and issubclass(kind, PromptmillError):
            extra: dict[str, Any] = {}
            if kind is errors.BackendError:
                extra = {"code": "cut", "provider_request_id": "r"}
            elif kind in {errors.JobFailed, errors.JobCancelled}:
                extra = {"job_id": "j"}
            made.append(kind("what and what to do", **extra))
    return made


@pytest.mark.parametrize("error", every_error(), ids=lambda e: type(e).__name__)
def test_every_error_survives_pickling_and_has_a_known_code(error: PromptmillError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == "what and what to do"
    assert again.__dict__ == error.__dict__
    assert error.code in errors.CODES
    assert 400 <= error.http_status < 600


def test_the_public_names_are_these() -> None:
    assert sorted(promptmill.__all__) == [
        "AsyncJob", "AsyncProducer", "BadRequest", "BatchResult", "ConfigError", "IdempotencyConflict", "ImagePart",
        "Job", "JobCancelled", "JobFailed", "JobHandle", "JobPage", "JobRequest", "Message", "NotFound", "Producer",
        "PromptmillError", "Readiness", "Settings", "StoreUnavailable", "TextPart", "Timeouts", "Usage",
        "WaitTimeout", "load_settings",
    ]  # fmt: skip


SCHEMA = {"type": "object", "properties": {"schema": {"type": "string"}}}


@pytest.mark.parametrize(
    "given",
    [
        {"type": "json_schema", "json_schema": SCHEMA},
        {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}},
        {"type": "json_schema", "json_schema": {"schema": SCHEMA, "strict": True}},
    ],
)
def test_a_response_format_comes_in_our_form_or_openais(given: dict[str, Any]) -> None:
    request = parse_request({"prompt": "x", "response_format": given})
    assert request.response_format is not None
    assert request.response_format.json_schema == SCHEMA
    assert request.response_format.name == "answer"
    assert parse_request(request.to_json()) == request


@pytest.mark.parametrize(
    "given",
    [
        {"type": "json_schema"},
        {"type": "json_object", "json_schema": SCHEMA},
        {"type": "yaml"},
        {"type": "json_schema", "json_schema": [1]},
        {"type": "json_schema", "json_schema": {"name": "not a name!", "schema": SCHEMA}},
    ],
)
def test_a_response_format_that_says_nothing_usable_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_request({"prompt": "x", "response_format": given})
    assert (caught.value.field or "").startswith("response_format")


def test_a_job_id_can_stand_in_a_command() -> None:
    for job_id in (keys.new_job_id() for _ in range(5_000)):
        assert not job_id.startswith("-")
        assert keys.check_job_id(job_id) == job_id
