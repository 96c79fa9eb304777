"""Counting lines whose worker did not tell, stopping those of a batch that is cancelled, and letting go of old ones.

A worker tells of a line's end right behind it, as a hint. What was cancelled, expired or given up elsewhere, and what a
dying worker could not tell, is found here. It does no harm where several do it at once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Final

import orjson

from promptmill import keys
from promptmill.batch import scripts
from promptmill.batch.ends import ended_record, gone_line
from promptmill.batch.store import count, run
from promptmill.batch.view import Known, View, open_lines
from promptmill.contract import Cancelled
from promptmill.store import Record, Store
from promptmill.store import scripts as job_scripts
from promptmill.store.client import LOG_TTL_MS
from promptmill.store.connection import store_errors
from promptmill.store.head import FIELDS
from promptmill.store.link import Command

logger = logging.getLogger(__name__)

AT_ONCE: Final = 200
_STATE: Final = FIELDS.index("st")


async def uncounted(store: Store, known: Known, stop: int) -> list[int]:
    """The lines below ``stop`` that are not counted yet."""
    if known.low >= stop:
        return []
    with store_errors(store.address):
        bits: bytes = await store.wire.call(
            "GETRANGE", keys.batch_counted(known.batch_id), known.low // 8, (stop - 1) // 8
        )
    found = open_lines(bits, known.low, stop)
    known.low = found[0] if found else stop
    return found


async def count_ended(store: Store, known: Known, view: View) -> int:
    """Count the lines that have ended or whose job is gone; answers how many were not counted before."""
    new = 0
    waiting = await uncounted(store, known, view.sent)
    for start in range(0, len(waiting), AT_ONCE):
        part = waiting[start : start + AT_ONCE]
        lines = await _ends(store, known, part)
        if lines:
            new += (await count(store, known.batch_id, lines))[0]
    if new:
        logger.debug("batch %s: %d lines counted that nobody had told of", known.batch_id, new)
    return new


async def _ends(store: Store, known: Known, part: Sequence[int]) -> list[bytes]:
    """What to count of some lines. Whole records are read of those that ended only: most of them still run."""
    ids = [known.stored.job_id(index) for index in part]
    with store_errors(store.address):
        states: list[bytes | None] = await store.ask([("HGET", keys.record(job_id), "st") for job_id in ids])
        ended = [
            (index, job_id)
            for index, job_id, raw in zip(part, ids, states, strict=True)
            if raw is not None and "finished" in orjson.loads(raw)
        ]
        # In one act with their state: a record is whole or gone.
        rows = await store.ask([("HMGET", keys.record(job_id), *FIELDS) for _, job_id in ended])
    lines = [gone_line(index) for index, raw in zip(part, states, strict=True) if raw is None]
    for (index, job_id), row in zip(ended, rows, strict=True):
        lines.append(ended_record(index, Record(job_id, row)) if row[_STATE] else gone_line(index))
    return lines


async def stop_lines(store: Store, known: Known, view: View) -> None:
    """End the jobs of a batch that is cancelled or has expired, and count them."""
    waiting = await uncounted(store, known, view.sent)
    for start in range(0, len(waiting), AT_ONCE):
        part = waiting[start : start + AT_ONCE]
        reason = "its batch expired" if view.ending == "expired" else "its batch was cancelled"
        await _stop(store, [known.stored.job_id(index) for index in part], reason)
        await count(store, known.batch_id, await _ends(store, known, part))


async def _stop(store: Store, job_ids: Sequence[str], reason: str) -> None:
    given: tuple[Any, ...] = (
        keys.new_token(),
        "cancelled",
        Cancelled(reason=reason).to_json(),
        orjson.dumps({"reason": reason}),
        LOG_TTL_MS,
        keys.control(""),
    )
    script = job_scripts.STOP
    commands: list[Command] = [
        ("EVALSHA", script.sha, 2, keys.record(job_id), keys.log(job_id), *given) for job_id in job_ids
    ]
    with store_errors(store.address):
        await store.ask_scripted(script, commands)


async def let_go(store: Store, known: Known, view: View) -> bool:
    """Keep the jobs of a batch that ended no longer than the batch itself; they were to outlast the longest one.

    Does a part and answers whether all are done. A job that was given up keeps the time that it has for inspection.
    """
    if view.freed >= view.fed:
        return True
    stop = min(view.fed, view.freed + AT_ONCE)
    keep_ms = int((known.stored.head.retention_s or 0) * 1000)
    ids = [known.stored.job_id(index) for index in range(view.freed, stop)]
    with store_errors(store.address):
        given_up: list[Any] = await store.wire.call("ZMSCORE", keys.DEAD, *ids)
        await store.ask(
            [
                ("PEXPIRE", keys.record(job_id), keep_ms, "LT")
                for job_id, score in zip(ids, given_up, strict=True)
                if score is None
            ]
        )
    await run(store, scripts.FREED, known.batch_id, stop)
    return stop >= view.fed
