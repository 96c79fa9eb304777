"""The whole deployment at one moment, for people and dashboards: queues, workers, servers, batches, usage, health.

One look costs a few round trips and work in proportion to the number of queues, workers, servers and troubled models.
However many jobs wait, it reads no more than :data:`_SAMPLE` of them. Nothing is decided by what it finds.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Final

from promptmill import keys
from promptmill.batch.models import BATCH_END_STATES
from promptmill.contract import Priority
from promptmill.enqueue import Enqueuer, Peek
from promptmill.heartbeat import Beat, Done, read_beats
from promptmill.live import LiveRegistry
from promptmill.queues import API_FAMILY, queue_for
from promptmill.servers import Server, read_server
from promptmill.settings import Settings
from promptmill.store import Store
from promptmill.store.connection import store_errors
from promptmill.store.link import Command
from promptmill.traffic import Cooldown, Traffic
from promptmill.usage.report import UsageReport, read_usage

_SAMPLE: Final = 50
_BATCHES_SHOWN: Final = 5
_BATCH_FIELDS: Final = ("state", "lines", "succeeded", "failed", "cancelled", "expired")
_USAGE_SHARE: Final = 20
"""Reading a day's sums may take this part of the time: with very many users they are many."""
_PRIORITIES: Final[tuple[Priority, ...]] = ("interactive", "batch")
_NOTHING_TOLD: Final = Done(0.0, {}, 0, 0.0, 0.0, {})


@dataclass(frozen=True, slots=True)
class QueueLook:
    """A queue of the broker.

    ``messages``: how many the broker holds, None where it does not say. A message is a hint, so this is near the number
    of jobs that wait here but not equal to it: some are of jobs that ended or were claimed by another message, and jobs
    that wait for their time have none. ``lines``: lines of batches that are next, which have no messages; the batch's
    other lines are not counted. ``oldest_s``: how long the job that was looked at and waits longest has waited; exact
    on Redis while the queue is served in order, at least so long on RabbitMQ where many wait. None: none was seen.
    ``workers``: the workers that serve it now.
    """

    name: str
    family: str
    priority: Priority
    messages: int | None
    lines: int
    oldest_s: float | None
    workers: int


@dataclass(frozen=True, slots=True)
class WorkerLook:
    """A worker process, as its last heartbeat tells; times in s.

    ``state`` is ``starting``, ``ready``, ``draining``, or ``quarantine`` (it runs one job that lost its workers).
    ``alive`` is False where it has been silent for three of its periods; it is not given up before ``dead_after_s``.
    ``running`` jobs, of ``concurrency`` that it may run. Of what it has done since it began (``done``) see
    :class:`promptmill.heartbeat.Done`; all is 0 for a worker of an older version.
    """

    id: str
    name: str
    host: str
    family: str
    state: str
    alive: bool
    silent_s: float
    running: int
    concurrency: int
    guard_level: str | None
    paused: list[str]
    registry: int
    done: Done


@dataclass(frozen=True, slots=True)
class BatchLook:
    """A batch that is open: ``lines`` in all, ``ended`` of them ended, ``failed`` of these without an answer."""

    id: str
    state: str
    lines: int
    ended: int
    failed: int


