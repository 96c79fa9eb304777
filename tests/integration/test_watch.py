"""Who is declared dead, and who is not."""

from __future__ import annotations

import asyncio

import orjson
import pytest

from promptmill import AsyncProducer, keys, watch
from promptmill.contract import Progress
from promptmill.enqueue import Enqueuer
from promptmill.errors import StoreUnavailable
from promptmill.heartbeat import Beat, beat, leave, read_beats, ready_workers
from promptmill.settings import Settings
from promptmill.store import Claimed, Store
from promptmill.store.dead import list_dead, unlist_requeued
from promptmill.watch import Watcher
from tests.support.processes import wait_until
from tests.support.sweeping import swept


@pytest.fixture
async def watcher(store: Store, settings: Settings):
    quick = settings.model_copy(update={"heartbeat_s": 0.05, "dead_after_s": 0.2})
    enqueuer = Enqueuer(settings.queue_url)
    yield Watcher(store, quick, enqueuer)
    await enqueuer.aclose()


async def held_by(store: Store, producer: AsyncProducer, worker: str) -> str:
    job = await producer.submit("x", model="echo")
    assert isinstance(await store.claim(job.id, keys.new_token(), worker, Progress(phase="started")), Claimed)
    return job.id


async def test_a_counter_that_stands_still_is_a_dead_worker(store, producer, watcher) -> None:
    worker = keys.new_token()
    await beat(store, worker, 1, "ready", 0.05)
    job_id = await held_by(store, producer, worker)

    async def given_up() -> bool:
        return worker in await watcher.look()

    await wait_until(given_up, "the worker is given up")
    assert (await store.get(job_id)).state == "queued"
    assert not await store.redis.exists(keys.claims(worker))
    await store.cancel(job_id, "over", "t")


async def test_a_watcher_that_was_frozen_itself_begins_to_count_anew(store, producer, watcher) -> None:
    worker = keys.new_token()
    await beat(store, worker, 1, "ready", 0.05)
    job_id = await held_by(store, producer, worker)
    await watcher.look()
    await asyncio.sleep(1.3)  # the watcher's own absence is what is tested
    assert worker not in await watcher.look()
    assert (await store.get(job_id)).state == "running"
    await store.cancel(job_id, "over", "t")
    await leave(store, worker)


@pytest.mark.parametrize(("outage_s", "known_s"), [(0.5, 2.0), (3.0, 0.0)])
async def test_after_an_outage_a_silent_worker_gets_time_to_beat_again(
    store, settings, monkeypatch: pytest.MonkeyPatch, outage_s: float, known_s: float
) -> None:
    """Half of the time at least; all of it where the outage was long."""
    now, beats = 100.0, [Beat("w", 1, "ready", 1.0, at_ms=0)]

    async def told(_: Store) -> tuple[list[Beat], int]:
        if not beats:
            raise StoreUnavailable("away")
        return beats, 0

    monkeypatch.setattr(watch, "read_beats", told)
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now)
    enqueuer = Enqueuer(settings.queue_url)
    watcher = Watcher(store, settings.model_copy(update={"heartbeat_s": 1.0, "dead_after_s": 4.0}), enqueuer)
    await watcher.look()
    for _ in range(3):
        now += 1.0
        assert await watcher.look() == []
    known, beats = beats, []
    now += outage_s / 2
    with pytest.raises(StoreUnavailable):
        await watcher.look()
    beats = known
    now += outage_s / 2
    silent_s = known_s
    while silent_s < 4.0:
        assert await watcher.look() == [], silent_s
        now, silent_s = now + 1.0, silent_s + 1.0
    assert await watcher.look() == ["w"]
    await enqueuer.aclose()


async def test_a_worker_that_leaves_with_claims_stays_to_be_found(store, producer) -> None:
    worker = keys.new_token()
    await beat(store, worker, 1, "ready", 2)
    job_id = await held_by(store, producer, worker)
    await leave(store, worker)
    assert worker in {b.worker for b in (await read_beats(store))[0]}
    store.forget_claim(job_id, worker)
    await leave(store, worker)
    assert worker not in {b.worker for b in (await read_beats(store))[0]}
    await store.cancel(job_id, "over", "t")


