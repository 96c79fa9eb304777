"""Batches through the client, fed by a feeder to a worker without a process: over Valkey and over fakeredis."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest

from promptmill import keys
from promptmill.batch import BatchClient, BatchHead, BatchLine, BatchStatus, scripts
from promptmill.batch.feeder import Feeder
from promptmill.batch.store import run
from promptmill.errors import BadRequest, IdempotencyConflict, NotFound
from promptmill.settings import Settings
from promptmill.store import Store
from tests.support import batch_lines as support
from tests.support.batch_lines import FakeWorker, all_results, client_of, feed_once, line, run_to_end
from tests.support.fake_store import fake_store


@pytest.fixture(params=["valkey", "fakeredis"])
async def store(request: pytest.FixtureRequest) -> AsyncGenerator[Store]:
    """Each kind of store, connected; what other tests left to be fed or run is not there."""
    made = fake_store() if request.param == "fakeredis" else await Store.connect(request.getfixturevalue("redis_url"))
    await made.redis.delete(keys.BATCHES, keys.FEEDER, keys.ready("promptmill.api.batch"))
    yield made
    await made.redis.delete(keys.BATCHES, keys.FEEDER)
    await made.aclose()


CHUNK = 10
"""Small chunks and a small window: many of both with few lines, for scripts take long over fakeredis."""


async def made(batches: BatchClient, lines: Sequence[BatchLine], *, seal: bool = True, **head: Any) -> str:
    return await support.made(batches, lines, seal=seal, **{"chunk_lines": CHUNK, **head})


@pytest.fixture
def batches(store: Store) -> BatchClient:
    return client_of(store)


@pytest.fixture
def feeder(store: Store) -> Feeder:
    return Feeder(store, Settings(batch_window=20))


@pytest.fixture
def worker(store: Store) -> FakeWorker:
    return FakeWorker(store)


async def test_every_line_runs_once_and_has_its_result(batches, feeder, worker) -> None:
    batch_id = await made(batches, [line(i) for i in range(45)], name="n", user="ann")
    await run_to_end(batches, batch_id, feeder, worker)
    status = await batches.status(batch_id)
    assert (status.state, status.total, status.succeeded, status.fed) == ("completed", 45, 45, 45)
    assert (status.user, status.name, status.uploaded_chunks) == ("ann", "n", 5)
    assert status.usage.output_tokens == 45 * 5
    assert status.cost_usd == pytest.approx(0.045)
    assert status.models == {"echo": 45}
    assert status.ended_at is not None
    results = await all_results(batches, batch_id)
    assert {r.id: r.job.text for r in results if r.job} == {f"line-{i}": f"SAY {i}" for i in range(45)}
    assert len(results) == 45
    assert {r.job.user for r in results if r.job} == {"ann"}
    assert set(worker.ran.values()) == {1}


async def test_lines_run_while_others_are_uploaded(batches, feeder, worker) -> None:
    batch_id = await made(batches, [line(i) for i in range(10)], seal=False)
    await feed_once(feeder)
    await worker.drain()
    status = await batches.status(batch_id)
    assert (status.state, status.total, status.succeeded) == ("uploading", None, 10)
    await batches.add(batch_id, 1, [line(10)])
    await batches.seal(batch_id, 11)
    await run_to_end(batches, batch_id, feeder, worker)
    assert (await batches.status(batch_id)).succeeded == 11


async def test_everything_a_client_does_may_be_repeated(batches, feeder, worker) -> None:
    lines = [line(i) for i in range(15)]
    batch_id = await made(batches, lines, name="n")
    await run_to_end(batches, batch_id, feeder, worker)
    await batches.create(batch_id, BatchHead(name="n", chunk_lines=CHUNK))
    await batches.add(batch_id, 0, lines[:10])
    await batches.add(batch_id, 1, lines[10:])
    await batches.seal(batch_id, 15)
    await run_to_end(batches, batch_id, feeder, worker)
    assert set(worker.ran.values()) == {1}
    assert len(await all_results(batches, batch_id)) == 15


async def test_no_more_lines_wait_than_the_window_allows(store, batches, feeder) -> None:
    batch_id = await made(batches, [line(i) for i in range(50)])
    await feed_once(feeder)
    assert (await batches.status(batch_id)).fed == 20
    assert await store.redis.llen(keys.ready("promptmill.api.batch")) == 20
    await batches.cancel(batch_id)
    await feed_once(feeder)


async def test_batches_share_the_window_and_take_turns(batches, feeder, worker) -> None:
    large = await made(batches, [line(i) for i in range(80)], user="a")
    await feed_once(feeder)
    small = await made(batches, [line(1000 + i) for i in range(15)], user="b")
    fed: list[int] = []
    while not (status := await batches.status(small)).ended:
        await feed_once(feeder)
        await worker.drain()
        fed.append((await batches.status(large)).fed)
    assert status.succeeded == 15
    assert fed[-1] < 80, "the small one had to wait for the whole large one"
    await run_to_end(batches, large, feeder, worker)


async def test_a_batch_of_one_line(batches, feeder, worker) -> None:
    batch_id = await made(batches, [line(0)])
    await run_to_end(batches, batch_id, feeder, worker)
    (result,) = await all_results(batches, batch_id)
    assert (result.index, result.id, result.same) == (0, "line-0", None)


async def test_failures_are_counted_by_their_code_and_show_the_jobs_error(batches, feeder, worker) -> None:
    worker.fail = lambda prompt: int(prompt.split()[1]) % 10 == 0
    batch_id = await made(batches, [line(i) for i in range(20)])
    await run_to_end(batches, batch_id, feeder, worker)
    status = await batches.status(batch_id)
    assert (status.succeeded, status.failed, status.failures) == (18, 2, {"cut": 2})
    failed = [r for r in await all_results(batches, batch_id) if r.job and r.job.error]
    assert sorted(r.index for r in failed) == [0, 10]
    assert {r.job.error.code for r in failed if r.job and r.job.error} == {"cut"}


async def test_results_go_on_at_the_offset_where_a_reader_stopped(batches, feeder, worker) -> None:
    batch_id = await made(batches, [line(i) for i in range(20)])
    await feed_once(feeder)
    await worker.drain()
    first, offset = await batches.results(batch_id, 0, 7)
    assert (len(first), offset) == (7, 7)
    rest, end = await batches.results(batch_id, offset)
    assert (len(rest), end) == (13, 20)
    assert {r.index for r in first + rest} == set(range(20))
    assert await batches.results(batch_id, end) == ([], 20)


async def test_lines_are_read_back_in_the_order_asked_for(batches) -> None:
    lines = [line(i) for i in range(75)]
    batch_id = await made(batches, lines)
    assert await batches.lines(batch_id, [74, 0, 30]) == [lines[74], lines[0], lines[30]]
    with pytest.raises(NotFound):
        await batches.lines(batch_id, [75])


# -- what nobody told of -------------------------------------------------------------------------------------------


async def test_lines_of_which_no_worker_told_are_counted(store, batches, feeder) -> None:
    silent = FakeWorker(store, hints=False)
    batch_id = await made(batches, [line(i) for i in range(30)])
    feeder_now = Feeder(store, Settings(batch_window=20, heartbeat_s=0.001))
    await run_to_end(batches, batch_id, feeder_now, silent)
    assert (await batches.status(batch_id)).succeeded == 30


async def test_a_line_whose_job_was_cancelled_by_itself_is_counted(store, batches) -> None:
    feeder = Feeder(store, Settings(batch_window=20, heartbeat_s=0.001))
    worker = FakeWorker(store)
    batch_id = await made(batches, [line(i) for i in range(5)])
    await feed_once(feeder)
    job_id = await worker.pop()
    assert job_id is not None
    await store.cancel(job_id, "not this one", keys.new_token())
    await run_to_end(batches, batch_id, feeder, worker)
    status = await batches.status(batch_id)
    assert (status.succeeded, status.cancelled, status.failures) == (4, 1, {"cancelled": 1})


async def test_a_line_whose_record_is_gone_counts_as_failed(store, batches) -> None:
    feeder = Feeder(store, Settings(batch_window=20, heartbeat_s=0.001))
    worker = FakeWorker(store)
    batch_id = await made(batches, [line(i) for i in range(5)])
    await feed_once(feeder)
    job_id = await worker.pop()
    assert job_id is not None
    await store.redis.delete(keys.record(job_id), keys.log(job_id))
    await run_to_end(batches, batch_id, feeder, worker)
    status = await batches.status(batch_id)
    assert (status.succeeded, status.failed, status.failures) == (4, 1, {"not_found": 1})
    (gone,) = [r for r in await all_results(batches, batch_id) if r.job is None]
    assert gone.id == "line-0"


async def test_a_line_that_is_no_request_fails_and_the_others_run(store, batches, feeder, worker) -> None:
    lines = [line(i) for i in range(5)]
    lines[2].request["from_a_newer_version"] = True
    batch_id = await made(batches, lines)
    await run_to_end(batches, batch_id, feeder, worker)
    status = await batches.status(batch_id)
    assert (status.succeeded, status.failures) == (4, {"bad_request": 1})


async def test_a_chunk_that_cannot_be_read_stops_no_other_batch(store, batches, feeder, worker) -> None:
    broken = await made(batches, [line(0)])
    await store.redis.hset(keys.batch_lines(broken), "0", b"not packed")
    sound = await made(batches, [line(1)])
    await run_to_end(batches, sound, feeder, worker)
    assert (await batches.status(broken)).fed == 0
    await batches.cancel(broken)


# -- feeders -------------------------------------------------------------------------------------------------------


async def test_a_second_feeder_feeds_nothing_while_the_first_one_does(store, batches, feeder) -> None:
    other = Feeder(store, Settings(batch_window=20))
    batch_id = await made(batches, [line(i) for i in range(10)])
    await feed_once(feeder)
    assert feeder.holds
    await batches.add(await made(batches, [line(i) for i in range(5)], seal=False), 0, [line(i) for i in range(5)])
    await other.round()
    assert not other.holds
    assert (await batches.status(batch_id)).fed == 10
    await feeder.release()
    await other.round()
    assert other.holds


async def test_two_feeders_that_both_believe_to_hold_the_lease_feed_each_line_once(store, batches, worker) -> None:
    first, second = Feeder(store, Settings(batch_window=20)), Feeder(store, Settings(batch_window=20))
    batch_id = await made(batches, [line(i) for i in range(100)])
    while not (await batches.status(batch_id)).ended:
        for feeder in (first, second):
            await store.redis.delete(keys.FEEDER)
            await feeder.round()
        # Neither knows of the other: both act on what they saw.
        await asyncio.gather(first.round(), second.round())
        await worker.drain()
    assert (await batches.status(batch_id)).succeeded == 100
    assert set(worker.ran.values()) == {1}
    assert len(await all_results(batches, batch_id)) == 100


@pytest.mark.parametrize("step", ["reserved", "submitted"])
async def test_a_feeder_that_dies_within_a_step_is_followed_by_one_that_ends_it(store, batches, worker, step) -> None:
    batch_id = await made(batches, [line(i) for i in range(10)])
    dead = Feeder(store, Settings(batch_window=20))
    steps: Any = dead._steps
    died = RuntimeError("killed here")

    async def dies(*args: object, **options: object) -> None:
        if step == "submitted":
            await type(steps)._submit(steps, *args, **options)
        raise died

    steps._submit = dies
    await dead.round()
    status = await batches.status(batch_id)
    sent = int(await store.redis.hget(keys.batch(batch_id), "sent"))
    assert (status.fed, sent) == (10, 0)
    await store.redis.delete(keys.FEEDER)
    heir = Feeder(store, Settings(batch_window=20))
    await run_to_end(batches, batch_id, heir, worker)
    assert (await batches.status(batch_id)).succeeded == 10
    assert set(worker.ran.values()) == {1}


async def test_a_feeder_whose_batch_was_taken_by_another_one_feeds_no_further(store, batches, feeder) -> None:
    batch_id = await made(batches, [line(i) for i in range(30)])
    await feeder.round()
    await run(store, scripts.TAKE, batch_id, "another feeder")
    known = feeder._known[batch_id]
    ((_, view),) = await feeder._views([batch_id])
    await run(store, scripts.TAKE, batch_id, "another feeder")
    assert await feeder._steps.feed(known, view, 10) == 0
    assert (await batches.status(batch_id)).fed == view.fed


async def test_a_name_without_a_batch_is_dropped_after_a_while(store, feeder) -> None:
    now_ms = time.time_ns() // 1_000_000
    await store.redis.zadd(keys.BATCHES, {"young": now_ms, "old": now_ms - 120_000})
    await feeder.round()
    assert await store.redis.zrange(keys.BATCHES, 0, -1) == [b"young"]


# -- cancel, expiry, retention -------------------------------------------------------------------------------------


async def test_cancelling_ends_what_runs_and_what_waits(store, batches, feeder, worker) -> None:
    batch_id = await made(batches, [line(i) for i in range(50)])
    await feed_once(feeder)
    running = await worker.pop()
    assert running is not None
    claimed = await worker.claim(running)
    assert claimed is not None
    for _ in range(10):
        done = await worker.pop()
        assert done is not None
        job = await worker.claim(done)
        assert job is not None
        await worker.end(done, job)
    assert (await batches.cancel(batch_id)).state == "cancelling"
    await feed_once(feeder)
    status = await batches.status(batch_id)
    assert (status.state, status.succeeded, status.cancelled, status.done) == ("cancelled", 10, 40, 50)
    assert (await store.get(running)).state == "cancelled"
    assert await worker.drain() == 0
    assert len(await all_results(batches, batch_id)) == 20, "lines that were never fed have no result"
    assert (await batches.cancel(batch_id)).state == "cancelled"


async def test_a_batch_past_its_deadline_expires(store, batches, feeder, worker) -> None:
    batch_id = await made(batches, [line(i) for i in range(30)])
    await feed_once(feeder)
    await store.redis.hset(keys.batch(batch_id), "deadline", 1)
    await feed_once(feeder)
    await feed_once(feeder)
    status = await batches.status(batch_id)
    assert (status.state, status.expired, status.cancelled) == ("expired", 10, 20)
    (one, *_), _ = await batches.results(batch_id, 0, 1)
    assert one.job is not None
    assert one.job.state == "cancelled"


async def test_lines_wait_as_long_as_their_batch_and_not_only_as_long_as_other_jobs(store, batches, feeder, worker):
    batch_id = await made(batches, [line(0), line(1, timeouts={"queue_s": 7})], expires_s=50_000)
    await feed_once(feeder)
    waits = []
    for _ in range(2):
        record = await store.find(await worker.pop())
        waits.append(record.st["deadline"] - record.st["created"])
    assert 49_000_000 < waits[0] <= 50_000_000
    assert waits[1] == 7_000
    await batches.cancel(batch_id)


async def test_jobs_outlast_the_longest_batch_and_are_let_go_of_when_theirs_ends(store, batches, feeder, worker):
    batch_id = await made(batches, [line(i) for i in range(3)], expires_s=500_000, retention_s=1_000)
    await feed_once(feeder)
    names = [keys.record(raw.decode()) for raw in await store.redis.lrange(keys.ready("promptmill.api.batch"), 0, -1)]
    job_id = await worker.pop()
    await worker.end(job_id, await worker.claim(job_id))
    assert await store.redis.ttl(names[0]) > 400_000, "the batch may run for so long, and is read then"
    await run_to_end(batches, batch_id, feeder, worker)
    await feed_once(feeder)
    assert all([0 < await store.redis.ttl(name) <= 1_000 for name in names])
    assert not await store.redis.zscore(keys.BATCHES, batch_id)
    assert len(await all_results(batches, batch_id)) == 3


async def test_lines_of_a_batch_are_jobs_but_stand_in_no_list_of_jobs(store, batches, feeder, worker):
    batch_id = await made(batches, [line(0)], user="lister")
    await feed_once(feeder)
    job_id = await worker.pop()
    job = await store.get(job_id)
    assert (job.state, job.priority, job.user) == ("queued", "batch", "lister")
    record = await store.find(job_id)
    assert record.batch == (batch_id, 0, "line-0")
    assert await store.list_ids("lister", None, 10) == []
    await batches.cancel(batch_id)


# -- equal lines, retries ------------------------------------------------------------------------------------------


async def test_equal_lines_run_once_and_all_have_the_answer(batches, feeder, worker) -> None:
    lines = [line(i, same=i % 5 if i >= 5 else None) for i in range(60)]
    batch_id = await made(batches, lines)
    await run_to_end(batches, batch_id, feeder, worker)
    status = await batches.status(batch_id)
    assert (status.succeeded, status.usage.output_tokens) == (60, 25)
    assert sum(worker.ran.values()) == 5
    results = {r.index: r for r in await all_results(batches, batch_id)}
    assert len(results) == 60
    assert all(r.id == f"line-{i}" and r.job and r.job.text == f"SAY {i % 5}" for i, r in results.items())
    assert results[57].same == 2


async def test_lines_behind_the_end_of_the_equal_one_have_its_answer_too(batches, feeder, worker) -> None:
    batch_id = await made(batches, [line(i) for i in range(10)], seal=False)
    await feed_once(feeder)
    await worker.drain()
    await batches.add(batch_id, 1, [line(10 + i, same=3) for i in range(5)])
    await batches.seal(batch_id, 15)
    await run_to_end(batches, batch_id, feeder, worker)
    assert (await batches.status(batch_id)).succeeded == 15
    assert worker.ran["say 3"] == 1
    assert [r.job.text for r in await all_results(batches, batch_id) if r.same is not None and r.job] == ["SAY 3"] * 5


async def test_more_equal_lines_than_may_wait_are_counted_once_the_first_one_has_ended(batches, feeder, worker) -> None:
    many = scripts.LINKED_MAX + 500
    batch_id = await made(batches, [line(0), *(line(i, same=0) for i in range(1, many))], chunk_lines=100)
    await feed_once(feeder)
    assert (await batches.status(batch_id)).fed < many
    await worker.drain()
    while not (await batches.status(batch_id)).ended:
        await feed_once(feeder)
        await asyncio.sleep(0.05)  # the feeder rests where it could not go on
    assert (await batches.status(batch_id)).succeeded == many
    assert sum(worker.ran.values()) == 1


async def test_a_cancelled_batch_whose_equal_lines_have_no_place_ends(batches, feeder, worker) -> None:
    many = scripts.LINKED_MAX + 500
    batch_id = await made(batches, [line(0), *(line(i, same=0) for i in range(1, many))], chunk_lines=100)
    await feed_once(feeder)
    await batches.cancel(batch_id)
    await feed_once(feeder)
    status = await batches.status(batch_id)
    assert (status.state, status.cancelled) == ("cancelled", many)


async def test_failed_lines_run_again_in_a_batch_of_their_own(batches, feeder, worker) -> None:
    worker.fail = lambda prompt: int(prompt.split()[1]) < 15
    lines = [line(i, same=7 if i == 25 else None) for i in range(30)]
    batch_id = await made(batches, lines, user="ann", name="n", options={"format": "simple"})
    await run_to_end(batches, batch_id, feeder, worker)
    again = await batches.retry_failed(batch_id)
    assert await batches.retry_failed(batch_id) == again
    worker.fail = lambda _: False
    await run_to_end(batches, again, feeder, worker)
    status = await batches.status(again)
    assert (status.total, status.succeeded, status.user, status.name) == (16, 16, "ann", "n")
    assert (status.retry_of, status.options) == (batch_id, {"format": "simple"})
    assert worker.ran["say 7"] == 2, "once in each batch, for both of its lines"
    ids = Counter(r.id for r in await all_results(batches, again))
    assert ids == Counter({f"line-{i}": 1 for i in (*range(15), 25)})


async def test_only_a_batch_that_ended_with_failures_is_retried(batches, feeder, worker) -> None:
    batch_id = await made(batches, [line(0)])
    with pytest.raises(BadRequest, match="has not ended"):
        await batches.retry_failed(batch_id)
    await run_to_end(batches, batch_id, feeder, worker)
    with pytest.raises(BadRequest, match="no line"):
        await batches.retry_failed(batch_id)


async def test_lines_that_expired_before_they_began_are_retried_too(store, batches, feeder, worker) -> None:
    batch_id = await made(batches, [line(i) for i in range(30)])
    await feed_once(feeder)
    await worker.drain()
    await store.redis.hset(keys.batch(batch_id), "deadline", 1)
    await feed_once(feeder)
    assert (await batches.status(batch_id)).state == "expired"
    again = await batches.retry_failed(batch_id)
    assert (await batches.status(again)).total == 10
    await run_to_end(batches, again, feeder, worker)
    assert {r.id for r in await all_results(batches, again)} == {f"line-{i}" for i in range(20, 30)}


# -- what is refused, and other answers ----------------------------------------------------------------------------


async def test_what_cannot_be_is_refused_with_its_reason(batches) -> None:
    batch_id = await made(batches, [line(i) for i in range(100)], seal=False, chunk_lines=100)
    for wrong, field in (
        (batches.add(batch_id, 3, [line(300)]), "chunk"),
        (batches.add(batch_id, 1, []), "lines"),
        (batches.add(batch_id, 1, [line(i) for i in range(101)]), "lines"),
        (batches.add(batch_id, 1, [line(100, same=100)]), "same"),
        (batches.seal(batch_id, 99), "total"),
        (batches.seal(batch_id, 0), "total"),
        (batches.create("no id!"), "id"),
        (batches.create(keys.new_job_id(), BatchHead(expires_s=1e9)), "expires_s"),
    ):
        with pytest.raises(BadRequest) as caught:
            await wrong
        assert caught.value.field == field
    with pytest.raises(IdempotencyConflict):
        await batches.create(batch_id, BatchHead(name="another"))
    await batches.cancel(batch_id)
    with pytest.raises(BadRequest, match="takes no more lines"):
        await batches.add(batch_id, 1, [line(100)])


async def test_a_batch_that_is_not_there_is_not_found(batches) -> None:
    nobody = keys.new_job_id()
    for asked in (
        batches.status(nobody),
        batches.results(nobody),
        batches.lines(nobody, [0]),
        batches.add(nobody, 0, [line(0)]),
        batches.seal(nobody, 1),
        batches.cancel(nobody),
        batches.retry_failed(nobody),
        batches.wait_change(nobody),
    ):
        with pytest.raises(NotFound):
            await asked


async def test_batches_are_listed_newest_first_by_user(store, batches) -> None:
    user = keys.new_job_id()
    ids: list[str] = []
    for i in range(3):
        ids.append(await made(batches, [line(0)], user=user, name=str(i)))
        await store.redis.zadd(keys.user_batches(user), {ids[-1]: i})
    assert [b.id for b in await batches.list(user)] == ids[::-1]
    assert [b.id for b in await batches.list(user, 2)] == ids[:0:-1]
    await store.redis.delete(keys.batch(ids[1]))
    assert [b.id for b in await batches.list(user)] == [ids[2], ids[0]]
    assert {b.id for b in await batches.list(None, 1000)} >= {ids[0], ids[2]}
    for batch_id in (ids[0], ids[2]):
        await batches.cancel(batch_id)


async def test_who_waits_for_a_change_gets_it(batches, feeder, worker) -> None:
    batch_id = await made(batches, [line(i) for i in range(3)])
    known = await batches.status(batch_id)
    assert await batches.wait_change(batch_id, known, timeout_s=0.05) == known
    waiting: asyncio.Task[BatchStatus] = asyncio.create_task(batches.wait_change(batch_id, known))
    await run_to_end(batches, batch_id, feeder, worker)
    assert (await waiting).fed > 0
    assert (await batches.wait_change(batch_id, await batches.status(batch_id))).ended
