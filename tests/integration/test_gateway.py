"""The gateway over real HTTP with a real store; no worker runs, so jobs stay queued until they are cancelled."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from promptmill import client
from promptmill.contract import Limits
from promptmill.keys import new_job_id
from promptmill.settings import Settings
from promptmill_gateway import body
from promptmill_gateway.app import open_gateway
from promptmill_relay import server
from tests.support.gateway import running_gateway
from tests.support.processes import wait_until
from tests.support.web import raw, request, serving

ECHO = {"prompt": "hello", "model": "echo"}


@asynccontextmanager
async def gateway(redis_url: str, **values: Any) -> AsyncGenerator[httpx.AsyncClient]:
    """A client of a running gateway."""
    async with running_gateway(Settings(redis_url=redis_url, **values)) as front:
        yield front.http


def port_of(http: httpx.AsyncClient) -> int:
    assert http.base_url.port is not None
    return http.base_url.port


def assert_problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Checks what every error has in common; answers its fields."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    fields = answer.json()
    assert fields["status"] == status
    assert fields["code"] == code
    assert fields["type"].endswith(code)
    assert fields["title"]
    assert fields["detail"]
    assert isinstance(fields["retryable"], bool)
    assert "Traceback" not in answer.text
    return fields


@pytest.fixture
def two_keys(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings with a key for each of two users that no other test has."""
    ann, bob = f"ann-{new_job_id()}", f"bob-{new_job_id()}"
    monkeypatch.setenv("TEST_KEY_ANN", "key-ann")
    monkeypatch.setenv("TEST_KEY_BOB", "key-bob")
    return {"api_keys": {ann: {"key_env": "TEST_KEY_ANN"}, bob: {"key_env": "TEST_KEY_BOB"}}}


ANN = {"Authorization": "Bearer key-ann"}
BOB = {"X-API-Key": "key-bob"}


async def test_a_submitted_job_is_answered_with_its_addresses(redis_url: str) -> None:
    async with gateway(redis_url) as http:
        answer = await http.post("/v1/jobs", json={**ECHO, "metadata": {"a": 1}})
        assert answer.status_code == 202
        job = answer.json()
        assert job["state"] == "queued"
        assert job["metadata"] == {"a": 1}
        assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
        shown = await http.get(answer.headers["location"])
        assert shown.json()["id"] == job["id"]
        assert shown.json()["stream_url"].startswith(f"/v1/jobs/{job['id']}/stream?expires=")


async def test_the_stream_url_of_the_answer_opens_the_stream_without_a_header(
    redis_url: str, two_keys: dict[str, Any]
) -> None:
    async with gateway(redis_url, **two_keys) as http:
        job = (await http.post("/v1/jobs", json=ECHO, headers=ANN)).json()
        async with request(port_of(http), job["stream_url"]) as stream:
            assert stream.status == 200
            (queued,) = await stream.read_events(1)
            assert (queued.type, queued.data) == ("progress", '{"type":"progress","phase":"queued"}')
            ended = await http.post(f"/v1/jobs/{job['id']}/cancel", json={"reason": "enough"}, headers=ANN)
            assert ended.json()["state"] == "cancelled"
            (cancelled,) = await stream.read_events()
            assert (cancelled.type, cancelled.data) == ("cancelled", '{"type":"cancelled","reason":"enough"}')
            assert stream.ended
        again = {"Last-Event-ID": cancelled.last_event_id}
        async with request(port_of(http), job["stream_url"], headers=again) as stream:
            assert stream.status == 204
        again = {"Last-Event-ID": queued.last_event_id}
        async with request(port_of(http), job["stream_url"], headers=again) as stream:
            assert await stream.read_events() == [cancelled]


async def test_two_gateways_know_each_others_signatures(redis_url: str, two_keys: dict[str, Any]) -> None:
    async with gateway(redis_url, **two_keys) as http, gateway(redis_url, **two_keys) as other:
        job = (await http.post("/v1/jobs", json=ECHO, headers=ANN)).json()
        async with request(port_of(other), job["stream_url"]) as stream:
            assert stream.status == 200
        async with request(port_of(other), job["stream_url"][:-2] + "xx") as stream:
            assert stream.status == 401