@dataclass(frozen=True, slots=True)
class Fleet:
    """A deployment at one moment.

    ``at`` is the store's time. ``waiting``: jobs that wait, in whichever queue or for their time, and none that was
    claimed; a few that ended unclaimed count until the next sweep. ``running``: jobs that workers which are alive run.
    ``batches`` are open, or ended a moment ago; ``open_batches`` are the oldest of them. ``given_up``: jobs that lost
    their workers (`promptmill job dead`); a few that ended otherwise may count. ``held``: models and hosts that are not
    asked, or less. ``today``: the ledger's sums by model since midnight UTC; attempts count when they ended.
    """

    at: datetime
    store: str
    waiting: int
    running: int
    given_up: int
    queues: list[QueueLook]
    workers: list[WorkerLook]
    servers: list[Server]
    batches: int
    open_batches: list[BatchLook]
    held: list[Cooldown]
    today: UsageReport

    @property
    def alive(self) -> list[WorkerLook]:
        """The workers that are."""
        return [worker for worker in self.workers if worker.alive]

    @property
    def readers(self) -> int:
        """Streams that are open."""
        return sum(server.readers for server in self.servers if server.alive)

    @property
    def jobs_per_s(self) -> float:
        """Jobs that end with an answer or an error on workers, over the last ten seconds."""
        return round(sum(worker.done.jobs_per_s for worker in self.alive), 3)

    @property
    def pieces_per_s(self) -> float:
        """Pieces of text, which are mostly tokens, that come from backends, over the last ten seconds."""
        return round(sum(worker.done.pieces_per_s for worker in self.alive), 3)

    @property
    def events_per_s(self) -> float:
        """Events that go out to readers, over the last ten seconds."""
        return round(sum(server.events_per_s for server in self.servers if server.alive), 3)

    @property
    def failures(self) -> dict[str, int]:
        """Jobs that failed on workers within the last five minutes, by error code, most first."""
        total: dict[str, int] = {}
        for worker in self.alive:
            for code, count in worker.done.failures.items():
                total[code] = total.get(code, 0) + count
        return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))

    def to_dict(self) -> dict[str, Any]:
        """As JSON; described in docs/operating.md."""
        return {
            "at": self.at.isoformat(timespec="milliseconds"),
            "store": self.store,
            "waiting": self.waiting,
            "running": self.running,
            "given_up": self.given_up,
            "jobs_per_s": self.jobs_per_s,
            "pieces_per_s": self.pieces_per_s,
            "readers": self.readers,
            "events_per_s": self.events_per_s,
            "failures": self.failures,
            "queues": [asdict(queue) for queue in self.queues],
            "workers": [asdict(worker) for worker in self.workers],
            "servers": [asdict(server) for server in self.servers],
            "batches": self.batches,
            "open_batches": [asdict(batch) for batch in self.open_batches],
            "held": [asdict(cooldown) for cooldown in self.held],
            "today": self.today.to_dict(),
        }


