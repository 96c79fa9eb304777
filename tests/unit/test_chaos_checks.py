"""The chaos suite's checks: each passes a good run, and each fails on the one thing that it is there for."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
from ops.chaos.checks import CHECKS, check, text_of
from ops.chaos.facts import Books, Event, Facts, JobFacts, Provider, View, read_facts
from ops.chaos.figures import figures, pickups, shown, started

PROMPT = "one two "
LOG: list[Event] = [
    ("100-1", {"type": "progress", "phase": "queued"}),
    ("110-1", {"type": "progress", "phase": "started"}),
    ("110-2", {"type": "token", "text": "one "}),
    ("9000-1", {"type": "progress", "phase": "requeued"}),
    ("9000-2", {"type": "restart"}),
    ("9500-1", {"type": "progress", "phase": "started"}),
    ("9500-2", {"type": "token", "text": "one "}),
    ("9500-3", {"type": "token", "text": "two "}),
    ("9900-1", {"type": "done", "text": PROMPT}),
]
TRIES = {"tries": ["x:lost"], "presumed": ["x:lost"]}
CUT: list[Event] = [
    ("200-1", {"type": "progress", "phase": "queued"}),
    ("210-1", {"type": "progress", "phase": "started"}),
    ("210-2", {"type": "token", "text": "thr"}),
    ("300-1", {"type": "cancelled"}),
]


def good() -> Facts:
    """A run in which one job lost its worker and was run again, and another was cancelled."""
    first = JobFacts(job_id="a", key="chaos-0", prompt=PROMPT, log=deepcopy(LOG), state="succeeded", text=PROMPT)
    first.tries, first.crashes = ["x:lost", "y:1"], 1
    second = JobFacts(job_id="b", key="chaos-1", prompt="three ", log=deepcopy(CUT), state="cancelled", text="thr")
    second.tries, second.cancel_asked = ["z:lost"], True
    facts = Facts(jobs={"a": first, "b": second}, known_jobs=["a", "b"], pickup_p99_max_s=12)
    late: list[Event] = [("9900-0", {"type": "token", "text": PROMPT}), deepcopy(LOG[-1])]
    facts.views = [
        View(reader="0.0", job_id="a", how="relay", events=deepcopy(LOG)),
        View(reader="1.0", job_id="b", how="library", events=deepcopy(CUT)),
        View(reader="late.0", job_id="a", how="late", events=late),
    ]
    facts.faults = [{"fault": "kill", "target": "w0", "killed_ms": 500, "held": [["a", 110]]}]
    facts.cancels = [{"job": "b", "asked_ms": 290, "state": "cancelled"}]
    facts.first_end_ms = {"a": 9910, "b": 310}
    facts.exits = [
        {"part": "w0", "code": -9, "expected": True, "told": False},
        {"part": "w0", "code": 0, "expected": True, "told": True},
    ]
    facts.provider = Provider(requests={"chaos-0": 2, "chaos-1": 1})
    entries = {"a": ["x:lost", "y:1"], "b": ["z:lost"]}
    facts.books = Books(entries=entries, entries_sum=[3, 9, 9], reported_sum=[3, 9, 9])
    return facts


def test_a_good_run_holds() -> None:
    assert check(good()) == []


def _late_after_an_outage(facts: Facts) -> None:
    facts.faults.append({"fault": "store_kill", "began_ms": 1000, "over_ms": 2000})
    facts.pickup_p99_max_s = 7.4


BREAKS: dict[str, tuple[str, str, Callable[[Facts], object]]] = {
    "a key made two jobs": ("submissions", "", lambda f: f.doubled_keys.append("chaos-0")),
    "a job is not listed": ("submissions", "a", lambda f: f.known_jobs.remove("a")),
    "a job that nobody submitted": ("submissions", "c", lambda f: f.known_jobs.append("c")),
    "no end event": ("ends", "a", lambda f: f.jobs["a"].log.pop()),
    "two end events": ("ends", "a", lambda f: f.jobs["a"].log.append(("9901-1", {"type": "done", "text": PROMPT}))),
    "an event behind the end": ("ends", "a", lambda f: f.jobs["a"].log.append(("9901-1", {"type": "progress"}))),
    "another state than the end's": ("ends", "b", lambda f: setattr(f.jobs["b"], "state", "succeeded")),
    "a job failed": ("outcomes", "a", lambda f: setattr(f.jobs["a"], "state", "failed")),
    "a job runs still": ("outcomes", "a", lambda f: setattr(f.jobs["a"], "state", "running")),
    "nobody cancelled": ("outcomes", "b", lambda f: setattr(f.jobs["b"], "cancel_asked", False)),
    "a gap in the log": ("logs", "a", lambda f: f.jobs["a"].log.pop(6)),
    "an epoch without its first event": ("logs", "a", lambda f: f.jobs["a"].log.pop(5)),
    "an older epoch behind a newer one": ("logs", "a", lambda f: f.jobs["a"].log.insert(8, ("110-3", {"type": "x"}))),
    "a reader without an end": ("views", "a", lambda f: f.views[0].events.pop()),
    "a reader that saw nothing": ("views", "a", lambda f: f.views[0].events.clear()),
    "a late reader without an end": ("views", "a", lambda f: f.views[2].events.pop()),
    "a reader missed the first event": ("views", "a", lambda f: f.views[0].events.pop(0)),
    "a reader missed an event": ("views", "a", lambda f: f.views[0].events.pop(2)),
    "a reader saw an event twice": ("views", "a", lambda f: f.views[0].events.insert(3, LOG[2])),
    "a reader saw an event without its id": ("views", "a", lambda f: f.views[0].events.insert(3, (None, LOG[2][1]))),
    "a reader saw what the log does not hold": (
        "views",
        "a",
        lambda f: f.views[0].events.insert(3, ("110-3", {"type": "token", "text": "x"})),
    ),
    "a reader saw another text": ("views", "a", lambda f: f.views[0].events[2][1].update(text="ONE ")),
    "the record has another text": ("texts", "b", lambda f: setattr(f.jobs["b"], "text", "th")),
    "the text is not the provider's": ("texts", "a", lambda f: setattr(f.jobs["a"], "prompt", "one")),
    "the done event has another text": ("texts", "a", lambda f: f.jobs["a"].log[-1][1].update(text="one")),
    "a late reader got another text": ("texts", "a", lambda f: f.views[2].events.pop(0)),
    "a reader was sent away": ("streams", "a", lambda f: f.refused.append({"job": "a", "reader": "0", "status": 404})),
    "an attempt is not booked": ("usage", "a", lambda f: f.books.entries["a"].pop()),
    "an attempt is booked twice": ("usage", "a", lambda f: f.books.entries["a"].append("y:1")),
    "an attempt that no record has is booked": ("usage", "b", lambda f: f.books.entries["b"].append("z:2")),
    "a job that nobody submitted is booked": ("usage", "c", lambda f: f.books.entries.update(c=["q:1"])),
    "the sums are not those of the entries": ("usage", "", lambda f: f.books.reported_sum.append(1)),
    "verify finds something": ("usage", "", lambda f: f.books.differences.append("in: 3, not 4")),
    "the provider was asked more often": ("requests", "a", lambda f: f.provider.requests.update({"chaos-0": 3})),
    "a key without a time to live": ("remains", "", lambda f: f.remains.keys_without_ttl.append("pm:x")),
    "a job waits for ever": ("remains", "", lambda f: f.remains.waiting.update(outbox=1)),
    "a worker was given up that nobody killed": ("deaths", "a", lambda f: setattr(f.jobs["a"], "crashes", 2)),
    "a process is left": ("remains", "", lambda f: f.remains.processes.append("7 sleep")),
    "a socket is left": ("remains", "", lambda f: f.remains.sockets.append("relay")),
    "a file is left": ("remains", "", lambda f: f.remains.files.append("x")),
    "a connection to the provider is open": ("remains", "", lambda f: setattr(f.provider, "open_connections", 1)),
    "a part ended by itself": ("processes", "", lambda f: f.exits[0].update(expected=False)),
    "a part did not stop well": ("processes", "", lambda f: f.exits[1].update(code=1)),
    "a job waited too long": ("pickup", "", lambda f: setattr(f, "pickup_p99_max_s", 8)),
    "a job waited too long after an outage": ("pickup", "", _late_after_an_outage),
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_must_not_be_is_found(name: str) -> None:
    finder, job, spoil = BREAKS[name]
    facts = good()
    spoil(facts)
    found = check(facts)
    assert (finder, job) in {(violation.check, violation.job) for violation in found}, found


def test_every_check_can_fail() -> None:
    assert {finder for finder, _, _ in BREAKS.values()} == {one.__name__ for one in CHECKS}


def test_no_request_of_a_cancelled_job_may_be_unknown_to_the_books() -> None:
    facts = good()
    facts.provider.requests["chaos-1"] = 2
    assert [violation.check for violation in check(facts)] == ["requests"]


def test_what_was_presumed_of_a_worker_that_had_told_of_its_last_attempt_is_not_booked() -> None:
    facts = good()
    facts.jobs["a"].tries, facts.jobs["a"].presumed = ["x:1", "x:lost", "y:2"], ["x:lost"]
    facts.books.entries["a"] = ["x:1", "y:2"]
    assert check(facts) == []
    facts.jobs["a"].presumed = []
    assert [violation.check for violation in check(facts)] == ["usage"]
    facts.jobs["a"].tries, facts.jobs["a"].presumed = ["x:lost", "y:2"], ["x:lost"]
    facts.books.entries["a"] = ["y:2"]
    assert [violation.check for violation in check(facts)] == ["usage", "requests"]


def test_tokens_before_a_restart_are_void() -> None:
    assert text_of(LOG) == PROMPT
    assert text_of(LOG[:4]) == "one "
    assert text_of(LOG[:5]) == ""


def test_a_ledger_is_put_in_order() -> None:
    facts = read_facts(
        [
            {"kind": "submitted", "at": 1, "key": "chaos-0", "job": "a", "prompt": "p", "asked": "quick"},
            {"kind": "submitted", "at": 1, "key": "chaos-0", "job": "b", "prompt": "p", "asked": "quick"},
            {"kind": "reads", "at": 2, "reader": "0.0", "job": "a", "how": "relay"},
            {"kind": "event", "at": 3, "reader": "0.0", "job": "a", "id": "1-1", "type": "token", "text": "x"},
            {"kind": "event", "at": 5, "reader": "0.0", "job": "a", "id": "2-1", "type": "cancelled"},
            {"kind": "left", "at": 6, "reader": "0.0", "why": "its own wish"},
            {"kind": "reads", "at": 7, "reader": "0.1", "job": "a", "how": "library"},
            {"kind": "log", "at": 8, "job": "a", "events": [["1-1", {"type": "token", "text": "x"}]]},
            {"kind": "cancelled", "at": 4, "job": "a", "asked_ms": 2, "state": "cancelled"},
            {"kind": "record", "job": "a", "state": "cancelled", "text": "x", "error": None, "crashes": 1} | TRIES,
            {"kind": "found", "what": "known_jobs", "value": ["a"]},
            {"kind": "found", "what": "provider", "value": {"requests": {}, "open_requests": 1, "open_connections": 0}},
        ]
    )
    assert facts.doubled_keys == ["chaos-0"]
    assert [(view.reader, len(view.events)) for view in facts.views] == [("0.0", 2), ("0.1", 0)]
    assert facts.views[0].events[0] == ("1-1", {"type": "token", "text": "x"})
    job = facts.jobs["a"]
    assert (job.state, job.crashes, job.cancel_asked, job.log) == (
        "cancelled",
        1,
        True,
        [("1-1", {"type": "token", "text": "x"})],
    )
    assert facts.first_end_ms == {"a": 5}
    assert facts.known_jobs == ["a"]
    assert facts.provider.open_requests == 1


def test_a_pickup_is_counted_from_the_kill_to_the_next_start() -> None:
    facts = good()
    (pickup,) = pickups(facts)
    assert (pickup.job, pickup.requeued_s, pickup.started_s, pickup.back_s) == ("a", 8.5, 9.0, None)
    assert started([pickup]) == [9.0]
    facts.faults.append({"fault": "store_kill", "began_ms": 4000, "over_ms": 5000})
    (past,) = pickups(facts)
    assert (past.started_s, past.back_s) == (9.0, 4.5)
    assert started([past]) == []
    facts.faults[-1] |= {"began_ms": 9600, "over_ms": 9700}
    assert [p.back_s for p in pickups(facts)] == [None]


def test_a_job_in_quarantine_has_a_figure_of_its_own() -> None:
    facts = good()
    facts.pickup_p99_max_s = 8
    facts.jobs["a"].log[5][1]["message"] = facts.views[0].events[5][1]["message"] = "in quarantine: it lost its worker"
    assert [p.alone for p in pickups(facts)] == [True]
    assert check(facts) == []
    found = figures(facts, 1)
    assert (found["picked up after a kill, s"]["count"], found["picked up into quarantine, s"]["count"]) == (0, 1)


def test_a_job_that_was_cancelled_before_it_ran_again_has_no_pickup() -> None:
    facts = good()
    facts.faults = [{"fault": "kill", "target": "w0", "killed_ms": 250, "held": [["b", 210]]}]
    facts.jobs["a"].crashes, facts.jobs["b"].crashes = 0, 1
    assert [(p.requeued_s, p.started_s) for p in pickups(facts)] == [(None, None)]
    assert check(facts) == []


def test_the_figures_of_a_run() -> None:
    found = figures(good(), 12.34)
    assert {name: found[name] for name in ("jobs", "kills", "losses", "doubles", "jobs run more than once")} == {
        "jobs": 2,
        "kills": 1,
        "losses": 0,
        "doubles": 0,
        "jobs run more than once": 1,
    }
    assert found["picked up after a kill, s"] == {"count": 1, "p50": 9.0, "p99": 9.0, "max": 9.0}
    assert found["cancel to a reader's end, s"]["max"] == 0.02
    assert "p50 9.00" in shown(found)
    facts = good()
    facts.jobs["a"].log.pop()
    facts.doubled_keys = ["chaos-0"]
    assert (figures(facts, 1)["losses"], figures(facts, 1)["doubles"]) == (1, 1)