async def test_the_same_idempotency_key_is_the_same_job(redis_url: str) -> None:
    key = new_job_id()
    async with gateway(redis_url) as http:
        first = await http.post("/v1/jobs", json=ECHO, headers={"Idempotency-Key": key})
        again = await http.post("/v1/jobs", json={**ECHO, "idempotency_key": key})
        assert first.json()["id"] == again.json()["id"]
        other = {**ECHO, "prompt": "something else"}
        conflict = await http.post("/v1/jobs", json=other, headers={"Idempotency-Key": key})
        assert_problem(conflict, 409, "idempotency_conflict")


@pytest.mark.parametrize("key", ["", "x" * 201, "a\tb"])
async def test_a_bad_idempotency_key_is_refused(key: str, redis_url: str) -> None:
    async with gateway(redis_url) as http:
        answer = await http.post("/v1/jobs", json=ECHO, headers={"Idempotency-Key": key})
        assert assert_problem(answer, 400, "bad_request")["field"] == "idempotency_key"


async def test_two_different_idempotency_keys_are_refused(redis_url: str) -> None:
    async with gateway(redis_url) as http:
        answer = await http.post("/v1/jobs", json={**ECHO, "idempotency_key": "a"}, headers={"Idempotency-Key": "b"})
        assert assert_problem(answer, 400, "bad_request")["field"] == "idempotency_key"


@pytest.mark.parametrize(
    ("sent", "code", "field"),
    [
        (b"", "bad_request", "request"),
        (b"{", "bad_request", "request"),
        (b"[]", "bad_request", "request"),
        (b'{"prompt": "\xff"}', "bad_request", "request"),
        (b"[" * 100_000, "bad_request", "request"),
        (b'{"prompt": ""}', "bad_request", None),
        (b'{"prompt": "x", "max_token": 3}', "bad_request", "max_token"),
        (b'{"prompt": "x", "role": "chat", "model": "echo"}', "bad_request", None),
        (b'{"prompt": "x", "slot": "primary", "model": "echo"}', "bad_request", None),
        (b'{"prompt": "x", "model": "no-such-model"}', "unknown_model", None),
        (b'{"prompt": "x", "role": "no-such-role"}', "unknown_role", None),
    ],
)
async def test_a_bad_request_names_what_is_wrong(sent: bytes, code: str, field: str | None, redis_url: str) -> None:
    async with gateway(redis_url, models={"other": {"type": "echo"}}) as http:
        fields = assert_problem(await http.post("/v1/jobs", content=sent), 400, code)
        assert field is None or fields["field"] == field


@pytest.mark.parametrize(
    "metadata",
    [
        b'{"n": 100000000000000000000000000000}',
        b'{"n": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"n": NaN}',
        b'{"n": [-Infinity]}',
        b'{"n": 1e999}',
    ],
)
async def test_metadata_that_could_not_be_stored_as_it_is_is_refused(metadata: bytes, redis_url: str) -> None:
    async with gateway(redis_url) as http:
        answer = await http.post("/v1/jobs", content=b'{"prompt": "x", "model": "echo", "metadata": %s}' % metadata)
        assert assert_problem(answer, 400, "bad_request")["field"] == "metadata"


async def test_a_body_too_large_is_refused_before_it_has_come(redis_url: str) -> None:
    async with gateway(redis_url, limits=Limits(request_bytes=1000)) as http:
        announced = {"Content-Length": "1001"}
        async with request(port_of(http), "/v1/jobs", method="POST", headers=announced) as answer:
            assert answer.status == 413
            assert b'"limit":1000' in await answer.body()


async def test_a_body_without_an_announced_length_is_cut_off_at_the_limit(redis_url: str) -> None:
    async def endless() -> AsyncGenerator[bytes]:
        for _ in range(1000):
            yield b" " * 500

    async with gateway(redis_url, limits=Limits(request_bytes=1000)) as http:
        answer = await http.post("/v1/jobs", content=endless())
        fields = assert_problem(answer, 413, "too_large")
        assert (fields["field"], fields["limit"]) == ("request", 1000)


async def test_a_body_that_does_not_come_is_not_waited_for(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "IDLE_TIMEOUT_S", 0.1)
    async with gateway(redis_url) as http:
        unsent = {"Content-Length": "10"}
        async with request(port_of(http), "/v1/jobs", method="POST", headers=unsent) as answer:
            assert answer.status == 408
            assert b'"retryable":true' in await answer.body()


