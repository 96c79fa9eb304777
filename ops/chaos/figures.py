"""The numbers of a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ops.bench.stats import percentile
from ops.chaos.facts import Event, Facts
from ops.chaos.plan import CUTS

from promptmill.contract import END_TYPES

_QUARANTINE: Final = "in quarantine"
"""What the ``started`` event of such a run says; see :mod:`promptmill_workers.quarantine`."""


@dataclass(frozen=True, slots=True)
class Pickup:
    """A job that lost its worker to a kill: how long after that it was given back, and ran again.

    ``started_s`` is None where it never ran again, because it was cancelled first. ``back_s``: where the store or the
    broker was down in between, the same since that was over; None where it was not. An outage that everyone sees kills
    nobody, so it holds the watchers up. ``alone``: it ran in quarantine, because it was not the first worker that it
    lost; a process of its own had to start for it.
    """

    job: str
    requeued_s: float | None
    started_s: float | None
    back_s: float | None
    alone: bool = False


def pickups(facts: Facts) -> Iterator[Pickup]:
    """Of every job that every killed worker held."""
    outages = [(f["began_ms"], f["over_ms"]) for f in facts.faults if "over_ms" in f]
    for fault in facts.faults:
        if fault["fault"] != "kill":
            continue
        killed_ms = fault["killed_ms"]
        for job_id, epoch in fault["held"]:
            later = [(name, event) for name, event in facts.jobs[job_id].log if _epoch(name) > epoch]
            requeued = _first(later, "requeued")
            # Only the start that follows the requeueing: what was lost again before that is the next kill's.
            started = _first(later, "started")
            met = [over for began, over in outages if began <= (started or killed_ms) and over >= killed_ms]
            back_s = _since(started, max(met)) if met else None
            alone = any(_epoch(name) == started and _QUARANTINE in event.get("message", "") for name, event in later)
            yield Pickup(job_id, _since(requeued, killed_ms), _since(started, killed_ms), back_s, alone)


def _epoch(event_id: str | None) -> int:
    return int((event_id or "0-0").partition("-")[0])


def _first(events: Sequence[Event], phase: str) -> int | None:
    """When, in ms, the first progress event of a phase was made: a transition's epoch is the store's time."""
    return next((_epoch(name) for name, event in events if event.get("phase") == phase), None)


def _since(at_ms: int | None, begin_ms: int) -> float | None:
    return None if at_ms is None else max(0, at_ms - begin_ms) / 1000


def started(found: Iterable[Pickup]) -> list[float]:
    """How long jobs waited to run again while nothing but their worker was away, those in quarantine left out."""
    return [p.started_s for p in found if p.started_s is not None and p.back_s is None and not p.alone]


def spread(values: Sequence[float]) -> dict[str, float]:
    """How many there are, and their p50, p99 and maximum."""
    ordered = sorted(values)
    if not ordered:
        return {"count": 0}
    return {
        "count": len(ordered),
        "p50": round(percentile(ordered, 50), 3),
        "p99": round(percentile(ordered, 99), 3),
        "max": round(ordered[-1], 3),
    }


def _cancel_latencies(facts: Facts) -> list[float]:
    """From the call that cancelled a job to the moment at which the first of its readers saw the end."""
    return [
        (facts.first_end_ms[row["job"]] - row["asked_ms"]) / 1000
        for row in facts.cancels
        if row["state"] == "cancelled" and row["job"] in facts.first_end_ms
    ]


def figures(facts: Facts, wall_s: float) -> dict[str, Any]:
    """Everything that is printed."""
    kinds = [fault["fault"] for fault in facts.faults]
    all_pickups = list(pickups(facts))
    past = [p for p in all_pickups if p.back_s is not None and not p.alone]
    alone = [p.started_s for p in all_pickups if p.alone and p.started_s is not None]
    starts = {job.job_id: sum(event.get("phase") == "started" for _, event in job.log) for job in facts.jobs.values()}
    ends = {job.job_id: sum(event["type"] in END_TYPES for _, event in job.log) for job in facts.jobs.values()}
    return {
        "jobs": len(facts.jobs),
        "readers": len(facts.views),
        "events seen": sum(len(view.events) for view in facts.views),
        "kills": kinds.count("kill"),
        "freezes": kinds.count("freeze"),
        "store restarts": kinds.count("store_restart"),
        "store kills": kinds.count("store_kill"),
        "store outages": kinds.count("store_outage"),
        "broker kills": kinds.count("broker_kill"),
        "relay restarts and kills": kinds.count("relay_restart") + kinds.count("relay_kill"),
        "gateway restarts and kills": kinds.count("gateway_restart") + kinds.count("gateway_kill"),
        "network faults": sum(kind in CUTS for kind in kinds),
        "messages sent again": kinds.count("double"),
        "cancelled": sum(job.state == "cancelled" for job in facts.jobs.values()),
        "losses": sum(count == 0 for count in ends.values()),
        "doubles": sum(count > 1 for count in ends.values()) + len(facts.doubled_keys),
        "jobs that lost a worker": sum(job.crashes > 0 for job in facts.jobs.values()),
        "jobs run more than once": sum(count > 1 for count in starts.values()),
        "provider requests": sum(facts.provider.requests.values()),
        "attempts booked": sum(map(len, facts.books.entries.values())),
        "given back after a kill, s": spread([p.requeued_s for p in all_pickups if p.requeued_s is not None]),
        "picked up after a kill, s": spread(started(all_pickups)),
        "the same, past an outage, s": spread([p.started_s for p in past if p.started_s is not None]),
        "the same, since it was over, s": spread([p.back_s for p in past if p.back_s is not None]),
        "picked up into quarantine, s": spread(alone),
        "cancel to a reader's end, s": spread(_cancel_latencies(facts)),
        "wall time, s": round(wall_s, 1),
    }


def shown(found: dict[str, Any]) -> str:
    """The figures as text, one a line."""
    width = max(map(len, found))
    return "\n".join(f"{name.ljust(width)}  {_value(value)}" for name, value in found.items())


def _value(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    if not value["count"]:
        return _NONE
    return f"p50 {value['p50']:.2f}, p99 {value['p99']:.2f}, max {value['max']:.2f} (of {value['count']})"


_NONE: Final = "none"
