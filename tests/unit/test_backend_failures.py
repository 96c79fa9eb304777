"""What providers say, mapped to documented codes; the forms are those that the servers were seen to send."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import orjson
import pytest

from promptmill.errors import CODES
from promptmill_workers.backends.failures import (
    MAX_RETRY_AFTER_S,
    MESSAGE_CHARS,
    error_object,
    retry_after_s,
    safe_message,
    status_error,
    stream_error,
)

OPENAI_LONG = {"error": {"message": "too long", "type": "invalid_request_error", "code": "context_length_exceeded"}}
VLLM_LONG = {
    "object": "error",
    "message": "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens.",
    "type": "BadRequestError",
    "code": 400,
}
LLAMA_LONG = {
    "error": {
        "code": 400,
        "message": "the request exceeds the available context size, try increasing it",
        "type": "exceed_context_size_error",
    }
}
ANTHROPIC_LONG = {
    "type": "error",
    "error": {"type": "invalid_request_error", "message": "prompt is too long: 200251 tokens > 200000 maximum"},
}


def google(status: int, word: str, message: str = "no", *details: dict[str, Any]) -> list[dict[str, Any]]:
    """As Google words it; its endpoint for OpenAI's protocol makes a list of it."""
    return [{"error": {"code": status, "message": message, "status": word, "details": [{"@type": "x"}, *details]}}]


RETRY = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "37.5s"}
QUOTA = {"@type": "type.googleapis.com/google.rpc.QuotaFailure"}
A_MINUTE = {**QUOTA, "violations": [{"quotaId": "GenerateRequestsPerMinutePerProjectPerModel-FreeTier"}]}
A_DAY = {**QUOTA, "violations": [{}, {"quotaId": "GenerateRequestsPerDayPerProjectPerModel-FreeTier"}]}


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (google(400, "INVALID_ARGUMENT"), "bad_request"),
        (google(400, "INVALID_ARGUMENT", "no", {"reason": "API_KEY_INVALID"}), "auth"),
        (google(400, "FAILED_PRECONDITION", "User location is not supported"), "bad_request"),
        (
            google(400, "INVALID_ARGUMENT", "The input token count (9) exceeds the maximum number of tokens allowed"),
            "context_too_long",
        ),
        (google(403, "PERMISSION_DENIED"), "auth"),
        (google(404, "NOT_FOUND"), "bad_request"),
        (google(429, "RESOURCE_EXHAUSTED"), "rate_limited"),
        (google(500, "INTERNAL"), "overloaded"),
        (google(503, "UNAVAILABLE", "The model is overloaded."), "overloaded"),
        (google(504, "DEADLINE_EXCEEDED"), "overloaded"),
    ],
)
def test_googles_errors_have_their_codes_with_a_status_and_in_a_stream(body: Any, code: str) -> None:
    status = body[0]["error"]["code"]
    for form in (body, body[0]):
        assert status_error(status, {}, orjson.dumps(form)).code == code
        error = error_object(form)
        assert error is not None
        assert stream_error(error).code == code


def test_googles_wait_is_read_from_the_errors_details() -> None:
    body = google(429, "RESOURCE_EXHAUSTED", "slow down", A_MINUTE, RETRY)
    error = status_error(429, {}, orjson.dumps(body))
    assert (error.retry_after_s, error.retryable) == (37.5, True)
    assert status_error(429, {"retry-after": "0"}, orjson.dumps(body)).retry_after_s == 0
    found = error_object(body)
    assert found is not None
    assert stream_error(found).retry_after_s == 37.5


def test_a_quota_of_the_day_is_not_worth_another_try() -> None:
    error = status_error(429, {}, orjson.dumps(google(429, "RESOURCE_EXHAUSTED", "quota", A_DAY, RETRY)))
    assert (error.code, error.retryable) == ("rate_limited", False)


@pytest.mark.parametrize("delay", ["", "soon", "-3s", "1e9s", 37, None, "9999999999s", "3m"])
def test_a_wait_of_another_form_is_none(delay: Any) -> None:
    body = google(429, "RESOURCE_EXHAUSTED", "x", {"retryDelay": delay})
    assert status_error(429, {}, orjson.dumps(body)).retry_after_s is None


@pytest.mark.parametrize(
    "details", [None, "x", [None], [{"violations": 3}], [{"violations": [3]}], {"retryDelay": "3s"}]
)
def test_details_of_another_form_do_not_break_the_mapping(details: Any) -> None:
    body = {"error": {"code": 429, "message": "x", "status": 429, "details": details}}
    assert status_error(429, {}, orjson.dumps([body])).code == "rate_limited"


def test_a_filter_that_answers_400_refused_the_request() -> None:
    body = {"error": {"message": "held back", "type": None, "code": "content_filter"}}
    assert status_error(400, {}, orjson.dumps(body)).code == "refused"


def test_the_requests_id_is_taken_from_the_body_where_no_header_has_it() -> None:
    body = orjson.dumps({"type": "error", "error": {"type": "api_error", "message": "x"}, "request_id": "req_7"})
    assert status_error(500, {}, body).provider_request_id == "req_7"
    assert status_error(500, {}, body, request_id="req_1").provider_request_id == "req_1"


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (302, "bad_request"),
        (400, "bad_request"),
        (401, "auth"),
        (402, "auth"),
        (403, "auth"),
        (404, "bad_request"),
        (405, "bad_request"),
        (408, "overloaded"),
        (409, "overloaded"),
        (413, "context_too_long"),
        (422, "bad_request"),
        (425, "overloaded"),
        (429, "rate_limited"),
        (500, "overloaded"),
        (501, "overloaded"),
        (502, "unreachable"),
        (503, "overloaded"),
        (504, "overloaded"),
        (522, "unreachable"),
        (529, "overloaded"),
        (599, "overloaded"),
    ],
)
def test_each_status_has_its_code(status: int, code: str) -> None:
    error = status_error(status, {}, b"")
    assert (error.code, error.retryable) == (code, CODES[code].retryable)
    assert str(status) in str(error)


