"""The store: every access to a job's keys that is not made by a running attempt's writer.

All methods raise :class:`~promptmill.errors.StoreUnavailable` where Redis does not answer as it should.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, Literal

import orjson

from promptmill import keys
from promptmill.contract import Cancelled, Error, Job, Progress, Restart
from promptmill.errors import BadRequest, IdempotencyConflict, NotFound
from promptmill.store import scripts
from promptmill.store.connected import Connected
from promptmill.store.connection import store_errors
from promptmill.store.dead import given_up
from promptmill.store.head import FIELDS, Record
from promptmill.store.ids import START, EventId
from promptmill.store.link import Command
from promptmill.store.submission import Submission

ALONE_AFTER: Final = 2
"""Crashes after which a job runs alone in a process of its own, so that the next one shows whose fault they are."""
LOG_TTL_MS: Final = int(keys.LOG_AFTER_END_TTL.total_seconds() * 1000)
_LOG_PAGE: Final = 500
_COMMANDS_PER_SUBMIT: Final = 5
_TRIM_CHANCE: Final = 1 / 64


@dataclass(frozen=True, slots=True)
class Claimed:
    """What a claim hands out. ``epoch`` is the attempt's own; ``record`` the state after the claim."""

    epoch: int
    request: bytes
    record: Record
    tries: list[dict[str, Any]]


ClaimRefusal = Literal["missing", "not_queued", "expired", "early", "alone"]


