"""The gateway asked by its own description, and sent bytes that are hardly HTTP; ``python -m ops.fuzz`` for longer."""

from __future__ import annotations

import traceback
from collections.abc import Generator

import pytest
from ops.fuzz import gateway, http

SEED = 20_261_122
CLOSE = b"Connection: close\r\n"
OPERATIONS = {
    "POST /v1/jobs": 90,
    "GET /v1/jobs": 60,
    "GET /v1/jobs/{job_id}": 40,
    "POST /v1/jobs/{job_id}/cancel": 60,
    "GET /v1/jobs/{job_id}/stream": 60,
    "GET /v1/usage": 60,
    "GET /healthz": 1,
    "GET /readyz": 1,
}
"""What is asked how often: some twenty seconds in all on an idle machine."""

pytestmark = [pytest.mark.xdist_group("fuzz")]


@pytest.fixture(scope="module")
def running() -> Generator[gateway.Gateway]:
    with gateway.running() as started:
        yield started
        assert started.complaints() == []
        # Anybody can send nonsense: a line for each would let anybody fill the log.
        assert "Invalid HTTP" not in started.log.read_text()


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_answer_is_one_that_the_document_describes(name: str, running: gateway.Gateway) -> None:
    found = gateway.operations(running)
    assert set(found) == set(OPERATIONS)
    asked = gateway.fuzz(running, found[name], examples=OPERATIONS[name], seed=SEED)
    assert asked > 0


def test_an_answer_that_the_document_does_not_describe_is_found(running: gateway.Gateway) -> None:
    document = gateway.document(running)
    document["components"]["schemas"]["JobList"]["properties"]["next_cursor"] = {"type": "integer"}
    del document["paths"]["/v1/jobs/{job_id}"]["get"]["responses"]["404"]
    changed = gateway.operations(running, document)
    for name, expected in (("GET /v1/jobs", 'is not of type "integer"'), ("GET /v1/jobs/{job_id}", "Received: 404")):
        with pytest.raises(gateway.FailureGroup, match="1 distinct failure") as caught:
            gateway.fuzz(running, changed[name], examples=30, seed=SEED)
        assert expected in "".join(traceback.format_exception(caught.value))


def test_bytes_that_are_hardly_http_are_refused_and_fail_nothing(running: gateway.Gateway) -> None:
    assert http.fuzz(running.port, examples=600, seed=SEED) > 100


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n" + CLOSE + b"\r\n", [200]),
        (b"GET /v1/jobs HTTP/1.1\r\nHost: evil.example\r\n" + CLOSE + b"\r\n", [403]),
        (b"\0\0\0\0\r\n\r\n", [400]),
        (
            b"POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\n" + CLOSE + b'Content-Length: 13\r\n\r\n{"\\ud800": 1}',
            [400],
        ),
        (b"POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: http://[\r\n" + CLOSE + b"\r\n", [403]),
        (b"GET /v1/jobs?cursor=%ff%00 HTTP/1.1\r\nHost: 127.0.0.1\r\n" + CLOSE + b"\r\n", [400]),
        (b"GET /v1/jobs/%ed%a0%80/stream HTTP/1.1\r\nHost: 127.0.0.1\r\n" + CLOSE + b"\r\n", [404]),
    ],
)
def test_known_bytes_have_a_known_answer(sent: bytes, expected: list[int], running: gateway.Gateway) -> None:
    # The end of what is sent is not told before the answer was read: it counts as the reader's leaving.
    assert http.statuses(running.port, sent, half_close=False) == expected
