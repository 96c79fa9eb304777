"""Who begins with a message, and how often it is looked whether the event loop turns."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest
from kombu.asynchronous.timer import Timer

from promptmill_workers.consumer import Consumer
from promptmill_workers.turning import Begin, Turning


def test_only_the_first_decides() -> None:
    begin = Begin()
    assert [begin.decide(), begin.decide()] == [True, False]


async def test_a_loop_that_has_not_turned_for_long_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)  # a machine that pauses here is no loop that stands still
    turning = Turning()
    turning.start()
    assert not turning.stands_still
    monkeypatch.setattr(time, "monotonic", lambda: now + 60)
    found: list[bool] = []
    turning.found = lambda: found.append(True)
    begin = Begin()
    assert turning.stands_still
    assert not turning.begins(begin), "what it was brought goes back at once"
    assert found == [True]
    assert not begin.decide(), "and is begun by nobody"
    turning.stop()
    await asyncio.sleep(0)


def test_however_often_the_broker_is_reached_again_one_timer_looks() -> None:
    timer = Timer()
    consumer: Any = object.__new__(Consumer)
    consumer._looking, consumer._returned = None, []
    consumer._follow = consumer._follow_turning = lambda: None
    consumer._controller = SimpleNamespace(consumer=SimpleNamespace(timer=timer))
    for _ in range(5):
        consumer._connected()
    live = [scheduled.entry for scheduled in timer.queue if not scheduled.entry.canceled]
    assert len(live) == 1