def to_be_booked(job_id: str) -> list[Command]:
    """Commands that say that a job has used something, or may. Each sets a new score: whoever looked before that and
    books now does not take the entry off."""
    return [
        ("ZADD", keys.UNBOOKED, time.time_ns() // 1000, job_id),
        ("PEXPIRE", keys.UNBOOKED, _ms(keys.INDEX_TTL)),
    ]


def _ms(time_to_live: timedelta) -> int:
    return int(time_to_live.total_seconds() * 1000)


class Store(Connected):
    """Jobs in Redis. Cheap to share: one per process and event loop."""

    # -- submitting ---------------------------------------------------------------------------------------------

    async def reserve(self, user: str, key: str, job_id: str, digest: str, ttl: timedelta) -> str:
        """Tie an idempotency key to ``job_id``, or learn the id that it already stands for.

        Raises
        ------
        IdempotencyConflict
            The key stands for another request.
        """
        value = f"{job_id} {digest}"
        with store_errors(self.address):
            name, ttl_ms = keys.idempotency(user, key), _ms(ttl)
            old: bytes | None = await self.wire.call("SET", name, value, "NX", "GET", "PX", ttl_ms)
        if old is None:
            return job_id
        old_id, _, old_digest = old.decode().partition(" ")
        if old_digest != digest:
            raise IdempotencyConflict(
                f"the idempotency key {key!r} was used for another request (job {old_id})", field="idempotency_key"
            )
        return old_id

    async def submit(self, jobs: Sequence[Submission]) -> list[bool]:
        """Store jobs: outbox entry first, then record and ``queued`` event, then the indexes; in one round trip.

        True for each job that still waits in the queue (so its message must be sent, again or for the first time).
        Repeating is harmless: each step does nothing where it was done before. A crash between the steps leaves an
        outbox entry that the sweep either sends or drops.
        """
        score = time.time_ns() // 1000
        outbox: list[Command] = [("ZADD", keys.OUTBOX, "NX", 0, job.job_id) for job in jobs]
        commands: list[Command] = []
        trims: list[Command] = []
        for i, job in enumerate(jobs):
            job_id, life, keep = job.job_id, job.life_ms, job.retention_ms
            commands.append(job.command())
            for index in (keys.ALL_JOBS, keys.user_jobs(job.request.user)):
                commands += [
                    ("ZADD", index, "NX", score + i, job_id),
                    ("PEXPIRE", index, max(life + keep, _ms(keys.LIST_TTL))),
                ]
                if random.random() < _TRIM_CHANCE:  # noqa: S311 - spreads housekeeping, no secret
                    trims.append(
                        ("ZREMRANGEBYSCORE", index, "-inf", score - max(life + keep, _ms(keys.LIST_TTL)) * 1000)
                    )
        outbox.append(("PEXPIRE", keys.OUTBOX, _ms(keys.INDEX_TTL)))
        asked = [*outbox, *commands, *trims]
        with store_errors(self.address):
            replies = (await self.ask_scripted(scripts.SUBMIT, asked, first=len(outbox)))[len(outbox) :]
        for job in jobs:
            self.note("submitted", job.request.priority)
        return [replies[i * _COMMANDS_PER_SUBMIT][2] == b"queued" for i in range(len(jobs))]

    # -- reading ------------------------------------------------------------------------------------------------

    async def find(self, job_id: str) -> Record | None:
        """The job's record, or None where there is none (any more)."""
        return (await self.find_many([keys.check_job_id(job_id)]))[0]

    async def find_many(self, job_ids: Iterable[str]) -> list[Record | None]:
        """Several records in one round trip, in the order asked for."""
        ids = list(job_ids)
        if not ids:
            return []
        with store_errors(self.address):
            rows = await self.ask([("HMGET", keys.record(job_id), *FIELDS) for job_id in ids])
        return [Record(job_id, row) if row[0] and row[1] else None for job_id, row in zip(ids, rows, strict=True)]

    async def get(self, job_id: str) -> Job:
        """The job. Raises :class:`~promptmill.errors.NotFound`."""
        found = await self.find(job_id)
        if found is None:
            raise NotFound(f"there is no job {job_id}", field="id")
        return found.job()

    async def read_log(self, job_id: str, after: EventId) -> tuple[list[tuple[EventId, bytes]], bool, bool]:
        """Up to 500 events behind ``after``, in order; whether the log exists at all; whether there may be more."""
        found, exists, more, _ = await self.resume_log(job_id, after)
        return found, exists, more

    async def resume_log(self, job_id: str, last: EventId) -> tuple[list[tuple[EventId, bytes]], bool, bool, bool]:
        """As :meth:`read_log` behind ``last``, and whether the log knows that event itself (the beginning is known)."""
        key, page = keys.log(job_id), _LOG_PAGE + 1
        with store_errors(self.address):
            entries, exists = await self.ask([("XRANGE", key, str(last), "+", "COUNT", page), ("EXISTS", key)])
        found = [(EventId.read(entry_id), fields[1]) for entry_id, fields in entries]
        known = bool(found) and found[0][0] == last
        behind = found[1:] if known else found[:_LOG_PAGE]
        return behind, bool(exists), len(found) == page, known or last == START

    async def listeners(self, job_ids: Sequence[str]) -> list[int]:
        """How many processes listen to each job's channel. Raises redis-py's errors."""
        names = [keys.channel(job_id) for job_id in job_ids]
        if self.cluster is None:
            found = await self.ask([("PUBSUB", "NUMSUB", *names)])
        else:
            found = await self.ask([("PUBSUB", "SHARDNUMSUB", name) for name in names])
        return [int(count) for row in found for count in row[1::2]]

    async def list_ids(self, user: str | None, before: str | None, count: int) -> list[tuple[str, int]]:
        """Job ids with their index scores, newest first, behind the cursor ``before`` (``<score>.<id>``).

        Raises ``bad_request`` for a cursor that is none.
        """
        index = keys.ALL_JOBS if user is None else keys.user_jobs(user)
        score_text, _, last_id = (before or "").partition(".")
        if before is not None and not (score_text.isascii() and score_text.isdecimal() and len(score_text) < 20):
            raise BadRequest(f"{before[:80]!r} is not a cursor that a page gave", field="cursor")
        top = int(score_text) if score_text else None
        with store_errors(self.address):
            limit = ("WITHSCORES", "LIMIT", 0, count + 1)
            rows: list[bytes] = await self.wire.call(
                "ZREVRANGEBYSCORE", index, "+inf" if top is None else top, "-inf", *limit
            )
        found = [(name.decode(), int(float(score))) for name, score in zip(rows[::2], rows[1::2], strict=True)]
        if top is not None:
            # Equal scores are ordered by id, descending: skip what the last page held.
            found = [(i, s) for i, s in found if s < top or i < last_id]
        return found[:count]

    # -- transitions --------------------------------------------------------------------------------------------

    async def claim(
        self, job_id: str, token: str, worker: str, event: Progress, *, alone: bool = False
    ) -> Claimed | ClaimRefusal:
        """Take a queued job: new epoch, state ``running``, one more attempt. Repeatable with the same token.

        A job that lost its worker :data:`ALONE_AFTER` times is given only to a process that runs it ``alone``.

        The job joins the worker's set of claims before it is claimed: a crash in between leaves an entry that settles
        to nothing. The outbox entry is taken off behind it, as a hint: the sweep does the same when it comes by.
        """
        with store_errors(self.address):
            held = keys.claims(worker)
            join: list[Command] = [
                ("SADD", held, job_id),
                ("PEXPIRE", held, _ms(keys.INDEX_TTL)),
                # Before anything can be used, so that nobody's death hides what was.
                *to_be_booked(job_id),
            ]
            given = (token, worker, event.to_json(), "alone" if alone else "")
            reply = await self._run(scripts.CLAIM, job_id, given, before=join)
        status = reply[0].decode()
        if status != "ok":
            return status
        head, request, st, tries = reply[2]
        record = Record(job_id, [head, st, tries, None, None])
        self.wire.tell(
            [
                ("ZREM", keys.OUTBOX, job_id),
                ("HSET", keys.CLAIMED, record.queue, record.st["queued"]),
                ("EXPIRE", keys.CLAIMED, int(keys.INDEX_TTL.total_seconds())),
            ]
        )
        return Claimed(int(reply[1]), request, record, orjson.loads(tries) if tries else [])

    def forget_claim(self, job_id: str, worker: str) -> None:
        """Take a job off a worker's set of claims. A hint: left behind, an entry settles to nothing."""
        self.wire.tell([("SREM", keys.claims(worker), job_id)])

    async def finish(
        self,
        job_id: str,
        claim: str,
        state: str,
        event: bytes,
        end: dict[str, Any],
        tries: list[dict[str, Any]],
        *,
        serial: int | None = None,
    ) -> bool:
        """End a running job; False where the claim is no longer ours. Repeatable.

        ``serial`` is the connection on which all of its events were written: on another the server may lack some.
        """
        args = (claim, state, event, orjson.dumps(end), orjson.dumps(tries), LOG_TTL_MS)
        with store_errors(self.address):
            reply = await self._run(scripts.FINISH, job_id, args, serial=serial)
        return reply[0] == b"ok"

    async def cancel(self, job_id: str, reason: str, token: str) -> bool:
        """End a job that has not ended, whatever its worker does. False where it had ended.

        Raises :class:`~promptmill.errors.NotFound`.
        """
        event = Cancelled(reason=reason).to_json()
        return await self._stop(job_id, token, "cancelled", event, {"reason": reason})

    async def expire(self, job_id: str, token: str) -> bool:
        """End a job that waited longer than its queue time. False where it is not so."""
        error = Error(code="expired", message="the job waited in the queue longer than its queue_s", retryable=True)
        end = {"error": error.model_dump(exclude={"type"}, exclude_none=True)}
        return await self._stop(job_id, token, "expired", error.to_json(), end)

    async def _stop(self, job_id: str, token: str, state: str, event: bytes, end: dict[str, Any]) -> bool:
        reply = await self.run(
            scripts.STOP, job_id, token, state, event, orjson.dumps(end), LOG_TTL_MS, keys.control("")
        )
        if reply[0] == b"missing":
            raise NotFound(f"there is no job {job_id}", field="id")
        if reply[0] == b"ok":
            self.note(state, "expired" if state == "expired" else "")
        return reply[0] == b"ok"

    async def requeue(
        self,
        job_id: str,
        *,
        dead_worker: str | None = None,
        claim: str | None = None,
        max_crashes: int,
        poisoned: bool = False,
        token: str = "",
        queue: str = "",
        reason: str = "its worker is shutting down",
        phase: str = "requeued",
        tries: list[dict[str, Any]] | None = None,
        chain: list[str] | None = None,
        wait_ms: int | None = None,
    ) -> str:
        """Give a running job back to the queue: because its worker died, or because its holder hands it back.

        A holder may name another ``queue``, which is then the job's from now on, and gives the ``reason`` and the
        ``phase`` that readers see. ``tries`` (all so far) says that attempts were made. ``chain`` are the models that
        are left to be asked. For ``wait_ms`` no claim succeeds; the time that the job may wait in the queue goes on.

        After :data:`ALONE_AFTER` crashes the job waits to be run alone. ``poisoned`` says that the process that ran it
        alone was seen to die by itself: the job ends as ``poisoned``. One that is given up is kept for ``DEAD_TTL``.

        Answers ``queued``, ``failed`` (too many crashes), ``not_running`` or ``missing``; only the first of many
        callers gets ``queued`` or ``failed``. Repeated with its token it answers as before.
        """
        if dead_worker is not None:
            mode, expected, reason, queue = "dead", dead_worker, "its worker died", ""
        else:
            mode, expected = "handback", claim or ""
        error = given_up(max_crashes, poisoned=poisoned)
        reply = await self.run(
            scripts.REQUEUE,
            job_id,
            mode,
            expected,
            Progress(phase=phase, message=reason).to_json(),
            Restart(reason=reason).to_json(),
            max_crashes,
            orjson.dumps({"outcome": "crashed", "message": reason}),
            error.to_json(),
            orjson.dumps({"error": error.model_dump(exclude={"type"}, exclude_none=True)}),
            LOG_TTL_MS,
            token or keys.new_token(),
            queue,
            orjson.dumps(tries) if tries is not None else "",
            orjson.dumps(chain) if chain is not None else "",
            "" if wait_ms is None else wait_ms,
            "poisoned" if poisoned else "",
            ALONE_AFTER,
            _ms(keys.DEAD_TTL),
        )
        outcome: str = reply[0].decode()
        if outcome in {"queued", "failed"}:
            self.note(*(("requeued", phase) if outcome == "queued" else ("failed", error.code)))
        return outcome