async def test_a_user_sees_and_stops_own_jobs_only(redis_url: str, two_keys: dict[str, Any]) -> None:
    async with gateway(redis_url, **two_keys) as http:
        path = (await http.post("/v1/jobs", json=ECHO, headers=ANN)).headers["location"]
        assert (await http.get(path, headers=ANN)).status_code == 200
        for answer in (
            await http.get(path, headers=BOB),
            await http.post(f"{path}/cancel", headers=BOB),
            await http.get(f"{path}/stream", headers=BOB),
        ):
            assert_problem(answer, 404, "not_found")
        assert (await http.get("/v1/jobs", headers=BOB)).json() == {"jobs": [], "next_cursor": None}
        assert (await http.get(path, headers=ANN)).json()["state"] == "queued"


async def test_a_jobs_user_is_its_keys_user(redis_url: str, two_keys: dict[str, Any]) -> None:
    ann, bob = two_keys["api_keys"]
    async with gateway(redis_url, **two_keys) as http:
        for sent in (ECHO, {**ECHO, "user": ann}):
            assert (await http.post("/v1/jobs", json=sent, headers=ANN)).json()["user"] == ann
        refused = await http.post("/v1/jobs", json={**ECHO, "user": bob}, headers=ANN)
        assert assert_problem(refused, 403, "not_authorised")["field"] == "user"
        assert_problem(await http.get("/v1/jobs", params={"user": bob}, headers=ANN), 403, "not_authorised")


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer nobody's"}, {"Authorization": "Basic a2V5"}])
async def test_without_a_good_key_nothing_is_answered(
    headers: dict[str, str], redis_url: str, two_keys: dict[str, Any]
) -> None:
    async with gateway(redis_url, **two_keys) as http:
        for method, path in (
            ("POST", "/v1/jobs"),
            ("GET", "/v1/jobs"),
            ("GET", "/v1/jobs/x"),
            ("GET", "/v1/jobs/x/stream"),
            ("POST", "/v1/jobs/x/cancel"),
        ):
            answer = await http.request(method, path, headers=headers)
            assert_problem(answer, 401, "not_authorised")
            assert answer.headers["www-authenticate"].startswith("Bearer")
        assert (await http.get("/healthz")).status_code == 200


async def test_jobs_are_listed_page_by_page_newest_first(redis_url: str) -> None:
    user = f"lister-{new_job_id()}"
    async with gateway(redis_url) as http:
        ids = [(await http.post("/v1/jobs", json={**ECHO, "user": user})).json()["id"] for _ in range(5)]
        await http.post(f"/v1/jobs/{ids[0]}/cancel")
        found: list[str] = []
        query: dict[str, Any] = {"user": user, "limit": 2}
        while True:
            page = (await http.get("/v1/jobs", params=query)).json()
            assert len(page["jobs"]) <= 2
            found += [job["id"] for job in page["jobs"]]
            if page["next_cursor"] is None:
                break
            query["cursor"] = page["next_cursor"]
        assert found == ids[::-1]
        ended = (await http.get("/v1/jobs", params={"user": user, "state": "cancelled"})).json()
        assert [job["id"] for job in ended["jobs"]] == ids[:1]


@pytest.mark.parametrize(
    ("query", "field"), [("limit=0", "limit"), ("limit=201", "limit"), ("limit=x", "limit"), ("state=odd", "state")]
)
async def test_a_bad_query_is_refused(query: str, field: str, redis_url: str) -> None:
    async with gateway(redis_url) as http:
        assert assert_problem(await http.get(f"/v1/jobs?{query}"), 400, "bad_request")["field"] == field


async def test_a_bad_cursor_is_refused(redis_url: str) -> None:
    async with gateway(redis_url) as http:
        assert_problem(await http.get("/v1/jobs?cursor=nonsense"), 400, "bad_request")


async def test_cancelling_needs_no_body_and_may_be_repeated(redis_url: str) -> None:
    async with gateway(redis_url) as http:
        path = (await http.post("/v1/jobs", json=ECHO)).headers["location"]
        for _ in range(2):
            answer = await http.post(f"{path}/cancel")
            assert answer.status_code == 200
            assert answer.json()["state"] == "cancelled"


