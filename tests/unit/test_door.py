import pytest

from promptmill.settings import Settings
from promptmill_relay.door import Door, is_loopback
from promptmill_relay.problem import Receive, Scope, Send, respond
from tests.support.web import call_asgi

PAGE = "https://page.example"


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    await respond(send, 200, [(b"content-type", b"text/plain")], b"hello")


def door(*origins: str, is_open: bool = False) -> Door:
    return Door(hello, Settings(cors_origins=list(origins)), is_open=is_open)


async def test_an_origin_of_the_configuration_may_read_the_answer() -> None:
    status, headers, body = await call_asgi(door(PAGE), "GET", "/", {"Origin": PAGE})
    assert (status, body) == (200, b"hello")
    assert headers["access-control-allow-origin"] == PAGE
    assert headers["vary"] == "Origin"


async def test_another_origin_may_not_and_caches_are_told() -> None:
    status, headers, _ = await call_asgi(door(PAGE), "GET", "/", {"Origin": "https://evil.example"})
    assert status == 200
    assert "access-control-allow-origin" not in headers
    assert headers["vary"] == "Origin"


async def test_a_star_lets_every_origin_read() -> None:
    _, headers, _ = await call_asgi(door("*"), "GET", "/", {"Origin": "https://any.example"})
    assert headers["access-control-allow-origin"] == "*"


async def test_without_origins_no_header_is_added() -> None:
    _, headers, _ = await call_asgi(door(), "GET", "/", {"Origin": PAGE})
    assert headers == {"content-type": "text/plain"}


async def test_a_preflight_allows_the_headers_that_readers_and_submitters_send() -> None:
    asked = {"Origin": PAGE, "Access-Control-Request-Method": "GET"}
    status, headers, body = await call_asgi(door(PAGE), "OPTIONS", "/v1/jobs/x/stream", asked)
    assert (status, body) == (204, b"")
    for name in ("Last-Event-ID", "Authorization", "Idempotency-Key", "X-API-Key", "Content-Type"):
        assert name in headers["access-control-allow-headers"]


async def test_a_preflight_of_another_origin_allows_nothing() -> None:
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    _, headers, _ = await call_asgi(door(PAGE), "OPTIONS", "/v1/jobs", asked)
    assert not [name for name in headers if name.startswith("access-control-allow")]


@pytest.mark.parametrize("host", ["127.0.0.1:8080", "localhost", "[::1]:8080", "LOCALHOST:1", "127.1.2.3"])
async def test_without_keys_a_loopback_host_is_answered(host: str) -> None:
    status, _, _ = await call_asgi(door(is_open=True), "POST", "/v1/jobs", {"Host": host})
    assert status == 200


@pytest.mark.parametrize("host", ["rebound.example", "127.0.0.1.evil.example:8080", "10.0.0.1", "", "[::2]"])
async def test_without_keys_another_host_is_refused_because_names_can_be_rebound(host: str) -> None:
    status, headers, body = await call_asgi(door(is_open=True), "GET", "/v1/jobs", {"Host": host})
    assert status == 403
    assert headers["content-type"] == "application/problem+json"
    assert b'"code":"not_authorised"' in body


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:9999"])
async def test_without_keys_a_page_of_another_origin_cannot_submit(origin: str) -> None:
    sent = {"Host": "127.0.0.1:8080", "Origin": origin}
    assert (await call_asgi(door(is_open=True), "POST", "/v1/jobs", sent))[0] == 403
    assert (await call_asgi(door(origin, is_open=True), "POST", "/v1/jobs", sent))[0] == 200


async def test_without_keys_a_page_of_the_same_origin_can_submit() -> None:
    sent = {"Host": "127.0.0.1:8080", "Origin": "http://127.0.0.1:8080"}
    assert (await call_asgi(door(is_open=True), "POST", "/v1/jobs", sent))[0] == 200


async def test_with_keys_any_host_is_answered() -> None:
    status, _, _ = await call_asgi(door(), "POST", "/", {"Host": "mill.example", "Origin": "https://evil.example"})
    assert status == 200


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("a.example", False),
    ],
)
def test_loopback_is_told_from_the_rest(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
