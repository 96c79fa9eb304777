"""The whole deployment, as a gateway tells Prometheus of it. Every gateway says the same: take the maximum of them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from typing import Final

from promptmill.enqueue import Enqueuer
from promptmill.errors import StoreUnavailable
from promptmill.fleet import Fleet, Lookout
from promptmill.metrics import Row, Rows, one
from promptmill.settings import Settings
from promptmill.store import Store

logger = logging.getLogger(__name__)

_EVERY_S: Final = 5.0
_STATES: Final = ("starting", "ready", "draining", "quarantine")


class FleetWatch:
    """Looks at the deployment every five seconds, and keeps what it saw last."""

    def __init__(self, store: Store, settings: Settings, enqueuer: Enqueuer) -> None:
        self._lookout = Lookout(store, settings, enqueuer)
        self._seen: tuple[Fleet, float] | None = None

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            try:
                self._seen = await self._lookout.look(), time.monotonic()
            except StoreUnavailable as err:
                logger.info("the deployment was not looked at: %s", err)
            except Exception:
                # Where this task ends the gateway does, and for what others say of themselves it must not: a heartbeat
                # of another version would end every gateway. `fleet_age_seconds` grows, and an alert looks at that.
                logger.exception("the deployment cannot be looked at")
            await asyncio.sleep(_EVERY_S)

    def rows(self) -> Rows:
        """What was seen; nothing before the first look. May be called from any thread."""
        if self._seen is None:
            return ()
        fleet, at = self._seen
        return (
            ("fleet_age_seconds", "How old the figures of the fleet are.", "gauge", one(time.monotonic() - at)),
            *_queue_rows(fleet),
            *_worker_rows(fleet),
            ("fleet_readers", "Readers at all relays and gateways.", "gauge", one(fleet.readers)),
            ("open_batches", "Batches that have not ended.", "gauge", one(fleet.batches)),
            (
                "given_up_jobs",
                "Jobs that lost their workers too often: `promptmill job dead`.",
                "gauge",
                one(fleet.given_up),
            ),
            ("held_models", "Models and hosts that are not asked, or less, by why.", "gauge", _held(fleet)),
            *_usage_rows(fleet),
        )


def _queue_rows(fleet: Fleet) -> Rows:
    queues = [({"family": q.family, "priority": q.priority}, q) for q in fleet.queues]
    told = [(labels, q) for labels, q in queues if q.messages is not None or q.lines]
    return (
        ("waiting_jobs", "Jobs that wait, in whichever queue or for their time.", "gauge", one(fleet.waiting)),
        (
            "queue_jobs",
            "Jobs that wait for a worker: messages in the broker, and lines of batches that are next.",
            "gauge",
            [(labels, (q.messages or 0) + q.lines) for labels, q in told],
        ),
        (
            "queue_oldest_seconds",
            "How long the job that was seen to wait longest has waited.",
            "gauge",
            [(labels, q.oldest_s or 0.0) for labels, q in queues],
        ),
    )


def _worker_rows(fleet: Fleet) -> Rows:
    states = Counter((w.family, w.state) for w in fleet.alive)
    families = sorted({queue.family for queue in fleet.queues})
    slots: Counter[str] = Counter()
    used: Counter[str] = Counter()
    for worker in fleet.alive:
        used[worker.family] += worker.running
        if worker.state == "ready":
            slots[worker.family] += worker.concurrency
    servers = Counter(server.kind for server in fleet.servers if server.alive)
    return (
        (
            "fleet_workers",
            "Workers that are alive.",
            "gauge",
            [({"family": f, "state": state}, states[f, state]) for f in families for state in _STATES],
        ),
        ("fleet_slots", "Jobs that ready workers run at once.", "gauge", [({"family": f}, slots[f]) for f in families]),
        ("fleet_running_jobs", "Jobs that run.", "gauge", [({"family": f}, used[f]) for f in families]),
        (
            "fleet_servers",
            "Relays and gateways that are alive.",
            "gauge",
            [({"kind": kind}, servers[kind]) for kind in ("gateway", "relay")],
        ),
    )


def _held(fleet: Fleet) -> Iterable[Row]:
    counts = Counter((held.kind, held.state) for held in fleet.held)
    kinds, states = ("model", "host"), ("open", "half-open", "held", "reduced", "failing")
    return [({"kind": kind, "state": state}, counts[kind, state]) for kind in kinds for state in states]


def _usage_rows(fleet: Fleet) -> Rows:
    by_model = [({"model": row.group["model"]}, row.sums) for row in fleet.today.rows]
    return (
        (
            "today_cost_dollars",
            "What attempts that ended since midnight UTC cost, by the ledger.",
            "gauge",
            [(labels, sums.cost_usd) for labels, sums in by_model],
        ),
        (
            "today_tokens",
            "Tokens of attempts that ended since midnight UTC, by the ledger.",
            "gauge",
            [(labels, sums.tokens) for labels, sums in by_model],
        ),
        (
            "today_attempts",
            "Attempts that ended since midnight UTC, by the ledger.",
            "gauge",
            [(labels, sums.attempts) for labels, sums in by_model],
        ),
    )


@asynccontextmanager
async def watching_fleet(
    store: Store, settings: Settings, enqueuer: Enqueuer
) -> AsyncGenerator[tuple[FleetWatch, tuple[asyncio.Task[None], ...]]]:
    """The look at work while the block runs; not where nobody can ask for its figures."""
    watch = FleetWatch(store, settings, enqueuer)
    tasks = (asyncio.create_task(watch.run(), name="fleet"),) if settings.metrics_port is not None else ()
    try:
        yield watch, tasks
    finally:
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
