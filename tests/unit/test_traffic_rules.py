"""What counts against whom, and what a worker believes of what it is told."""

from __future__ import annotations

import pytest

from promptmill.failures import CLASSES
from promptmill.settings import ModelConfig, ModelLimits
from promptmill.traffic.health import Book, Health
from promptmill.traffic.rules import host_subject, verdicts
from promptmill.traffic.waits import SLOT_WAIT_S, Line, Paces

S = 1_000_000


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (None, ("ok", "ok")),
        ("refused", ("ok", "ok")),
        ("bad_request", ("ok", "ok")),
        ("rate_limited", ("sick", "ok")),
        ("overloaded", ("sick", "ok")),
        ("timeout_first_token", ("sick", "ok")),
        ("unreachable", ("neutral", "sick")),
        ("timeout_connect", ("neutral", "sick")),
        ("cut", ("neutral", "neutral")),
        ("auth", ("neutral", "neutral")),
        ("cancelled", ("neutral", "neutral")),
    ],
)
def test_a_failure_counts_against_the_model_or_its_host(code: str | None, expected: tuple[str, str]) -> None:
    assert verdicts(code) == expected


def test_every_class_that_says_something_of_health_counts_somewhere_and_no_other_does() -> None:
    for code, failure in CLASSES.items():
        assert ("sick" in verdicts(code)) == failure.sick, code


def test_models_share_a_host_by_address_without_credentials_and_path() -> None:
    def at(url: str | None, kind: str = "local_openai") -> str:
        return host_subject(ModelConfig.model_construct(type=kind, api_url=url))

    assert at("http://key:secret@gpu:8000/v1") == at("http://gpu:8000/other") == "host:gpu:8000"
    assert at("http://gpu:8001") != at("http://gpu:8000")
    assert at(None, "anthropic_api") == "host:anthropic_api"
    assert at("http://a{b}c/v1") == "host:abc"


def test_an_older_message_changes_nothing_and_a_newer_one_does() -> None:
    book = Book()
    book.tell("model:m", {"hold": str(130 * S), "why": "cooldown"}, 100 * S, 0.0)
    book.tell("model:m", {}, 99 * S, 0.0)
    assert book.entries["model:m"].hold_until == 30.0
    book.tell("model:m", {"open": "1", "until": str(102 * S)}, 101 * S, 31.0)
    assert book.entries["model:m"].open_until == 32.0
    assert book.tell("model:m", {}, 103 * S, 33.0) is None
    book.tell("model:m", {"open": "1", "until": str(102 * S)}, 101 * S, 33.0)
    assert book.entries == {}


def test_a_clock_of_redis_that_was_set_back_is_not_the_past() -> None:
    book = Book()
    book.tell("model:m", {"open": "1", "until": str(9000 * S)}, 9000 * S, 0.0)
    assert book.tell("model:m", {}, 5000 * S, 1.0) is None
    assert book.entries == {}


def test_a_wait_that_was_learned_here_outlives_a_store_that_forgot_it() -> None:
    book = Book()
    book.hold("model:m", 30.0, "requests", 0.0)
    book.tell("model:m", {}, 100 * S, 1.0)
    left, why = book.entries["model:m"].refusal(1.0) or (0.0, None)
    assert why == "requests"
    assert 29 <= left <= 31
    assert book.tell("model:m", {}, 101 * S, 31.0) is None


def test_people_see_what_is_wrong_and_nothing_that_is_over() -> None:
    fields = {"ring": "1", "code": "overloaded", "hold": str(90 * S), "cap": "3", "capend": str(110 * S)}
    (failing, reduced) = Health.of(fields, 100 * S, 0.0).cooldowns("model:a:b", 0.0)
    assert (failing.name, failing.state, failing.code) == ("a:b", "failing", "overloaded")
    assert (reduced.state, reduced.concurrency, reduced.for_s) == ("reduced", 3, 10.0)
    opened = Health.of({"open": "1", "until": str(100 * S)}, 101 * S, 0.0)
    assert [c.state for c in opened.cooldowns("host:h", 0.0)] == ["half-open"]


def test_a_minute_never_gets_more_than_four_hundredths_at_once() -> None:
    paces = Paces(ModelLimits(requests_per_minute=100, tokens_per_minute=6000), 60.0)
    assert (paces.request_us, paces.token_us) == (0.6 * S, 0.01 * S)
    assert paces.burst_requests_us == 4 * 0.6 * S
    assert paces.burst_tokens_us == 2.4 * S
    assert Paces(ModelLimits(requests_per_minute=10), 60.0).burst_requests_us == 0


def test_many_who_wait_are_spread_and_one_alone_is_not_kept_waiting() -> None:
    line = Line()
    line.closed_until, line.reason = 1.0, "requests"
    assert 1.0 <= line.wait_s(0.0, 0.1 * S) <= 1.0 + SLOT_WAIT_S
    waits = [line.wait_s(0.0, 0.1 * S) for _ in range(400)]
    assert min(waits) >= 1.0
    assert max(waits) > 3.0
    assert max(waits) < 1.0 + 401 * 0.1 / 4 + SLOT_WAIT_S  # four times as dense as places come free
    assert line.waiting(0.5) == 401
    assert line.waiting(12.0) == 0
