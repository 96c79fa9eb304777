"""Jobs that were given up because their workers died: the list of them, and what ends them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from promptmill import keys
from promptmill.contract import Error
from promptmill.store.connection import store_errors

if TYPE_CHECKING:
    from promptmill.store.client import Store
    from promptmill.store.head import Record

_COUNT_MAX: Final = 100_000
_CODES: Final = frozenset({"poisoned", "crashed"})


def given_up(crashes: int, *, poisoned: bool) -> Error:
    """The error of a job that lost its worker for the last time."""
    if poisoned:
        message = (
            "the job ended the process that ran it, the last time alone: look at it with `promptmill job dead show`"
        )
        return Error(code="poisoned", message=message, retryable=False)
    return Error(code="crashed", message=f"the job lost its worker {crashes} times", retryable=True)


async def list_dead(store: Store, job_ids: list[str]) -> int:
    """Put jobs on the list before they may be given up: a crash in between leaves a name that reading drops.

    Answers the time in ms at which they stand there, for :func:`unlist_requeued`.
    """
    if not job_ids:
        return 0
    with store_errors(store.address):
        seconds, micros = await store.wire.call("TIME")
        now_ms = int(seconds) * 1000 + int(micros) // 1000
        await store.ask(
            [
                ("ZADD", keys.DEAD, *(part for job_id in job_ids for part in (now_ms, job_id))),
                ("ZREMRANGEBYRANK", keys.DEAD, 0, -_COUNT_MAX - 1),
                ("EXPIRE", keys.DEAD, int(keys.LIST_TTL.total_seconds())),
            ]
        )
    return now_ms


# KEYS: dead. ARGV: time in ms, job id ...
_UNLIST: Final = """
local gone = {}
for i = 2, #ARGV do
  if redis.call('ZSCORE', KEYS[1], ARGV[i]) == ARGV[1] then gone[#gone + 1] = ARGV[i] end
end
if #gone > 0 then redis.call('ZREM', KEYS[1], unpack(gone)) end
return #gone
"""


async def unlist_requeued(store: Store, job_ids: list[str], listed_ms: int) -> None:
    """Take jobs off the list that run again, unless somebody listed them since, who then knows more than we do."""
    if job_ids:
        with store_errors(store.address):
            await store.wire.call("EVAL", _UNLIST, 1, keys.DEAD, listed_ms, *job_ids)


async def unlist_dead(store: Store, job_ids: list[str]) -> None:
    """Take jobs off the list: they ended otherwise, or somebody dealt with them."""
    if job_ids:
        with store_errors(store.address):
            await store.wire.call("ZREM", keys.DEAD, *job_ids)


async def read_dead(store: Store) -> list[Record]:
    """The jobs on the list that were given up and are still kept, the latest first. Takes off it what is gone."""
    with store_errors(store.address):
        rows: list[bytes] = await store.wire.call("ZREVRANGE", keys.DEAD, 0, -1)
    job_ids = [raw.decode() for raw in rows]
    records = await store.find_many(job_ids)
    found = [record for record in records if record is not None and is_dead(record)]
    alive = {record.job_id for record in records if record is not None and not record.ended}
    await unlist_dead(store, [job_id for job_id in job_ids if job_id not in alive.union(r.job_id for r in found)])
    return found


def is_dead(record: Record) -> bool:
    """Whether the job was given up because its workers died."""
    error: dict[str, Any] = record.end.get("error") or {}
    return record.state == "failed" and error.get("code") in _CODES and int(record.st.get("crashes", 0)) > 0
