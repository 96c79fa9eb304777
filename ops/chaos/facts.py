"""What is known at the end of a run, in the form that the checks and the figures read. No I/O here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ops.chaos.ledger import Row, essence

from promptmill.contract import END_TYPES

Event = tuple[str | None, Row]
"""An event's id and its essence; see :func:`ops.chaos.ledger.essence`."""


@dataclass(kw_only=True)
class JobFacts:
    """One job: what was asked, and what the store holds of it at the end."""

    job_id: str
    key: str
    prompt: str
    asked: str = ""
    log: list[Event] = field(default_factory=list[Event])
    state: str | None = None
    text: str | None = None
    error: str | None = None
    crashes: int = 0
    tries: list[str] = field(default_factory=list[str])
    """The ids of its attempts, as its record names them."""
    presumed: list[str] = field(default_factory=list[str])
    """Those of them that nobody told of: their workers died."""
    cancel_asked: bool = False

    def take(self, row: Row) -> None:
        """Take over what the store said of it."""
        for name in ("state", "text", "error", "crashes", "tries", "presumed"):
            setattr(self, name, row[name])


@dataclass(kw_only=True)
class View:
    """All that one reader saw of one job."""

    reader: str
    job_id: str
    how: str
    events: list[Event] = field(default_factory=list[Event])


@dataclass(kw_only=True)
class Provider:
    """What the provider says: requests by the job's key, and what was open at the end."""

    requests: dict[str, int] = field(default_factory=dict[str, int])
    open_requests: int = 0
    open_connections: int = 0


@dataclass(kw_only=True)
class Books:
    """The usage that was booked."""

    entries: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    """The ids of the attempts that have an entry in the ledger of usage, by job."""
    entries_sum: list[int] = field(default_factory=list[int])
    """Attempts and tokens in and out: the entries added up."""
    reported_sum: list[int] = field(default_factory=list[int])
    """The same, as ``usage`` reports them from the running sums."""
    differences: list[str] = field(default_factory=list[str])
    """What ``usage verify`` found."""


@dataclass(kw_only=True)
class Remains:
    """What was left after everything had stopped. All of it should be empty."""

    keys_without_ttl: list[str] = field(default_factory=list[str])
    waiting: dict[str, int] = field(default_factory=dict[str, int])
    """Lists that must run empty: outbox, unbooked usage, claims, messages in the queues."""
    processes: list[str] = field(default_factory=list[str])
    sockets: list[str] = field(default_factory=list[str])
    files: list[str] = field(default_factory=list[str])


@dataclass(kw_only=True)
class Facts:
    """A whole run."""

    jobs: dict[str, JobFacts] = field(default_factory=dict[str, JobFacts])
    views: list[View] = field(default_factory=list[View])
    faults: list[Row] = field(default_factory=list[Row])
    cancels: list[Row] = field(default_factory=list[Row])
    exits: list[Row] = field(default_factory=list[Row])
    refused: list[Row] = field(default_factory=list[Row])
    first_end_ms: dict[str, int] = field(default_factory=dict[str, int])
    """When the first of a job's readers saw its end."""
    doubled_keys: list[str] = field(default_factory=list[str])
    known_jobs: list[str] = field(default_factory=list[str])
    """Every job that the store lists."""
    provider: Provider = field(default_factory=Provider)
    books: Books = field(default_factory=Books)
    remains: Remains = field(default_factory=Remains)
    pickup_p99_max_s: float | None = None

    def take(self, what: str, value: Any) -> None:
        """Take over what was found out at the end."""
        parts = {"provider": Provider, "books": Books, "remains": Remains}
        setattr(self, what, parts[what](**value) if what in parts else value)


def read_facts(rows: Iterable[Row]) -> Facts:
    """A run's ledger, put in order."""
    facts = Facts()
    views: dict[str, View] = {}
    submitted: dict[str, list[str]] = defaultdict(list)
    lists = {"fault": facts.faults, "exit": facts.exits, "refused": facts.refused, "cancelled": facts.cancels}
    for row in rows:
        match row["kind"]:
            case "submitted":
                submitted[row["key"]].append(row["job"])
                asked = {name: row[name] for name in ("key", "prompt", "asked")}
                facts.jobs[row["job"]] = JobFacts(job_id=row["job"], **asked)
            case "reads":
                views[row["reader"]] = View(reader=row["reader"], job_id=row["job"], how=row["how"])
            case "event":
                views[row["reader"]].events.append((row["id"], essence(row)))
                if row["type"] in END_TYPES:
                    facts.first_end_ms.setdefault(row["job"], row["at"])
            case "log":
                facts.jobs[row["job"]].log = [(name, event) for name, event in row["events"]]
            case "record":
                facts.jobs[row["job"]].take(row)
            case "found":
                facts.take(row["what"], row["value"])
            case kind if kind in lists:
                lists[kind].append(row)
            case _:
                pass
    for row in facts.cancels:
        facts.jobs[row["job"]].cancel_asked = True
    facts.views = list(views.values())
    facts.doubled_keys = [key for key, jobs in submitted.items() if len(jobs) > 1]
    return facts
