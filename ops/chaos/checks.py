"""What must hold at the end of a run. Pure functions: facts in, violations out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from ops.bench.stats import percentile
from ops.chaos.facts import Event, Facts, JobFacts, View
from ops.chaos.figures import pickups, started
from ops.chaos.plan import CUTS

from promptmill.contract import END_TYPES

STATE_OF: Final = {"done": ("succeeded",), "error": ("failed", "expired"), "cancelled": ("cancelled",)}
"""The states that an end event may stand for."""


@dataclass(frozen=True, slots=True)
class Violation:
    """Something that must not be: which check found it, of which job (empty: of none), and what it is."""

    check: str
    job: str
    what: str

    def __str__(self) -> str:
        return f"{self.check}: {self.job + ': ' if self.job else ''}{self.what}"


Found = Iterator[tuple[str, str]]
"""Pairs of job and what is wrong with it."""


def number_of(event_id: str | None) -> tuple[int, int]:
    """``<epoch>-<n>`` as two numbers; zeros where there is none."""
    epoch, _, n = (event_id or "0-0").partition("-")
    return int(epoch), int(n)


def text_of(events: list[Event]) -> str:
    """What a page shows that follows the events: the tokens since the last restart, joined."""
    text = ""
    for _, event in events:
        if event["type"] == "restart":
            text = ""
        elif event["type"] == "token":
            text += event["text"]
    return text


def follows(before: tuple[int, int], after: tuple[int, int]) -> bool:
    """Whether one id may come right behind another: the next of its epoch, or the first of a later one."""
    return after == (before[0], before[1] + 1) or (after[0] > before[0] and after[1] == 1)


# -- the checks -------------------------------------------------------------------------------------------------------


def submissions(facts: Facts) -> Found:
    """Each idempotency key made one job, and the store knows exactly those."""
    for key in facts.doubled_keys:
        yield "", f"the key {key} made more than one job"
    known, ours = Counter(facts.known_jobs), set(facts.jobs)
    yield from ((job, "submitted, and the store does not list it") for job in ours - known.keys())
    yield from ((job, "nobody submitted it") for job in known.keys() - ours)


def ends(facts: Facts) -> Found:
    """Each job has one end event, the last of its log, and its state says the same."""
    for job in facts.jobs.values():
        types = [event["type"] for _, event in job.log]
        count = sum(kind in END_TYPES for kind in types)
        if count != 1:
            yield job.job_id, f"{count} end events; its state is {job.state}"
        elif types[-1] not in END_TYPES:
            yield job.job_id, f"{types[-1]} behind its end"
        elif job.state not in STATE_OF[types[-1]]:
            yield job.job_id, f"ends with {types[-1]}, and its state is {job.state}"


def outcomes(facts: Facts) -> Found:
    """Nothing ends badly that nobody wanted to: jobs succeed, or were cancelled by us."""
    for job in facts.jobs.values():
        if job.state == "cancelled" and not job.cancel_asked:
            yield job.job_id, "cancelled, and nobody asked for that"
        elif job.state not in {"succeeded", "cancelled"}:
            yield job.job_id, f"ended as {job.state} ({job.error}) after {job.crashes} lost workers"


def logs(facts: Facts) -> Found:
    """Ids rise without a gap: within an epoch one by one, and each epoch from its first."""
    for job in facts.jobs.values():
        ids = [(0, 0), *(number_of(name) for name, _ in job.log)]
        gap = next(((a, b) for a, b in pairwise(ids) if not follows(a, b)), None)
        if gap is not None:
            yield job.job_id, f"its log goes from {gap[0]} to {gap[1]}"


def views(facts: Facts) -> Found:
    """Each reader saw what the log holds: every event once, in order, to the end."""
    for view in facts.views:
        job = facts.jobs[view.job_id]
        wrong = _late(view) if view.how == "late" else _whole(view, job)
        if wrong:
            yield view.job_id, f"reader {view.reader} ({view.how}) {wrong}"


def _whole(view: View, job: JobFacts) -> str | None:
    if not view.events or view.events[-1][1]["type"] not in END_TYPES:
        last = view.events[-1][0] if view.events else "nothing"
        return f"saw no end; the last it saw was {last}"
    ids = [name for name, _ in view.events]
    if [number_of(name) for name in ids] != sorted({number_of(name) for name in ids}):
        return "saw an event twice, or before its turn"
    if view.events == job.log:
        return None
    seen, held = dict(view.events), dict(job.log)
    missed = [name for name in held if name not in seen]
    foreign = [name for name in seen if name not in held]
    changed = [name for name in seen if name in held and seen[name] != held[name]]
    return f"differs from the log: missed {missed[:3]}, not in the log {foreign[:3]}, changed {changed[:3]}"


def _late(view: View) -> str | None:
    """Of a log that was deleted there is the text and the end, without the ids of what was."""
    if not view.events or view.events[-1][1]["type"] not in END_TYPES:
        return "came late and saw no end"
    return None


def texts(facts: Facts) -> Found:
    """What readers saw is what is stored, and of a job that succeeded it is what the provider says to this prompt."""
    for job in facts.jobs.values():
        shown = text_of(job.log)
        if shown != (job.text or ""):
            yield job.job_id, f"its log shows {len(shown)} characters, its record has {len(job.text or '')} others"
        if job.state == "succeeded" and job.text != job.prompt:
            yield job.job_id, "its text is not what the provider answers to it"
        end = job.log[-1][1] if job.log else {}
        if end.get("type") == "done" and end.get("text") != job.text:
            yield job.job_id, "its done event has another text than its record"
    for view in facts.views:
        if view.how == "late" and text_of(view.events) != (facts.jobs[view.job_id].text or ""):
            yield view.job_id, f"reader {view.reader} came late and got another text than its record's"


def streams(facts: Facts) -> Found:
    """No reader of an existing job is sent away."""
    for row in facts.refused:
        yield row["job"], f"reader {row['reader']} was answered with status {row['status']}"


def usage(facts: Facts) -> Found:
    """Every attempt of a job's record is booked once, and the sums are those of the entries.

    What was presumed of a worker that died is not, where that worker had told of its last attempt and begun no other.
    """
    for job in facts.jobs.values():
        booked = Counter(facts.books.entries.get(job.job_id, []))
        tries = Counter(job.tries)
        told = {_claim(name) for name in booked}
        lacks = [n for n in (tries - booked).elements() if n not in job.presumed or _claim(n) not in told]
        more = sorted((booked - tries).elements())
        if lacks or more:
            yield job.job_id, f"its record and the ledger differ: not booked {lacks}, not in the record {more}"
    foreign = facts.books.entries.keys() - facts.jobs.keys()
    yield from ((job, "booked, and nobody submitted it") for job in foreign)
    if facts.books.entries_sum != facts.books.reported_sum:
        yield "", f"the entries make {facts.books.entries_sum}, usage reports {facts.books.reported_sum}"
    yield from (("", f"usage verify: {what}") for what in facts.books.differences)


def _claim(try_id: str) -> str:
    return try_id.partition(":")[0]


def requests(facts: Facts) -> Found:
    """The provider was asked no more often than is booked."""
    for job in facts.jobs.values():
        asked = facts.provider.requests.get(job.key, 0)
        booked = len(facts.books.entries.get(job.job_id, []))
        if asked > booked:
            yield job.job_id, f"the provider was asked {asked} times, {booked} attempts are booked"


def remains(facts: Facts) -> Found:
    """Nothing is left: no key for ever, no job that waits, no process, no socket, no file, no call at the provider."""
    left = facts.remains
    yield from (("", f"the key {key} has no time to live") for key in left.keys_without_ttl)
    yield from (("", f"{count} left in {what}") for what, count in left.waiting.items() if count)
    for what, found in (("process", left.processes), ("socket", left.sockets), ("file", left.files)):
        yield from (("", f"a {what} is left: {name}") for name in found)
    if facts.provider.open_requests or facts.provider.open_connections:
        yield (
            "",
            (
                f"the provider has {facts.provider.open_requests} open requests and "
                f"{facts.provider.open_connections} open connections"
            ),
        )


def processes(facts: Facts) -> Found:
    """No part ends by itself, and those that are told to stop end well."""
    for row in facts.exits:
        if not row["expected"]:
            yield "", f"{row['part']} ended by itself with code {row['code']}"
        elif row["told"] and row["code"] != 0:
            yield "", f"{row['part']} was told to stop and ended with code {row['code']}"


def deaths(facts: Facts) -> Found:
    """A job loses only workers that were killed: nobody is given up because the store was away.

    Where workers were frozen or cut off, too, nobody can say whose death was wrong.
    """
    kinds = {fault["fault"] for fault in facts.faults}
    if kinds & {"freeze", *CUTS}:
        return
    killed = Counter(job_id for fault in facts.faults if fault["fault"] == "kill" for job_id, _ in fault["held"])
    for job in facts.jobs.values():
        if job.crashes > killed[job.job_id]:
            yield job.job_id, f"it lost {job.crashes} workers, and {killed[job.job_id]} that held it were killed"


def pickup(facts: Facts) -> Found:
    """The jobs of a killed worker run again soon; past an outage of the store, soon after that."""
    bound, all_pickups = facts.pickup_p99_max_s, list(pickups(facts))
    past = [p.back_s for p in all_pickups if p.back_s is not None and not p.alone]
    for what, found in (("after a kill", started(all_pickups)), ("after an outage", past)):
        if bound is not None and found and (p99 := percentile(sorted(found), 99)) > bound:
            yield "", f"p99 {what} is {p99:.2f} s, more than {bound:g} s"


CHECKS: Final[tuple[Callable[[Facts], Found], ...]] = (
    submissions,
    ends,
    outcomes,
    logs,
    views,
    texts,
    streams,
    usage,
    requests,
    remains,
    processes,
    deaths,
    pickup,
)


def check(facts: Facts) -> list[Violation]:
    """Every violation that any check finds."""
    return [Violation(one.__name__, job, what) for one in CHECKS for job, what in one(facts)]