class Lookout:
    """Looks at a deployment, again and again. ``enqueuer`` asks the broker; None: what waits there is unknown.

    It keeps what need not be read each time; close nothing but what was passed in.
    """

    def __init__(self, store: Store, settings: Settings, enqueuer: Enqueuer | None = None) -> None:
        self._store = store
        self._enqueuer = enqueuer
        self._live = LiveRegistry(settings)
        self._traffic = Traffic(store, "look")
        self._today: UsageReport | None = None
        self._today_until = 0.0

    async def look(self) -> Fleet:
        """The deployment now. Raises StoreUnavailable; a broker that does not answer only leaves its numbers out."""
        store = self._store
        beats, now_ms = await read_beats(store)
        await self._live.refresh_if_stale(store)
        queues = self._queues(beats)
        peeked = await self._enqueuer.peek(list(queues)) if self._enqueuer else None
        counts: list[Command] = [
            ("ZCARD", keys.OUTBOX),
            ("ZCARD", keys.DEAD),
            ("ZCARD", keys.BATCHES),
            ("ZRANGE", keys.OUTBOX, 0, _SAMPLE // 2 - 1),
            ("ZRANGE", keys.OUTBOX, -_SAMPLE // 2, -1),
            ("ZRANGE", keys.BATCHES, 0, _BATCHES_SHOWN - 1),
            ("HGETALL", keys.SERVERS),
        ]
        lists = [keys.ready(name) for name in queues]
        counts += [("LLEN", name) for name in lists] + [("LINDEX", name, 0) for name in lists]
        with store_errors(store.address):
            waiting, dead, batches, soonest, latest, open_ids, servers, *ready = await store.ask(counts)
        lengths, first_lines = ready[: len(lists)], ready[len(lists) :]
        seen = {raw.decode() for raw in (*soonest, *latest, *filter(None, first_lines))}
        seen.update(job_id for peek in (peeked or {}).values() for job_id in peek.oldest)
        oldest = await self._oldest(seen, now_ms)
        open_batches = await self._batches([raw.decode() for raw in open_ids])
        workers = sorted((_worker(b, now_ms) for b in beats), key=lambda w: (w.family, w.state == "quarantine", w.id))
        return Fleet(
            at=datetime.fromtimestamp(now_ms / 1000, UTC),
            store=store.address,
            waiting=waiting,
            running=sum(worker.running for worker in workers if worker.alive),
            given_up=dead,
            queues=[
                _queue(name, *about, (peeked or {}).get(name), lines, oldest.get(name), workers)
                for (name, about), lines in zip(queues.items(), lengths, strict=True)
            ],
            workers=workers,
            servers=_servers(servers, now_ms),
            batches=batches - (len(open_ids) - len(open_batches)),
            open_batches=open_batches,
            held=await self._traffic.cooldowns(),
            today=await self._usage(),
        )

    def _queues(self, beats: Iterable[Beat]) -> dict[str, tuple[str, Priority]]:
        """The queues of all families that have models or workers: family and priority by name."""
        models = self._live.registry.models.values()
        others = {*(model.worker_family for model in models), *(beat.family for beat in beats)} - {API_FAMILY}
        families = [API_FAMILY, *sorted(others)]
        return {queue_for(priority, family): (family, priority) for family in families for priority in _PRIORITIES}

    async def _oldest(self, job_ids: Iterable[str], now_ms: int) -> dict[str, float]:
        """The longest time that one of some jobs waits, by queue; those that do not wait are left out."""
        found: dict[str, float] = {}
        for record in await self._store.find_many(job_ids):
            if record is not None and record.state == "queued":
                waited_s = round(max(now_ms - int(record.st["queued"]), 0) / 1000, 1)
                found[record.queue] = max(found.get(record.queue, 0.0), waited_s)
        return found

    async def _batches(self, ids: list[str]) -> list[BatchLook]:
        with store_errors(self._store.address):
            rows = await self._store.ask([("HMGET", keys.batch(batch_id), *_BATCH_FIELDS) for batch_id in ids])
        found: list[BatchLook] = []
        for batch_id, (state, *numbers) in zip(ids, rows, strict=True):
            if state is not None and state.decode() not in BATCH_END_STATES:
                lines, succeeded, *others = (int(number or 0) for number in numbers)
                found.append(BatchLook(batch_id, state.decode(), lines, succeeded + sum(others), sum(others)))
        return found

    async def _usage(self) -> UsageReport:
        began = time.monotonic()
        if self._today is None or began >= self._today_until:
            self._today = await read_usage(self._store, by="model")
            ended = time.monotonic()
            self._today_until = ended + _USAGE_SHARE * (ended - began)
        return self._today


async def look(store: Store, settings: Settings, enqueuer: Enqueuer | None = None) -> Fleet:
    """One look; who looks again keeps a :class:`Lookout`. Raises StoreUnavailable."""
    return await Lookout(store, settings, enqueuer).look()


def _queue(
    name: str,
    family: str,
    priority: Priority,
    peek: Peek | None,
    lines: int,
    oldest_s: float | None,
    workers: Iterable[WorkerLook],
) -> QueueLook:
    served = sum(w.family == family and w.alive and w.state == "ready" for w in workers)
    return QueueLook(name, family, priority, peek.messages if peek else None, lines, oldest_s, served)


def _worker(beat: Beat, now_ms: int) -> WorkerLook:
    name, _, place = beat.worker.partition("@")
    return WorkerLook(
        id=beat.worker,
        name=name,
        host=place.rsplit("-", 2)[0],
        family=beat.family,
        state=beat.state,
        alive=beat.fresh(now_ms),
        silent_s=round(max(now_ms - beat.at_ms, 0) / 1000, 1),
        running=beat.running,
        concurrency=beat.concurrency,
        guard_level=beat.level,
        paused=beat.paused,
        registry=beat.registry,
        done=beat.done or _NOTHING_TOLD,
    )


def _servers(flat: list[bytes], now_ms: int) -> list[Server]:
    rows = zip(flat[::2], flat[1::2], strict=True)
    return sorted((read_server(name.decode(), raw, now_ms) for name, raw in rows), key=lambda server: server.id)
