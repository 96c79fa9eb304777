"""What a process has done lately."""

from __future__ import annotations

from promptmill.rolling import Rates, Recent
from promptmill_workers.counts import Counts


def test_rates_are_of_the_last_ten_seconds() -> None:
    rates = Rates()
    assert rates.note(100, 0, 7) == [0.0, 0.0]
    assert rates.note(102, 10, 7) == [5.0, 0.0]
    for second in range(104, 131, 2):
        found = rates.note(second, 10, 7 + second)
    assert found == [0.0, 1.0]


def test_rates_hold_where_they_are_noted_seldom() -> None:
    rates = Rates()
    rates.note(0, 0)
    assert rates.note(60, 120) == [2.0]
    assert rates.note(120, 120) == [0.0]


def test_what_happened_is_forgotten_after_five_minutes() -> None:
    recent = Recent()
    recent.note(0, "auth")
    recent.note(5, "auth")
    recent.note(200, "cut")
    assert recent.counts(290) == {"auth": 2, "cut": 1}
    assert recent.counts(301) == {"cut": 1}
    assert recent.counts(600) == {}


def test_a_worker_tells_how_its_jobs_ended() -> None:
    now = 0.0
    counts = Counts(lambda: now)
    counts.told(0)
    counts.ended("A", "succeeded", {"model": "sonnet"})
    counts.ended("B", "failed", {"error": {"code": "cut"}})
    counts.stopped("C")
    now = 4.0
    assert counts.told(40) == {
        "up_s": 4.0,
        "ended": {"succeeded": 1, "failed": 1, "stopped": 1},
        "pieces": 40,
        "jobs_s": 0.5,
        "pieces_s": 10.0,
        "failures": {"cut": 1},
    }