@pytest.mark.parametrize("body", [OPENAI_LONG, VLLM_LONG, LLAMA_LONG, ANTHROPIC_LONG])
def test_a_prompt_that_does_not_fit_is_told_from_other_bad_requests(body: dict[str, Any]) -> None:
    assert status_error(400, {}, orjson.dumps(body)).code == "context_too_long"


def test_a_token_limit_a_minute_is_no_context_that_is_too_long() -> None:
    body = {"error": {"message": "Request too large: too many tokens per min (TPM)", "type": "tokens", "code": "x"}}
    assert status_error(429, {}, orjson.dumps(body)).code == "rate_limited"
    error = error_object(body)
    assert error is not None
    assert stream_error(error).code == "rate_limited"


def test_a_quota_that_is_used_up_is_not_worth_another_try() -> None:
    body = {"error": {"message": "You exceeded your current quota", "type": "insufficient_quota"}}
    error = status_error(429, {}, orjson.dumps(body))
    assert (error.code, error.retryable) == ("rate_limited", False)


@pytest.mark.parametrize(
    ("value", "message", "code"),
    [
        ({"error": {"message": "Overloaded", "type": "overloaded_error"}}, "Overloaded", "overloaded"),
        ({"type": "error", "error": {"type": "rate_limit_error", "message": "slow"}}, "slow", "rate_limited"),
        ({"type": "error", "error": {"type": "api_error", "message": "oops"}}, "oops", "overloaded"),
        ({"error": {"message": "no", "type": "invalid_request_error", "code": "content_filter"}}, "no", "refused"),
        ({"error": {"message": "bad", "type": "x", "code": 400}}, "bad", "bad_request"),
        ({"error": {"message": "busy", "code": 503}}, "busy", "overloaded"),
        ({"error": "loading"}, "loading", "crashed"),
        ({"detail": "Model not found"}, "Model not found", "crashed"),
        ({"detail": [{"loc": ["body"], "msg": "x"}]}, '[{"loc": ["body"], "msg": "x"}]', "crashed"),
        ({"error": {"message": {"nested": 1}}}, '{"nested": 1}', "crashed"),
        (VLLM_LONG, VLLM_LONG["message"], "context_too_long"),
    ],
)
def test_error_objects_are_understood_in_every_usual_form(value: Any, message: str, code: str) -> None:
    error = error_object(value)
    assert error is not None
    assert (error.message, error.code) == (message, code)


@pytest.mark.parametrize(
    "value", [None, [], "text", {}, {"error": None}, {"error": ""}, {"choices": [], "detail": "x"}]
)
def test_what_holds_no_error_is_none(value: Any) -> None:
    assert error_object(value) is None


@pytest.mark.parametrize("body", [b"", b"\xff\xfe", b"<html>Bad gateway</html>", b"[1]", b"null", b'{"error": 7}'])
def test_a_body_in_no_known_form_does_not_break_the_mapping(body: bytes) -> None:
    assert status_error(503, {}, body).code == "overloaded"


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": " 0.5 "}, 0.5),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after-ms": "soon", "retry-after": "9"}, 9.0),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "1e999"}, MAX_RETRY_AFTER_S),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "soon"}, None),
        ({}, None),
    ],
)
def test_retry_after_is_read_in_each_of_its_forms(headers: dict[str, str], wait: float | None) -> None:
    assert retry_after_s(headers) == wait


def test_retry_after_as_a_date_counts_from_now() -> None:
    then = datetime.now(UTC) + timedelta(seconds=60)
    wait = retry_after_s({"retry-after": format_datetime(then, usegmt=True)})
    assert wait is not None
    # Counted from a moment between the two, and a date has whole seconds.
    assert (then - datetime.now(UTC)).total_seconds() - 1 < wait <= 60


@pytest.mark.parametrize(
    "text",
    [
        "Incorrect API key provided: sk-proj-abcdef012345. See …",
        "bad key sk-ant-api03-AAAA_BBBB-cccc",
        "Authorization: Bearer abcdef012345 refused",
        "key AIzaSyA0123456789abcdef is not valid",
    ],
)
def test_what_looks_like_a_key_is_taken_out(text: str) -> None:
    said = safe_message(text)
    assert "***" in said
    assert not any(part in said for part in ("abcdef0", "AAAA_BBBB", "0123456789"))


def test_the_key_that_was_sent_is_taken_out_whatever_it_looks_like() -> None:
    body = orjson.dumps({"error": {"message": "who is hunter2-of-mine?"}})
    assert str(status_error(401, {}, body, secret="hunter2-of-mine")).endswith("who is ***?")


def test_messages_are_bounded_and_on_one_line() -> None:
    said = safe_message("a\nb\x00c\x1b[31m" + "x" * 10_000_000)
    assert len(said) == MESSAGE_CHARS
    assert said.startswith("a b c [31m")


def test_a_key_at_the_end_of_what_is_kept_does_not_show_in_part() -> None:
    secret = "s3cr3t" * 8
    for before in range(MESSAGE_CHARS - 60, MESSAGE_CHARS + 5):
        assert "s3cr" not in safe_message("x" * before + secret, secret)
