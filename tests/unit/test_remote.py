"""What a worker answers to Celery's remote control."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from celery.worker.consumer.control import Control
from celery.worker.control import Panel

from promptmill_workers.remote import ASKED, answer_only


def handlers(events: Any) -> dict[str, Any]:
    step = Control.__new__(Control)
    step.box = SimpleNamespace(node=SimpleNamespace(handlers=Panel.data))
    answer_only(SimpleNamespace(steps=[SimpleNamespace(), step]), events)
    return step.box.node.handlers


def test_what_only_looks_is_celerys_own_and_everything_else_is_refused() -> None:
    found = handlers(SimpleNamespace())
    ours = {"active_queues", "enable_events", "disable_events", "heartbeat"}
    assert found.keys() == Panel.data.keys()
    assert {name for name in found if found[name] is Panel.data[name]} == set(ASKED)
    for name in found.keys() - set(ASKED) - ours:
        assert "take no commands" in found[name](None, anything=1)["error"], name
    assert {"shutdown", "revoke", "terminate", "pool_grow", "time_limit"} <= found.keys() - set(ASKED) - ours


def test_both_queues_are_named_whether_they_are_consumed_or_not() -> None:
    queues = [SimpleNamespace(as_dict=lambda recurse, name=name: {"name": name}) for name in ("a", "a.batch")]
    state = SimpleNamespace(app=SimpleNamespace(conf=SimpleNamespace(task_queues=queues)))
    assert handlers(None)["active_queues"](state) == [{"name": "a"}, {"name": "a.batch"}]


@pytest.mark.parametrize("name", ["enable_events", "heartbeat"])
def test_who_asks_for_events_is_listened_to(name: str) -> None:
    said: list[str] = []
    events = SimpleNamespace(asked=lambda: said.append("asked"), refused=lambda: said.append("refused"))
    assert "ok" in handlers(events)[name](None)
    assert "ok" in handlers(events)["disable_events"](None)
    assert said == ["asked", "refused"]


def test_where_events_are_off_it_says_so() -> None:
    found = handlers(None)
    assert found["enable_events"](None) == {"error": "celery_events is off"}
    assert "ok" in found["disable_events"](None)


def test_celerys_own_commands_are_left_as_they_were() -> None:
    before = dict(Panel.data)
    handlers(None)
    assert Panel.data == before