async def test_a_job_that_runs_again_is_not_listed_as_given_up(store, producer, watcher) -> None:
    """The number on the list is what operators are shown; and who listed the job since knows more."""
    worker = keys.new_token()
    job_id = await held_by(store, producer, worker)
    await watcher.settle(worker)
    assert (await store.get(job_id)).state == "queued"
    assert await store.wire.call("ZSCORE", keys.DEAD, job_id) is None
    listed_ms = await list_dead(store, [job_id, "another"])
    await store.wire.call("ZADD", keys.DEAD, listed_ms + 1, job_id)
    await unlist_requeued(store, [job_id, "another"], listed_ms)
    assert int(await store.wire.call("ZSCORE", keys.DEAD, job_id)) == listed_ms + 1
    assert await store.wire.call("ZSCORE", keys.DEAD, "another") is None
    await store.cancel(job_id, "over", "t")


async def test_a_draining_or_silent_worker_does_not_make_ready(store) -> None:
    worker = keys.new_token()

    async def ready() -> bool:
        return worker in {b.worker for b in await ready_workers(store)}

    await beat(store, worker, 1, "draining", 20)
    assert not await ready()
    await beat(store, worker, 2, "ready", 20)
    assert await ready()
    await beat(store, worker, 3, "ready", 0)
    await asyncio.sleep(1.1)  # the store's clock goes on: with that period it is silent after a second
    assert not await ready()
    await store.redis.hdel(keys.WORKERS, worker)


async def test_a_running_jobs_outbox_entry_is_looked_at_again_and_an_ended_ones_is_dropped(
    store, producer, watcher
) -> None:
    job_id = await held_by(store, producer, "w")
    await store.ask([("PING",)])  # behind what the claim told
    await store.redis.zadd(keys.OUTBOX, {job_id: 0})
    await swept(watcher, store)
    assert (await store.redis.zscore(keys.OUTBOX, job_id)) > 0
    await store.cancel(job_id, "over", "t")
    await store.redis.zadd(keys.OUTBOX, {job_id: 0})
    await swept(watcher, store)
    assert await store.redis.zscore(keys.OUTBOX, job_id) is None


async def test_a_requeued_job_is_due_at_once_even_where_a_sweep_put_it_off_meanwhile(
    store, producer, watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = keys.new_token()
    job_id = await held_by(store, producer, worker)
    requeue = store.requeue

    async def looked_at_in_between(*args: object, **options: object) -> str:
        # What a sweep of another watcher does with a running job.
        await store.redis.zadd(keys.OUTBOX, {job_id: 9e12})
        return await requeue(*args, **options)

    monkeypatch.setattr(store, "requeue", looked_at_in_between)
    assert await watcher.release([job_id], dead_worker=worker) == [job_id]
    await store.ask([("PING",)])  # behind what was told
    assert await store.redis.zscore(keys.OUTBOX, job_id) == 0
    await store.cancel(job_id, "over", "t")


async def test_what_a_dead_worker_took_and_did_not_claim_is_sent_again_before_its_next_look(
    store, producer, watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await producer.submit("x", model="echo")
    record = await store.find(job.id)
    assert record is not None
    long_ago = record.st | {"queued": record.st["queued"] - 60_000}
    await store.redis.hset(keys.record(job.id), "st", orjson.dumps(long_ago))
    await store.redis.hset(keys.CLAIMED, record.queue, record.st["queued"])  # younger ones were claimed
    await store.redis.expire(keys.CLAIMED, 60)
    submitting = keys.new_job_id()
    await store.redis.zadd(keys.OUTBOX, {job.id: 9e12, submitting: 9e12})
    sent: list[str] = []

    async def send(_: Enqueuer, messages: list[tuple[str, str]]) -> int:
        sent.extend(job_id for job_id, _ in messages)
        return len(messages)

    monkeypatch.setattr(Enqueuer, "send", send)
    await swept(watcher, store)
    assert job.id not in sent, "its next look is far away"
    worker = keys.new_token()
    await beat(store, worker, 1, "ready", 0.05)
    await watcher.settle(worker)
    await swept(watcher, store)
    assert sent.count(job.id) == 1
    await swept(watcher, store)
    assert sent.count(job.id) == 1, "a death has one early look"
    assert await store.redis.zscore(keys.OUTBOX, submitting) == 9e12, "its record may be on the way"
    await store.redis.zrem(keys.OUTBOX, submitting)
    await store.cancel(job.id, "over", "t")
