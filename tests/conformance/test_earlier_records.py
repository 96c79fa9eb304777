"""What an earlier version left in the store is read, and gone on with, by this one.

``earlier_records.json`` was written by revision 4cb9237: every key, after its workers had run some jobs and been killed
with others in their hands. It is never written again; a change that cannot read it is a change of the protocol.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import orjson
import pytest

from promptmill import AsyncProducer, keys
from promptmill.heartbeat import read_beats
from promptmill.settings import Settings, load_settings
from promptmill.store import Store
from promptmill.usage.verify import verify_usage
from tests.support.processes import PATIENCE_S, wait_until
from tests.support.store import running_store
from tests.support.streams import check_whole, collect, phases, text_of
from tests.support.worker import QUICK, worker_process

EARLIER: dict[str, Any] = json.loads(Path(__file__).with_name("earlier_records.json").read_text())
JOBS: dict[str, str] = EARLIER["jobs"]
DAY = "2026-11-22"
HOUR_MS = 3_600_000
MODELS = '[models.slow]\ntype = "echo"\n'

ENDED = {
    "succeeded": ("succeeded", "zwölf Boxkämpfer", ["succeeded"]),
    "repeated": ("succeeded", "once more", ["overloaded", "succeeded"]),
    "failed": ("failed", "one two ", ["cut"]),
    "expired": ("expired", None, []),
    "batch": ("succeeded", "two words", ["succeeded"]),
}
OPEN = {
    "running": ("tail " * 60, ["crashed", "succeeded"]),
    "running_again": ("word " * 60, ["crashed", "crashed", "succeeded"]),
    "queued": ("wait for me", ["succeeded"]),
    "put_off": ("put off", ["succeeded"]),
}
"""What becomes of the others."""


async def load(store: Store) -> None:
    """Put it all back, as if it had been written a moment ago where that counts."""
    redis = store.redis
    for key, held in EARLIER["keys"].items():
        value = held["value"]
        if held["type"] == "hash":
            await redis.hset(key, mapping=value)
        elif held["type"] == "zset":
            await redis.zadd(key, value)
        elif held["type"] == "set":
            await redis.sadd(key, *value)
        elif held["type"] == "list":
            await redis.rpush(key, *value)
        elif held["type"] == "stream":
            for event_id, data in value:
                await redis.xadd(key, {"e": data}, id=event_id)
        else:
            await redis.set(key, value)
        await redis.pexpire(key, HOUR_MS)
    for job_id in JOBS.values():
        state = orjson.loads(await redis.hget(keys.record(job_id), "st"))
        if "finished" not in state:
            state["deadline"] = int(time.time() * 1000) + HOUR_MS
            await redis.hset(keys.record(job_id), "st", orjson.dumps(state))


@pytest.fixture
async def left(tmp_path: Path) -> AsyncGenerator[tuple[Path, Settings, AsyncProducer]]:
    """A store with all that, and this version's producer on it."""
    with running_store(tmp_path, append_only=False) as server:
        path = tmp_path / "promptmill.toml"
        path.write_text(f'redis_url = "{server.url}"\n{QUICK}{MODELS}')
        settings = load_settings(path)
        async with AsyncProducer(settings) as producer:
            await load(await producer.store())
            yield path, settings, producer


async def test_ended_jobs_are_read_as_they_were(left: tuple[Path, Settings, AsyncProducer]) -> None:
    _, _, producer = left
    for name, (state, text, outcomes) in ENDED.items():
        job = await producer.get(JOBS[name])
        assert (job.state, job.text, [a.outcome for a in job.attempts]) == (state, text, outcomes), name
        events = await collect(producer, job.id)
        check_whole(events)
        assert text_of(events) == (text or "")
    cancelled = await producer.get(JOBS["cancelled"])
    events = await collect(producer, cancelled.id)
    check_whole(events)
    assert cancelled.state == events[-1].type == "cancelled"
    assert cancelled.text == text_of(events) != ""
    first = await producer.get(JOBS["succeeded"])
    assert (first.user, first.metadata, first.model, first.backend) == ("ann", {"k": "v"}, "echo", "echo")
    assert first.usage is not None
    assert {j.id for j in (await producer.list()).jobs} == set(JOBS.values())


async def test_an_idempotency_key_of_then_stands_for_the_same_request_now(
    left: tuple[Path, Settings, AsyncProducer],
) -> None:
    _, _, producer = left
    again = await producer.submit("wait for me", model="echo", idempotency_key="key-1")
    assert again.id == JOBS["queued"]


async def test_the_ledger_of_then_adds_up(left: tuple[Path, Settings, AsyncProducer]) -> None:
    _, _, producer = left
    total = (await producer.usage(DAY, DAY)).total
    entries = EARLIER["keys"][keys.ledger(DAY)]["value"]
    assert total.attempts == len(entries)
    assert (await verify_usage(await producer.store(), DAY, DAY)).ok


async def test_jobs_that_were_under_way_go_on(left: tuple[Path, Settings, AsyncProducer]) -> None:
    path, _, producer = left
    async with AsyncExitStack() as stack:
        stack.enter_context(worker_process(path))
        for name, (text, outcomes) in OPEN.items():
            job = await producer.result(JOBS[name], PATIENCE_S)
            events = await collect(producer, job.id)
            check_whole(events)
            assert job.text == text_of(events) == text
            assert [a.outcome for a in job.attempts] == outcomes
        assert phases(await collect(producer, JOBS["running"])) == ["queued", "started", "requeued", "started"]
        store = await producer.store()

        async def settled() -> bool:
            beats, _ = await read_beats(store)
            return len(beats) == 1 and not await store.redis.exists(keys.OUTBOX)

        await wait_until(settled, "the dead workers are forgotten and nothing waits")
