"""A rolling restart under load: nothing is lost, no attempt is used up, and no reader misses an event."""

from __future__ import annotations

import pytest
from ops.bench.rolling import Plan, experiment

pytestmark = pytest.mark.xdist_group("rolling")


async def test_restarting_every_process_under_load_loses_nothing() -> None:
    # Jobs of two seconds and a shorter drain: each worker that ends hands some back.
    plan = Plan(workers=2, rounds=1, jobs_per_s=6, tokens=20, rate=10, drain_s=0.2)
    out = await experiment(plan)
    assert out.problems == []
    assert out.handed_back, "no job changed hands: nothing was shown"
    assert out.reconnected, "no reader lost its server: nothing was shown"
    assert {what: len(took) for what, took in out.restarts.items() if what != "server"} == {
        "worker": 4,
        "gateway": 1,
        "relay": 1,
    }
