"""What a worker process counts for its operators. docs/observing.md explains every figure.

Only the event loop counts; the thread that serves the figures reads.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from prometheus_client import Counter, Histogram

from promptmill.metrics import (
    ANSWERS_S,
    JOBS,
    PREFIX,
    SHORT_S,
    WAITS_S,
    Kind,
    Rows,
    code_label,
    one,
    reading,
    watcher_rows,
)
from promptmill.routing import Route
from promptmill_workers.outcomes import Outcome
from promptmill_workers.programs.running import counted as programs

if TYPE_CHECKING:
    from promptmill.settings import ModelConfig
    from promptmill.store import Claimed
    from promptmill_workers.engine import Engine

_SIZES: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)

_ATTEMPTS = Counter(
    f"{PREFIX}attempts",
    "Calls of a model that ended: ``succeeded`` or an error code.",
    ("model", "backend", "outcome"),
)
_TOKENS = Counter(f"{PREFIX}tokens", "Tokens that attempts used.", ("model", "kind"))
_COST = Counter(f"{PREFIX}cost_dollars", "What attempts cost, as far as it is known.", ("model",))
_CLAIMS = Counter(f"{PREFIX}claims", "Messages that were looked at: ``claimed``, or why not.", ("outcome",))
_STOPS = Counter(f"{PREFIX}stops", "Jobs that were stopped here: ``taken`` away, or a ``handback``.", ("why",))
_FENCED = Counter(f"{PREFIX}fenced_writes", "Writes of events that were refused, because the claim is gone.")
_ALONE = Counter(f"{PREFIX}quarantined_jobs", "Jobs that ran alone, by what became of their process.", ("outcome",))
_QUEUED_S = Histogram(
    f"{PREFIX}queue_seconds", "From the moment a job waits to its claim.", ("priority",), buckets=WAITS_S
)
_FIRST_S = Histogram(
    f"{PREFIX}first_token_seconds", "From the begin of an attempt to its first token.", ("model",), buckets=ANSWERS_S
)
_ATTEMPT_S = Histogram(
    f"{PREFIX}attempt_seconds", "From the begin of an attempt to its end.", ("model",), buckets=ANSWERS_S
)
_JOB_S = Histogram(f"{PREFIX}job_seconds", "From a job's submission to its end.", ("priority",), buckets=WAITS_S)
_LAG_S = Histogram(
    f"{PREFIX}publish_lag_seconds",
    "From the oldest event of a write being due to the store's acknowledgement.",
    buckets=SHORT_S,
)
_EVENTS = Histogram(f"{PREFIX}write_events", "Events of all jobs in one write to the store.", buckets=_SIZES)

for _why in ("taken", "handback"):
    _STOPS.labels(_why)  # from 0, so that an alert sees the first
for _became in ("ended", "died", "broke", "not_started"):
    _ALONE.labels(_became)


def from_zero(models: Mapping[str, ModelConfig], family: str) -> None:
    """Begin the series of this family's models of which an alert must see the first event, or the first few."""
    for name, model in models.items():
        if model.worker_family == family:
            JOBS.labels("failed", "crashed", name, model.type)
            _ATTEMPTS.labels(name, model.type, "auth")


def note_claim(claimed: Claimed | str) -> None:
    """A message was looked at."""
    if isinstance(claimed, str):
        _CLAIMS.labels(claimed).inc()
        return
    _CLAIMS.labels("claimed").inc()
    record = claimed.record
    # Both by the store's clock; an epoch is a time in ms.
    waited_s = (claimed.epoch - max(record.st["queued"], record.st.get("not_before", 0))) / 1000
    _QUEUED_S.labels(record.head.get("priority", "interactive")).observe(max(0.0, waited_s))


def note_attempt(route: Route, outcome: Outcome) -> None:
    """An attempt ended."""
    model = route.name
    _ATTEMPTS.labels(model, route.config.type, code_label(outcome.code) or "succeeded").inc()
    _ATTEMPT_S.labels(model).observe(outcome.took_s)
    if outcome.first_s is not None:
        _FIRST_S.labels(model).observe(outcome.first_s)
    usage = outcome.usage
    if usage is not None:
        counts = (usage.input_tokens, usage.output_tokens, usage.cache_read_tokens, usage.cache_write_tokens)
        for kind, count in zip(("input", "output", "cache_read", "cache_write"), counts, strict=True):
            if count:
                _TOKENS.labels(model, kind).inc(count)
    if outcome.cost_usd:
        _COST.labels(model).inc(outcome.cost_usd)


def note_end(state: str, code: str | None, model: str, backend: str, priority: str, took_s: float) -> None:
    """This worker stored a job's end. ``model`` and ``backend`` are empty where none was asked."""
    JOBS.labels(state, code_label(code), model, backend).inc()
    _JOB_S.labels(priority).observe(max(0.0, took_s))


def note_stop(why: str) -> None:
    """A job was stopped here from outside."""
    _STOPS.labels(why).inc()


def note_fenced() -> None:
    """A write was refused: the claim is gone."""
    _FENCED.inc()


def note_alone(outcome: str) -> None:
    """A quarantine process is through: ``ended``, ``died``, ``broke`` or ``not_started``."""
    _ALONE.labels(outcome).inc()


def note_write(events: int, lag_s: float) -> None:
    """The writer wrote."""
    _EVENTS.observe(events)
    _LAG_S.observe(max(0.0, lag_s))


@contextmanager
def measured(engine: Engine) -> Generator[None]:
    """Tell what this worker is doing, at each scrape, while the block runs."""
    engine.writer.on_written = note_write
    with reading(lambda: _rows(engine)):
        yield


def _rows(engine: Engine) -> Rows:
    runner = engine.runner
    gauge: Kind = "gauge"
    counter: Kind = "counter"
    info = {"worker": engine.worker_id, "family": engine.family}
    return (
        ("worker_info", "This worker's id, as heartbeats and records name it, and its family.", gauge, [(info, 1)]),
        ("worker_ready", "1 while this worker claims jobs.", gauge, one(engine.state == "ready")),
        ("worker_slots", "How many jobs this worker runs at once.", gauge, one(engine.settings.concurrency)),
        ("worker_running_jobs", "Jobs that run here now: claims that are held.", gauge, one(len(runner.running))),
        ("worker_waiting_jobs", "Of these, jobs that wait for a model's limits.", gauge, one(runner.waiting)),
        ("worker_paused_models", "Models whose login has expired here.", gauge, one(len(runner.pauses.names))),
        ("unsent_bytes", "Events that the store does not have yet.", gauge, one(engine.writer.unsent_bytes)),
        ("heartbeat_age_seconds", "Since the store took the last heartbeat.", gauge, one(engine.heartbeat_age_s)),
        ("programs", "Programs that run here now.", gauge, one(programs["started"] - programs["ended"])),
        ("programs_started", "Programs that were started.", counter, one(programs["started"])),
        ("programs_killed", "Programs that had not ended by themselves.", counter, one(programs["killed"])),
        *watcher_rows(engine.watcher),
    )
