"""Booking: what a job's record says of its attempts, written into the ledger of the day, each once.

The truth is the record's list of tries; the ledger repeats it in a form that outlives the record. An entry that is
there already changes nothing, so everybody may book, at any time and again after a lost reply: the worker right after
the end, the sweep for those who died. ``pm:unbooked`` names the jobs for which that is still to be done; they are on it
before their first attempt can use anything, and leave it only after all was booked, unless something new was told.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import orjson

from promptmill import keys
from promptmill.errors import StoreUnavailable
from promptmill.registry import Registry
from promptmill.store import Record, Store
from promptmill.store.client import to_be_booked
from promptmill.store.connection import store_errors
from promptmill.store.head import FIELDS
from promptmill.store.link import Command
from promptmill.store.scripts import Script
from promptmill.store.tries import CLAIM_CHARS, Try, day_of, is_presumed
from promptmill.usage.entries import Entry, entry_of
from promptmill.usage.estimates import SIZES
from promptmill.usage.scripts import ASKING, BOOK, FORGET, LATE_TRY

logger = logging.getLogger(__name__)

_BATCH: Final = 100
_SWEEP_ROUNDS_MAX: Final = 50
_GRACE_US: Final = 5_000_000
"""An entry that young is most likely being booked by the worker."""
_AGAIN_US: Final = 20_000_000
LATE_WAIT_MS: Final = 30_000
"""How long a worker whose job was taken away may take to tell what it used, before that is estimated."""
_TAKEN: Final = -1
_UNTOLD_BYTES: Final = 80_000
"""For a text that was too long to be stored with a cancellation: 20,000 events, a token each, and more."""


async def book(store: Store, registry: Registry, retention_s: float, job_ids: Sequence[str]) -> int:
    """Book every attempt of these jobs that is not booked yet; take those that ended off ``pm:unbooked``.

    Answers how many entries are new. Raises StoreUnavailable: what was not booked is then booked by the sweep.
    """
    booked = 0
    for start in range(0, len(job_ids), _BATCH):
        booked += (await _book(store, registry, retention_s, job_ids[start : start + _BATCH]))[0]
    return booked


async def _book(store: Store, registry: Registry, retention_s: float, job_ids: Sequence[str]) -> tuple[int, list[str]]:
    """How many entries are new, and the jobs that are to be looked at again."""
    with store_errors(store.address):
        # The scores first: what is told behind them sets another one, and the entry stays.
        fields = [f for f in FIELDS if f != "end"]
        commands: list[Command] = [("ZMSCORE", keys.UNBOOKED, *job_ids)]
        commands += [("HMGET", keys.record(job_id), *fields) for job_id in job_ids]
        scores, *rows = await store.ask(commands, first=1)
    over: list[tuple[str, bytes]] = []
    again: list[str] = []
    entries: list[Entry] = []
    for job_id, score, row in zip(job_ids, scores, rows, strict=True):
        try:
            done, found = await _look(store, registry, job_id, row)
        except StoreUnavailable:
            raise
        except Exception:
            # One record that only a newer version reads must not stop the books of all others.
            logger.exception("the usage of job %s cannot be read", job_id, extra={"job_id": job_id})
            done, found = False, []
        entries += found
        if done and score is not None:
            over.append((job_id, score))
        elif not done:
            again.append(job_id)
    new = await _write(store, entries, retention_s)
    if over:
        await run_all(store, FORGET, [((keys.UNBOOKED,), [part for pair in over for part in pair])])
    return new, again


async def _look(store: Store, registry: Registry, job_id: str, row: list[bytes | None]) -> tuple[bool, list[Entry]]:
    """Whether nothing more is to come of a job, and the entries of its tries so far."""
    if row[0] is None or row[1] is None:
        return True, []
    record = Record(job_id, [*row, None])
    entries = await _entries(store, record, registry)
    return record.ended and await _complete(store, record), entries


async def _entries(store: Store, record: Record, registry: Registry) -> list[Entry]:
    tries = record.tries
    presumed = [t for t in tries if is_presumed(t)]
    if not presumed:
        return [entry_of(record, try_, registry, None) for try_ in tries]
    fields = ["request", *(_asked_field(str(t.get("claim"))) for t in presumed)]
    with store_errors(store.address):
        row: list[bytes | None] = await store.wire.call("HMGET", keys.record(record.job_id), *fields)
    told = {(t.get("claim"), t.get("attempt")) for t in tries if not is_presumed(t)}
    for try_, raw in zip(presumed, row[1:], strict=True):
        asked: dict[str, Any] = orjson.loads(raw or b"{}")
        if asked and (try_.get("claim"), asked.pop("attempt", None)) in told:
            # Its worker died between two attempts, the last of which it had told of.
            tries = [t for t in tries if t is not try_]
        before = int(asked.pop("text_before", 0))
        if "epoch" in try_:
            # Counted over the whole claim; a text that was stored with an end has the last attempt's only.
            try_["text_bytes"] = max(0, int(try_["text_bytes"]) - before)
        try_ |= {**asked, **try_}
    return [entry_of(record, try_, registry, row[0]) for try_ in tries]


async def _write(store: Store, entries: Iterable[Entry], retention_s: float) -> int:
    days: dict[str, list[bytes | str]] = defaultdict(list)
    for entry in entries:
        days[entry.day] += [entry.field, entry.value]
    if not days:
        return 0
    calls: list[tuple[tuple[str, ...], list[bytes | str]]] = [
        ((keys.ledger(day), keys.ledger_sums(day)), [str(int(retention_s * 1000)), *args]) for day, args in days.items()
    ]
    return sum(await run_all(store, BOOK, calls))


async def run_all(
    store: Store, script: Script, calls: Sequence[tuple[Sequence[str], Sequence[bytes | str]]]
) -> list[Any]:
    """A script's answers for several sets of keys, in one write. All may run twice: where the server forgot it."""
    commands: list[Command] = [("EVALSHA", script.sha, len(names), *names, *args) for names, args in calls]
    with store_errors(store.address):
        return await store.ask_scripted(script, commands)


