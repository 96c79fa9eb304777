"""When a model whose login expired is asked again, and what operators hear of it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import pytest

from promptmill.errors import BackendError
from promptmill.routing import Route
from promptmill.settings import ModelConfig
from promptmill_workers import pauses
from promptmill_workers.backends.base import Call, Item
from promptmill_workers.pauses import PROBE_AFTER_S, Pauses

ROUTE = Route("c", ModelConfig(type="claude_cli"))
EXPIRED = BackendError("the login has expired", code="auth_expired")


class Backend:
    def __init__(self, login: str | None) -> None:
        self.login = login

    def login_fingerprint(self) -> str | None:
        return self.login

    def complete(self, call: Call) -> AsyncGenerator[Item, None]:
        raise AssertionError("never called")

    async def aclose(self) -> None:
        return


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def paused(said: list[str]) -> Pauses:
    def publish(event: dict[str, Any]) -> None:
        said.append(event["event"])

    return Pauses(publish)


def test_a_login_renewed_while_a_call_was_under_way_is_not_paused_for_the_old_ones_refusal(
    paused: Pauses, said: list[str]
) -> None:
    backend = Backend("old")
    began_with = paused.check(ROUTE, backend)
    backend.login = "new"
    paused.expired(ROUTE, backend, began_with, EXPIRED)
    assert (paused.names, said) == ([], [])
    assert paused.check(ROUTE, backend) == "new"


def test_a_slow_call_with_the_old_login_does_not_pause_a_model_that_was_resumed(
    paused: Pauses, said: list[str]
) -> None:
    backend = Backend("old")
    slow, quick = paused.check(ROUTE, backend), paused.check(ROUTE, backend)
    paused.expired(ROUTE, backend, quick, EXPIRED)
    with pytest.raises(BackendError, match="paused until its login is renewed"):
        paused.check(ROUTE, backend)
    backend.login = "new"
    assert paused.check(ROUTE, backend) == "new"
    paused.expired(ROUTE, backend, slow, EXPIRED)
    assert paused.check(ROUTE, backend) == "new"
    assert said == ["claude_auth_expired", "claude_auth_renewed"]


def test_a_login_without_a_file_is_tried_by_one_job_after_a_while_and_resumed_only_by_its_answer(
    paused: Pauses, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, now = Backend(None), 1000.0
    monkeypatch.setattr(pauses.time, "monotonic", lambda: now)
    paused.expired(ROUTE, backend, paused.check(ROUTE, backend), EXPIRED)
    for _ in range(2):
        now += PROBE_AFTER_S + 1
        began_with = paused.check(ROUTE, backend)  # this one may
        with pytest.raises(BackendError):
            paused.check(ROUTE, backend)
        paused.expired(ROUTE, backend, began_with, EXPIRED)
    assert said == ["claude_auth_expired"], "what is still so is said once"
    now += PROBE_AFTER_S + 1
    paused.check(ROUTE, backend)
    paused.answered(ROUTE)
    assert (paused.names, said) == ([], ["claude_auth_expired", "claude_auth_renewed"])