@pytest.mark.parametrize("sent", [b"{", b'{"reason": ""}', b'{"reasons": "x"}', b'{"reason": 3}', b"[]"])
async def test_a_bad_reason_is_refused_and_the_job_goes_on(sent: bytes, redis_url: str) -> None:
    async with gateway(redis_url) as http:
        path = (await http.post("/v1/jobs", json=ECHO)).headers["location"]
        assert_problem(await http.post(f"{path}/cancel", content=sent), 400, "bad_request")
        assert (await http.get(path)).json()["state"] == "queued"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/jobs/no-such-job"),
        ("GET", "/v1/jobs/not%20an%20id"),
        ("GET", "/v1/jobs/{x}"),
        ("POST", "/v1/jobs/no-such-job/cancel"),
        ("GET", "/v1/jobs/no-such-job/stream"),
        ("GET", "/v2"),
        ("GET", "/"),
        ("GET", "/v1/jobs/"),
    ],
)
async def test_what_is_not_there_is_a_problem_with_404(method: str, path: str, redis_url: str) -> None:
    async with gateway(redis_url) as http:
        assert_problem(await http.request(method, path), 404, "not_found")


async def test_a_wrong_method_is_a_problem_that_names_the_right_ones(redis_url: str) -> None:
    async with gateway(redis_url) as http:
        answer = await http.delete("/v1/jobs")
        assert_problem(answer, 405, "bad_request")
        assert answer.headers["allow"] == "GET, POST"


async def test_what_should_not_fail_is_answered_without_a_trace(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(client.AsyncProducer, "get", fail)
    async with gateway(redis_url) as http:
        answer = await http.get("/v1/jobs/some-job")
        assert_problem(answer, 500, "internal")
        assert "secret" not in answer.text


async def test_health_is_told_without_the_store_and_readiness_with_its_reason(redis_url: str) -> None:
    async with gateway(redis_url) as http:
        assert (await http.get("/healthz")).json() == {"status": "ok"}
        ready = await http.get("/readyz")
        assert ready.json().keys() == {"ready", "reason", "workers", "families", "paused"}
        assert ready.status_code == (200 if ready.json()["ready"] else 503)


async def test_the_openapi_document_describes_every_path_with_schemas_that_exist(redis_url: str) -> None:
    async with gateway(redis_url) as http:
        document = (await http.get("/openapi.json")).json()
    assert set(document["paths"]) == {
        "/v1/jobs",
        "/v1/jobs/{job_id}",
        "/v1/jobs/{job_id}/cancel",
        "/v1/jobs/{job_id}/stream",
        "/v1/usage",
        "/healthz",
        "/readyz",
    }
    schemas = document["components"]["schemas"]
    missing = {ref for ref in _references(document) if ref.removeprefix("#/components/schemas/") not in schemas}
    assert not missing
    assert {"prompt", "messages", "model"} <= schemas["JobRequest"]["properties"].keys()
    stream = document["paths"]["/v1/jobs/{job_id}/stream"]["get"]
    assert "text/event-stream" in stream["responses"]["200"]["content"]
    assert len(schemas["Event"]["oneOf"]) == 7
    assert "422" not in str(document["paths"])


def _references(node: object) -> set[str]:
    if isinstance(node, dict):
        here = {value for key, value in node.items() if key == "$ref" and isinstance(value, str)}
        return here.union(*(_references(value) for value in node.values()))
    if isinstance(node, list):
        return set().union(*(_references(value) for value in node))
    return set()


async def test_a_watcher_that_fails_stops_the_server(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(self: object) -> None:
        raise ZeroDivisionError("a bug in the watcher")

    monkeypatch.setattr("promptmill.watch.Watcher.run", fail)
    monkeypatch.delenv("PROMPTMILL_LISTEN_FD", raising=False)
    with pytest.raises(ZeroDivisionError):
        await asyncio.to_thread(server.run, "gateway", Settings(redis_url=redis_url, port=0), open_gateway)


async def test_a_reader_that_leaves_is_unsubscribed(redis_url: str) -> None:
    settings = Settings(redis_url=redis_url)
    async with open_gateway(settings) as service, serving(service.app, service.streams) as running:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{running.port}", timeout=60) as http:
            path = (await http.post("/v1/jobs", json=ECHO)).headers["location"]
        async with request(running.port, f"{path}/stream") as stream:
            await stream.read_events(1)
            assert service.streams.open_streams == 1
        await wait_until(lambda: service.streams.open_streams == 0, "the stream is closed")
        async with raw(running.port):
            assert service.streams.open_streams == 0