async def tell_asking(store: Store, job_id: str, claim: str, facts: Mapping[str, Any]) -> bool:
    """Say what an attempt that begins is, in case nobody is left to tell. Repeatable; said late, it changes nothing.

    False where the claim holds no longer: the attempt is not to begin.

    ``facts``: ``attempt``, ``model``, ``backend``, where known ``slot``, and ``text_before``: how many bytes of text
    the claim's earlier attempts told, which are theirs. Raises StoreUnavailable: said after the store was away, or an
    attempt whose worker died would be taken for the one before it.
    """
    facts = {"bytes_per_token": SIZES.of(facts["model"]), **facts}
    told = orjson.dumps({name: value for name, value in facts.items() if value is not None})
    with store_errors(store.address):
        (outcome,) = await store.ask([("EVAL", ASKING, 1, keys.record(job_id), claim, _asked_field(claim), told)])
    return outcome != _TAKEN


def _asked_field(claim: str) -> str:
    return f"asked:{claim[:CLAIM_CHARS]}"


# -- what is told late ----------------------------------------------------------------------------------------------


async def keep_try(store: Store, job_id: str, try_: Try, *, lost: bool = False) -> bool:
    """Add a try to a job's record, whatever its state, and see that it is booked. Repeatable.

    For an attempt that failed while its claim goes on: should the worker die, this is all that is left of it. The list
    that the job's end brings may hold it too; it counts once. False where it was known, or where the job is gone.
    """
    # Without nulls, which Lua takes for values.
    try_ = {name: value for name, value in try_.items() if value is not None}
    try_["claim"] = str(try_.get("claim") or "")[:CLAIM_CHARS]
    if lost:
        try_["lost"] = True
    with store_errors(store.address):
        await store.ask(to_be_booked(job_id))
    (outcome,) = await run_all(store, LATE_TRY, [((keys.record(job_id),), [orjson.dumps(try_)])])
    return outcome == b"added"


async def add_late_try(store: Store, job_id: str, try_: Try) -> bool:
    """Add the try that ran when its claim was taken away (cancelled, handed back, presumed dead). Repeatable.

    It takes the place of what was presumed of it meanwhile, in the record and in the ledger. Book the job afterwards,
    or leave it to the sweep. False where it was known, or where the job is gone.
    """
    return await keep_try(store, job_id, try_, lost=True)


async def _complete(store: Store, record: Record) -> bool:
    """Whether nothing more will be told of a job that ended: its last claim ended by itself, or told what it lost.

    A claim that was taken away by a cancellation owes that for a while; then it is estimated from the job's text.
    """
    st = record.st
    claim: str | None = st.get("claim")
    if claim is None or st.get("fin") == claim:
        return True
    claim = claim[:CLAIM_CHARS]
    if any(t.get("claim") == claim and (t.get("lost") or "text_bytes" in t) for t in record.tries):
        return True
    finished = int(st["finished"])
    if time.time() * 1000 - finished < LATE_WAIT_MS:
        return False
    with store_errors(store.address):
        fields = ("end", _asked_field(claim))
        row: list[bytes | None] = await store.wire.call("HMGET", keys.record(record.job_id), *fields)
    end, asked = (orjson.loads(raw or b"{}") for raw in row)
    # The last that the claim began: repetitions and other models are attempts, too.
    number = asked.get("attempt", st["attempts"])
    if any(t.get("claim") == claim and t.get("attempt") == number for t in record.tries):
        return True  # cancelled between two attempts, of which the first was told
    size = _UNTOLD_BYTES if end.get("untold") else len((end.get("text") or "").encode())
    if size or asked:
        lost: Try = {"attempt": number, "claim": claim, "outcome": record.state, "text_bytes": size}
        lost |= {"ended_ms": finished, "day": day_of({"ended_ms": finished})}
        await add_late_try(store, record.job_id, lost)
        # It is in the record now, under a new score: the next look books it.
        return False
    return True


# -- who books ------------------------------------------------------------------------------------------------------


async def sweep_unbooked(store: Store, registry: Registry, retention_s: float) -> int:
    """Book what nobody booked; answers how many entries are new. One sweep at a time is enough; more do no harm."""
    new = 0
    before = time.time_ns() // 1000 - _GRACE_US
    for _ in range(_SWEEP_ROUNDS_MAX):
        with store_errors(store.address):
            limit = ("LIMIT", 0, _BATCH)
            due: list[bytes] = await store.wire.call("ZRANGEBYSCORE", keys.UNBOOKED, "-inf", before, *limit)
        if not due:
            break
        booked, again = await _book(store, registry, retention_s, [raw.decode() for raw in due])
        new += booked
        with store_errors(store.address):
            later: list[Command] = [("ZADD", keys.UNBOOKED, "XX", before + _AGAIN_US, job_id) for job_id in again]
            expire: Command = ("PEXPIRE", keys.UNBOOKED, int(keys.INDEX_TTL.total_seconds() * 1000))
            await store.ask([*later, expire])
    return new
