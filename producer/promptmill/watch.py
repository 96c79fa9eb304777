"""The watcher: gives up dead workers' jobs, sends lost messages again, and ends what waited too long.

Every worker and every gateway runs one. All it does is idempotent, so many watchers do no harm, and with no worker left
readers still get an end.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from promptmill import keys
from promptmill.errors import NotFound, StoreUnavailable
from promptmill.heartbeat import read_beats
from promptmill.registry import Registry
from promptmill.settings import Settings
from promptmill.store import Record, Store
from promptmill.store.connection import store_errors
from promptmill.store.dead import list_dead, unlist_requeued
from promptmill.store.link import Command
from promptmill.usage import sweep_unbooked

if TYPE_CHECKING:
    from promptmill.enqueue import Enqueuer

logger = logging.getLogger(__name__)

MAX_CRASHES: Final = 6
"""A job that lost its worker so often ends, even where nobody saw whose fault it was."""
_LOOK_MAX: Final = 1.5
"""The time between two looks counts for no more than so many periods."""
_RELEASE_CHUNK: Final = 50
_SWEEP_MAX: Final = 500
_EARLY_MAX: Final = 5000
"""How many entries are looked at before they are due, after a death."""
_ROUNDS_MAX: Final = 100
_PAUSE_MIN_S: Final = 0.02
_GRACE_MS: Final = 5_000
"""A message that young is on its way; it is not sent again."""
_RESEND_MAX_MS: Final = 60_000
_FORGET_MS: Final = 60_000


class Watcher:
    """Watches heartbeats and the outbox until cancelled. ``enqueuer`` sends messages; the watcher does not close it."""

    def __init__(self, store: Store, settings: Settings, enqueuer: Enqueuer) -> None:
        self._store = store
        self._enqueuer = enqueuer
        self.registry = Registry.of(settings)
        """By whose prices what nobody booked is booked; a worker puts newer snapshots in its place."""
        self.counted: Counter[str] = Counter()
        """Since the start: ``deaths`` of workers that we settled, ``resent`` messages, ``sweeps``."""
        self._ledger_retention_s = settings.ledger_retention_s
        self._period_s = settings.heartbeat_s
        self._dead_after_s = settings.dead_after_s
        self._seen: dict[str, tuple[int, float]] = {}
        """Each worker's counter, and for how many seconds of our contact with Redis it has stood still."""
        self._looked_at = 0.0
        self._cut_off = False
        self._early = False

    async def run(self) -> None:
        """Look every ``heartbeat_s``, and at the moment when a silent worker counts as dead; sweep beside it; for ever.

        Beside it, because a broker that does not answer holds a sweep up, and must not hide a death.
        """
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_looking())
            tasks.create_task(self._keep_sweeping())

    async def _keep_sweeping(self) -> None:
        while True:
            try:
                await self.sweep()
            except StoreUnavailable as err:
                logger.info("sweep waits: %s", err)
            await asyncio.sleep(self._period_s)

    async def _keep_looking(self) -> None:
        while True:
            try:
                await self.look()
            except StoreUnavailable as err:
                logger.warning("watcher waits: %s", err)
            silent_s = max((still_s for _, still_s in self._seen.values()), default=0.0)
            await asyncio.sleep(min(self._period_s, max(self._dead_after_s - silent_s, _PAUSE_MIN_S)))

    # -- workers ------------------------------------------------------------------------------------------------

    async def look(self) -> list[str]:
        """Read all heartbeats; settle the workers whose counter stood still for too long. Answers their ids."""
        try:
            beats, now_ms = await read_beats(self._store)
        except StoreUnavailable:
            self._cut_off = True
            raise
        watched_s = self._watched_s()
        present = {b.worker for b in beats}
        self._seen = {w: s for w, s in self._seen.items() if w in present}
        dead: list[str] = []
        for b in beats:
            count, still_s = self._seen.get(b.worker, (-1, 0.0))
            if b.count == count:
                still_s += watched_s
            else:
                # It beat since our last look, and Redis noted when; what was before that look we did not see.
                still_s = min(watched_s, max(now_ms - b.at_ms, 0) / 1000) if count >= 0 else 0.0
            self._seen[b.worker] = (b.count, still_s)
            if still_s >= self._dead_after_s:
                dead.append(b.worker)
                await self.settle(b.worker)
        return dead

    def _watched_s(self) -> float:
        """For how long up to now we could see the heartbeats, since the last look."""
        now = asyncio.get_running_loop().time()
        passed_s, self._looked_at = now - self._looked_at, now
        if not self._cut_off:
            # If we or the store stood still meanwhile, those that we watch may have had no way to beat.
            return min(passed_s, _LOOK_MAX * self._period_s)
        self._cut_off = False
        # They may have been cut off as we were: they get time to beat again, all of it after a long outage.
        known_s = self._dead_after_s / 2 if passed_s <= self._dead_after_s / 2 else 0.0
        self._seen = {w: (count, min(still_s, known_s)) for w, (count, still_s) in self._seen.items()}
        return 0.0

    async def settle(self, worker: str, *, poisoned: bool = False) -> None:
        """Give the jobs of a dead worker back to the queue, or end them as ``poisoned``; then forget the worker.

        Raises StoreUnavailable; repeated, it goes on where it was.
        """
        store = self._store
        with store_errors(store.address):
            held: list[bytes] = await store.wire.call("SMEMBERS", keys.claims(worker))
        logger.warning("worker %s is dead; it held %d jobs", worker, len(held))
        job_ids = [raw.decode() for raw in held]
        await self.release(job_ids, dead_worker=worker, poisoned=poisoned)
        with store_errors(store.address):
            # Only what was read: a worker that was merely frozen may be claiming again.
            forget: list[Command] = [("SREM", keys.claims(worker), *job_ids)] if job_ids else []
            *_, removed = await store.ask([*forget, ("HDEL", keys.WORKERS, worker)], first=len(forget))
        # Messages that it had taken and not claimed died with it. One watcher is enough to look for them.
        self._early = self._early or bool(removed)
        self.counted["deaths"] += int(bool(removed))
        self._seen.pop(worker, None)

    async def release(
        self,
        job_ids: list[str],
        *,
        dead_worker: str | None = None,
        poisoned: bool = False,
        claims: dict[str, str] | None = None,
        queue: str = "",
        reason: str = "its worker is shutting down",
        phase: str = "requeued",
        tries: list[dict[str, Any]] | None = None,
        chain: list[str] | None = None,
        wait_s: float | None = None,
    ) -> list[str]:
        """Requeue jobs of a dead worker, or those that their holder hands back (``claims``: job id to token).

        ``poisoned`` ends them instead: the worker was a job's own process, and was seen to die by itself.

        A holder may hand them to another ``queue``; see :meth:`promptmill.store.Store.requeue`. With ``wait_s`` no
        message is sent: the sweep sends it when that time is over.

        Outbox first, so that a crash right after leaves an entry that the sweep sends. Answers what was queued.
        """
        released: list[str] = []
        listed_ms = await list_dead(self._store, job_ids) if dead_worker is not None else 0

        requeue = partial(
            self._store.requeue,
            dead_worker=dead_worker,
            max_crashes=MAX_CRASHES,
            poisoned=poisoned,
            queue=queue,
            reason=reason,
            phase=phase,
            tries=tries,
            chain=chain,
            wait_ms=None if wait_s is None else int(wait_s * 1000),
        )
        for start in range(0, len(job_ids), _RELEASE_CHUNK):
            chunk = job_ids[start : start + _RELEASE_CHUNK]
            acts = [(job_id, partial(requeue, job_id, claim=(claims or {}).get(job_id))) for job_id in chunk]
            queued = await asyncio.gather(*(self._put_back(*act, dead_worker or "(ours)") for act in acts))
            again = [job_id for job_id, done in zip(chunk, queued, strict=True) if done]
            released += again
            if dead_worker is not None:
                await unlist_requeued(self._store, again, listed_ms)
            # What a dead worker held without running it waited there for a quarantine process: its message died too.
            await self._send_again(chunk if dead_worker is not None else again, wait_s)
        return released

    async def _put_back(self, job_id: str, requeue: Callable[[], Awaitable[str]], worker: str) -> bool:
        """Requeue one job between two notes in the outbox; True where it was queued by this."""
        renew: Command = ("EXPIRE", keys.OUTBOX, int(keys.INDEX_TTL.total_seconds()))
        with store_errors(self._store.address):
            await self._store.ask([("ZADD", keys.OUTBOX, "NX", 0, job_id), renew])
        outcome = await requeue()
        # Due at once: a sweep that looked in between saw a running job, and put it off for a minute.
        self._store.wire.tell([("ZADD", keys.OUTBOX, 0, job_id), renew] if outcome == "queued" else [])
        logger.info("job %s of worker %s: %s", job_id, worker, outcome, extra={"job_id": job_id})
        return outcome == "queued"

    async def _send_again(self, job_ids: list[str], wait_s: float | None) -> None:
        """The messages of those jobs that wait in the queue."""
        if job_ids and wait_s is None:
            records = await self._store.find_many(job_ids)
            messages = [(r.job_id, r.queue) for r in records if r is not None and r.state == "queued"]
            if messages:
                await self._enqueuer.send(messages)

    # -- the outbox ---------------------------------------------------------------------------------------------

    async def sweep(self) -> int:
        """Look at the outbox entries that are due, and book the usage that nobody booked.

        After a worker's death also at those that are not due: a job's next look may be a minute away.

        Answers how many messages were sent again.

        One watcher at a time does it: the others would only send the same messages again.
        """
        wire = self._store.wire
        with store_errors(self._store.address):
            if not await wire.call("SET", keys.SWEEP_LOCK, "1", "NX", "PX", int(self._period_s * 1000)):
                return 0
            seconds, micros = await wire.call("TIME")
            now_ms = int(seconds) * 1000 + int(micros) // 1000
        sent = 0
        for _ in range(_ROUNDS_MAX):
            with store_errors(self._store.address):
                due = await self._outbox("-inf", now_ms, _SWEEP_MAX)
            sent += await self._look_at(due, now_ms)
            if len(due) < _SWEEP_MAX:
                break
        if self._early:
            with store_errors(self._store.address):
                early = await self._outbox(f"({now_ms}", "+inf", _EARLY_MAX)
            for start in range(0, len(early), _SWEEP_MAX):
                sent += await self._look_at(early[start : start + _SWEEP_MAX], now_ms)
            self._early = False
        self.counted["sweeps"] += 1  # not before: one that fails each time looks after nobody
        await sweep_unbooked(self._store, self.registry, self._ledger_retention_s)
        return sent

    async def _outbox(self, lowest: str | int, highest: str | int, count: int) -> list[tuple[bytes, float]]:
        limit = ("WITHSCORES", "LIMIT", 0, count)
        flat: list[bytes] = await self._store.wire.call("ZRANGEBYSCORE", keys.OUTBOX, lowest, highest, *limit)
        return [(name, float(score)) for name, score in zip(flat[::2], flat[1::2], strict=True)]

    async def _look_at(self, due: list[tuple[bytes, float]], now_ms: int) -> int:
        """Decide on some entries, due or not: send again, look later, expire, or forget."""
        if not due:
            return 0
        records = await self._store.find_many(row[0].decode() for row in due)
        waiting: dict[str, list[Record]] = defaultdict(list)
        later: dict[str, int] = {}
        done: list[str] = []
        for (raw, score), record in zip(due, records, strict=True):
            job_id = raw.decode()
            if record is None:
                # Its submit died between outbox and record, or is in between right now: look once more.
                if score <= now_ms:
                    (done.append(job_id) if score else later.setdefault(job_id, now_ms + _FORGET_MS))
            elif record.ended:
                done.append(job_id)
            elif record.state != "queued":
                # Its claim takes the entry off; until then it may come back to the queue at any moment.
                later[job_id] = now_ms + _FORGET_MS
            elif now_ms >= record.st["deadline"]:
                await self._expire(job_id)
                done.append(job_id)
            elif now_ms < record.st.get("not_before", 0):
                later[job_id] = int(record.st["not_before"])
            elif "not_before" not in record.st and now_ms - record.st["queued"] < _GRACE_MS:
                later[job_id] = _next_look(record, record.st["queued"] + _GRACE_MS)
            else:
                waiting[record.queue].append(record)
        lost = [await self._lost(queue, records, now_ms, later) for queue, records in waiting.items()]
        # Before anything is sent: a job that is claimed and put off again must keep the time that this sets.
        await self._reschedule(later, done)
        return sum([await self._enqueuer.send(messages) for messages in lost if messages])

    async def _expire(self, job_id: str) -> None:
        try:
            await self._store.expire(job_id, keys.new_token())
        except NotFound:
            logger.debug("job %s was gone before it could expire", job_id, extra={"job_id": job_id})

    async def _lost(
        self, queue: str, records: list[Record], now_ms: int, later: dict[str, int]
    ) -> list[tuple[str, str]]:
        """The messages that are to be sent, again or for the first time; notes in ``later`` when to look again."""
        depth = await self._enqueuer.depth(queue)
        with store_errors(self._store.address):
            raw: Any = await self._store.wire.call("HGET", keys.CLAIMED, queue)
            # Lines of batches wait there, without a message, until a worker takes them.
            ready: list[bytes] = []
            if any(record.batch for record in records):
                ready = await self._store.wire.call("LRANGE", keys.ready(queue), 0, -1)
        claimed_ms = int(raw or 0)
        # What was put off has had no message at all.
        put_off = [r for r in records if "not_before" in r.st]
        safe = {raw.decode() for raw in ready}
        sent = [r for r in records if "not_before" not in r.st and r.job_id not in safe]
        lost = [r for r in sent if depth == 0 or claimed_ms > r.st["queued"]]
        for record in records:
            # Each look waits as long as the job has waited already: few messages however long the backlog.
            waited = now_ms - int(record.st["queued"])
            later[record.job_id] = _next_look(record, now_ms + min(max(waited, _GRACE_MS), _RESEND_MAX_MS))
        if lost:
            self.counted["resent"] += len(lost)
            logger.warning("sending the messages of %d jobs again on %s", len(lost), queue)
        return [(r.job_id, queue) for r in (*put_off, *lost)]

    async def _reschedule(self, later: dict[str, int], done: list[str]) -> None:
        with store_errors(self._store.address):
            commands: list[Command] = [("EXPIRE", keys.OUTBOX, int(keys.INDEX_TTL.total_seconds()))]
            if later:
                # XX: a claim may have removed an entry meanwhile.
                scored = (part for job_id, at in later.items() for part in (at, job_id))
                commands.append(("ZADD", keys.OUTBOX, "XX", *scored))
            if done:
                commands.append(("ZREM", keys.OUTBOX, *done))
            await self._store.ask(commands)


def _next_look(record: Record, at_ms: float) -> int:
    """When to look again: never later than the job's own deadline."""
    return int(min(at_ms, record.st["deadline"]))
