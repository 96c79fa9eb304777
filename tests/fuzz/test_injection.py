"""No text, wherever it comes from, can pose as another event, as a header, or as another field of an answer."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promptmill import AsyncProducer, keys
from promptmill.contract import Cancelled, Confirm, Done, Error, Progress, Restart, Token
from promptmill.errors import CODES, BackendError, PromptmillError
from promptmill.reading.frame import frame
from promptmill.settings import Settings
from promptmill.store import Claimed, Store
from promptmill.text import clean_text
from promptmill_relay import sse
from promptmill_relay.problem import encode_problem
from tests.support.event_source import EventSourceParser, Message
from tests.support.gateway import running_gateway
from tests.support.web import request

NASTY = (
    "a\r\n\r\nevent: done\r\ndata: {}\r\n\r\n",
    'x\n\nid: 9-9\nevent: done\ndata: {"type":"done"}\n\n',
    "one\rtwo\x0bthree\x0cfour\x1cfive\x85six\u2028seven\u2029eight",
    "nul\0bell\x07escape\x1b[31m\x7f\ufeff",
    'quote" brace} comma, \\ "type":"done"',
    "lone \ud800 half, \udfff other, pair \U0001f600",
    "Set-Cookie: a=b\r\nX-Forged: 1",
)
TEXT = st.one_of(
    st.sampled_from(NASTY), st.text(), st.text(st.sampled_from('\r\n\0\v\f\x85\u2028\u2029": {}id-1\ud800'))
)
CLEAN = TEXT.map(clean_text)
EVENTS = st.one_of(
    st.builds(Token, text=CLEAN),
    st.builds(Restart, reason=CLEAN),
    st.builds(Progress, phase=CLEAN, message=CLEAN, backend=CLEAN, model=CLEAN),
    st.builds(Error, code=CLEAN, message=CLEAN, retryable=st.booleans()),
    st.builds(Cancelled, reason=CLEAN),
    st.builds(Done, text=CLEAN, model=CLEAN, backend=CLEAN, finish_reason=CLEAN, attempt=st.just(1)),
    st.builds(Confirm, call_id=CLEAN, tool=CLEAN, arguments=st.dictionaries(CLEAN, CLEAN), expires_at=st.datetimes()),
)
HEADER_ENDS = re.compile(rb"[\r\n\0]")


@settings(deadline=None)
@given(st.lists(EVENTS, min_size=1, max_size=6))
def test_every_event_arrives_as_itself_whatever_text_it_carries(events: list[Any]) -> None:
    stored = [event.to_json() for event in events]
    frames = [frame(b"7-%d" % n, data) for n, data in enumerate(stored, 1)]
    messages = EventSourceParser().feed(sse.encode(frames))
    expected = [(event.type, data.decode()) for event, data in zip(events, stored, strict=True)]
    assert messages == [Message(kind, data, f"7-{n}") for n, (kind, data) in enumerate(expected, 1)]
    for event, message in zip(events, messages, strict=True):
        assert json.loads(message.data)["type"] == event.type


@settings(deadline=None)
@given(
    message=TEXT,
    field=st.none() | TEXT,
    code=st.sampled_from(sorted(CODES)),
    limit=st.none() | st.integers(0, 10**9),
    wait=st.none() | st.floats(),
)
def test_an_error_over_http_is_one_json_object_and_its_headers_hold_nothing_of_it(
    message: str, field: str | None, code: str, limit: float | None, wait: float | None
) -> None:
    error = PromptmillError(message, code=code, field=field, limit=limit, retry_after_s=wait)
    status, headers, body = encode_problem(error)
    assert not HEADER_ENDS.search(body)
    fields = json.loads(body)
    assert fields["detail"] == clean_text(message)
    assert fields.get("field") == (None if field is None else clean_text(field))
    assert (fields["status"], fields["code"]) == (status, code)
    for name, value in headers:
        assert not HEADER_ENDS.search(name + value)
    assert {name for name, _ in headers} <= {
        b"content-type",
        b"content-length",
        b"cache-control",
        b"x-content-type-options",
        b"retry-after",
        b"www-authenticate",
    }


@pytest.mark.parametrize("nasty", NASTY)
async def test_through_a_real_gateway_a_jobs_texts_come_back_as_they_were(
    nasty: str, redis_url: str, store: Store
) -> None:
    """What a producer, a user, a provider and an operator can put into a job."""
    clean = clean_text(nasty)
    async with (
        running_gateway(Settings(redis_url=redis_url)) as front,
        AsyncProducer(Settings(redis_url=redis_url), store=store) as producer,
    ):
        job = await producer.submit(nasty, model="echo", metadata={"note": nasty})
        token = keys.new_token()
        assert isinstance(await store.claim(job.id, token, "w", Progress(phase="started", message=clean)), Claimed)
        error = Error(code="refused", message=clean, retryable=False)
        end = {"error": error.model_dump(exclude={"type"}, exclude_none=True)}
        assert await store.finish(job.id, token, "failed", error.to_json(), end, [])
        async with request(front.port, f"/v1/jobs/{job.id}/stream") as stream:
            events = await stream.read_events()
        assert [event.type for event in events] == ["progress", "progress", "error"]
        assert json.loads(events[1].data)["message"] == clean
        assert json.loads(events[2].data)["message"] == clean
        shown = await front.http.get(f"/v1/jobs/{job.id}")
        assert shown.json()["metadata"] == {"note": clean}
        assert shown.json()["error"]["message"] == clean
        other = await producer.submit("x", model="echo")
        stopped = await front.http.post(f"/v1/jobs/{other.id}/cancel", content=json.dumps({"reason": nasty}))
        assert stopped.json()["state"] == "cancelled"
        async with request(front.port, f"/v1/jobs/{other.id}/stream") as stream:
            (*_, last) = await stream.read_events()
        assert json.loads(last.data) == {"type": "cancelled", "reason": clean}


@pytest.mark.parametrize("nasty", NASTY)
@pytest.mark.parametrize("field", ["model", "user", "idempotency_key", "role", "unknown"])
async def test_names_with_line_ends_are_refused_in_an_answer_that_nothing_poses_in(
    field: str, nasty: str, redis_url: str
) -> None:
    async with running_gateway(Settings(redis_url=redis_url, models={"m": {"type": "echo"}})) as front:
        body = {"prompt": "x", nasty if field == "unknown" else field: nasty}
        answer = await front.http.post("/v1/jobs", content=json.dumps(body))
        fields = answer.json()
        if answer.status_code == 202:
            assert "\n" not in clean_text(nasty)
            assert "\r" not in clean_text(nasty)
            return
        assert answer.status_code == 400
        assert fields["code"] in {"bad_request", "unknown_model", "unknown_role"}
        assert "x-forged" not in answer.headers
        assert "set-cookie" not in answer.headers
        assert answer.headers["content-type"] == "application/problem+json"


@settings(deadline=None)
@given(message=TEXT, code=st.sampled_from(sorted(CODES)))
def test_what_a_provider_says_survives_as_an_event_of_its_own(message: str, code: str) -> None:
    error = BackendError(clean_text(message), code=code)
    event = Error(code=error.code, message=error.message, retryable=error.retryable)
    (seen,) = EventSourceParser().feed(sse.encode([frame(b"1-1", event.to_json())]))
    assert (seen.type, json.loads(seen.data)["message"]) == ("error", clean_text(message))
