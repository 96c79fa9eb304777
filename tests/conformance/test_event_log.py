"""Each transition of a job: once, repeated after a lost reply, and too late; over every kind of store.

What another store (a Redis Cluster, a newer Redis) must show is that it passes this file unchanged.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator
from datetime import timedelta

import pytest

from promptmill import keys
from promptmill.contract import Progress, Timeouts, Token, parse_request
from promptmill.errors import IdempotencyConflict, NotFound
from promptmill.store import START, Claimed, EventId, Store, Submission
from promptmill.store.scripts import APPEND, FENCED, GONE
from tests.support.fake_store import fake_store
from tests.support.store import redis_program, running_store


@pytest.fixture(scope="module")
def real_redis(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    """A Redis, where the run's own store is a Valkey."""
    with running_store(tmp_path_factory.mktemp("redis"), append_only=False, program=redis_program()) as server:
        yield server.url


URLS = {"valkey": "redis_url", "redis": "real_redis"}


@pytest.fixture(params=[*URLS, "fakeredis"])
async def store(request: pytest.FixtureRequest) -> AsyncGenerator[Store]:
    """Each kind of store, connected."""
    url = URLS.get(request.param)
    made = await Store.connect(request.getfixturevalue(url)) if url else fake_store()
    yield made
    await made.aclose()


STARTED = Progress(phase="started")
TOKEN = b'{"type":"token","text":"x"}'
DONE = b'{"type":"done","text":"x"}'
ERROR_END = {"error": {"code": "cut", "message": "m"}}


def submission(queue_s: float = 60, job_id: str | None = None) -> Submission:
    request = parse_request({"prompt": "hi", "user": "u"})
    timeouts = Timeouts(queue_s=queue_s, total_s=60)
    return Submission(job_id or keys.new_job_id(), request, "promptmill.api", timeouts, 3, timedelta(hours=1))


async def submitted(store: Store, queue_s: float = 60) -> str:
    job = submission(queue_s)
    assert await store.submit([job]) == [True]
    return job.job_id


async def claimed(
    store: Store, job_id: str, token: str = "claim-1", worker: str = "w1", *, alone: bool = False
) -> Claimed:
    got = await store.claim(job_id, token, worker, STARTED, alone=alone)
    assert isinstance(got, Claimed)
    return got


async def events(store: Store, job_id: str) -> list[bytes]:
    entries, _, _ = await store.read_log(job_id, START)
    return [data for _, data in entries]


async def test_a_repeated_submit_changes_nothing(store: Store) -> None:
    job = submission()
    assert await store.submit([job]) == [True]
    before = await store.redis.hgetall(keys.record(job.job_id))
    assert await store.submit([job]) == [True]
    assert await store.redis.hgetall(keys.record(job.job_id)) == before
    assert len(await events(store, job.job_id)) == 1


async def test_a_submit_repeated_after_the_claim_sends_no_message_again(store: Store) -> None:
    job = submission()
    await store.submit([job])
    await claimed(store, job.job_id)
    assert await store.submit([job]) == [False]


async def test_of_many_claims_exactly_one_wins(store: Store) -> None:
    job_id = await submitted(store)
    got = await asyncio.gather(*(store.claim(job_id, f"t{i}", f"w{i}", STARTED) for i in range(20)))
    assert sum(isinstance(g, Claimed) for g in got) == 1
    assert {g for g in got if isinstance(g, str)} == {"not_queued"}
    assert (await store.get(job_id)).attempt == 1


async def test_a_claim_whose_reply_was_lost_is_answered_again(store: Store) -> None:
    job_id = await submitted(store)
    first = await claimed(store, job_id)
    again = await claimed(store, job_id)
    assert again.epoch == first.epoch
    assert (await store.get(job_id)).attempt == 1
    assert len(await events(store, job_id)) == 2


async def test_a_job_past_its_queue_time_is_not_claimed_and_expires(store: Store) -> None:
    job_id = await submitted(store, queue_s=0.001)
    await asyncio.sleep(0.01)  # the deadline is the store's clock's, nothing to wait on
    assert await store.claim(job_id, "t", "w", STARTED) == "expired"
    assert await store.expire(job_id, "e")
    assert await store.expire(job_id, "e"), "repeated with its token it answers as before"
    job = await store.get(job_id)
    assert job.state == "expired"
    assert job.error is not None
    assert job.error.code == "expired"


async def test_a_job_within_its_queue_time_does_not_expire(store: Store) -> None:
    job_id = await submitted(store)
    assert not await store.expire(job_id, "e")
    assert (await store.get(job_id)).state == "queued"


async def append(store: Store, job_id: str, claim: str, epoch: int, first: int, *payloads: bytes) -> int:
    return await store.run(APPEND, job_id, claim, epoch, first, *payloads)


async def test_events_sent_again_are_there_once(store: Store) -> None:
    job_id = await submitted(store)
    epoch = (await claimed(store, job_id)).epoch
    assert await append(store, job_id, "claim-1", epoch, 2, TOKEN, TOKEN) == 0
    assert await append(store, job_id, "claim-1", epoch, 2, TOKEN, TOKEN, TOKEN) == 0
    entries, _, _ = await store.read_log(job_id, START)
    assert [e for e, _ in entries][1:] == [EventId(epoch, n) for n in (1, 2, 3, 4)]


async def test_a_fenced_writer_adds_nothing(store: Store) -> None:
    job_id = await submitted(store)
    epoch = (await claimed(store, job_id)).epoch
    assert await store.requeue(job_id, dead_worker="w1", max_crashes=3) == "queued"
    before = await events(store, job_id)
    assert await append(store, job_id, "claim-1", epoch, 2, TOKEN) == FENCED
    await claimed(store, job_id, "claim-2", "w2")
    assert await append(store, job_id, "claim-1", epoch, 2, TOKEN) == FENCED
    assert TOKEN not in await events(store, job_id)
    assert len(before) == 3


async def test_a_deleted_log_is_not_made_anew(store: Store) -> None:
    job_id = await submitted(store)
    epoch = (await claimed(store, job_id)).epoch
    await store.redis.delete(keys.log(job_id))
    assert await append(store, job_id, "claim-1", epoch, 2, TOKEN) == GONE
    assert not await store.redis.exists(keys.log(job_id))


async def test_finish_is_repeatable_and_final(store: Store) -> None:
    job_id = await submitted(store)
    await claimed(store, job_id)
    for _ in range(2):
        assert await store.finish(job_id, "claim-1", "succeeded", DONE, {"text": "x"}, [])
    assert not await store.finish(job_id, "claim-2", "failed", DONE, ERROR_END, [])
    assert not await store.cancel(job_id, "too late", "c")
    assert await store.requeue(job_id, dead_worker="w1", max_crashes=3) == "not_running"
    assert (await events(store, job_id)).count(DONE) == 1
    assert (await store.get(job_id)).state == "succeeded"


async def test_cancel_ends_a_running_job_and_fences_it(store: Store) -> None:
    job_id = await submitted(store)
    epoch = (await claimed(store, job_id)).epoch
    for _ in range(2):
        assert await store.cancel(job_id, "stop", "c")
    assert await append(store, job_id, "claim-1", epoch, 2, TOKEN) == FENCED
    assert not await store.finish(job_id, "claim-1", "succeeded", DONE, {"text": "x"}, [])
    ends = [e for e in await events(store, job_id) if b'"cancelled"' in e]
    assert ends == [b'{"type":"cancelled","reason":"stop"}']


async def test_the_text_that_readers_saw_is_kept_at_a_cancel(store: Store) -> None:
    job_id = await submitted(store)
    epoch = (await claimed(store, job_id)).epoch
    await append(store, job_id, "claim-1", epoch, 2, b'{"type":"token","text":"void"}')
    await store.requeue(job_id, claim="claim-1", max_crashes=3)
    epoch = (await claimed(store, job_id, "claim-2")).epoch
    pieces = ["half \u2028", '"an"', "\n/answer \U0001f642"]
    await append(store, job_id, "claim-2", epoch, 2, *(Token(text=p).to_json() for p in pieces))
    assert await store.cancel(job_id, "stop", "c")
    job = await store.get(job_id)
    assert (job.state, job.text) == ("cancelled", "".join(pieces))


async def test_a_job_that_never_spoke_has_no_text_after_a_cancel(store: Store) -> None:
    job_id = await submitted(store)
    await claimed(store, job_id)
    assert await store.cancel(job_id, "stop", "c")
    assert (await store.get(job_id)).text is None


async def test_the_text_of_the_last_worker_is_kept_when_a_job_has_lost_them_all(store: Store) -> None:
    job_id = await submitted(store)
    epoch = (await claimed(store, job_id)).epoch
    await append(store, job_id, "claim-1", epoch, 2, TOKEN)
    assert await store.requeue(job_id, dead_worker="w1", max_crashes=1) == "failed"
    job = await store.get(job_id)
    assert (job.state, job.text) == ("failed", "x")
    assert not any(b'"restart"' in e for e in await events(store, job_id))


async def test_cancel_of_an_unknown_job_says_so(store: Store) -> None:
    with pytest.raises(NotFound):
        await store.cancel(keys.new_job_id(), "stop", "c")


async def test_of_many_settlers_one_requeues_and_a_late_one_hurts_nobody(store: Store) -> None:
    job_id = await submitted(store)
    await claimed(store, job_id)
    got = await asyncio.gather(*(store.requeue(job_id, dead_worker="w1", max_crashes=3) for _ in range(10)))
    assert sorted(got) == ["not_running"] * 9 + ["queued"]
    await claimed(store, job_id, "claim-2", "w2")
    assert await store.requeue(job_id, dead_worker="w1", max_crashes=3) == "not_running"
    assert (await store.get(job_id)).state == "running"


async def test_a_requeue_whose_reply_was_lost_is_answered_again(store: Store) -> None:
    job_id = await submitted(store)
    await claimed(store, job_id)
    for _ in range(2):
        assert await store.requeue(job_id, claim="claim-1", max_crashes=3, token="r") == "queued"
    await claimed(store, job_id, "claim-2")
    assert await store.requeue(job_id, claim="claim-1", max_crashes=3, token="r") == "queued"
    assert (await store.get(job_id)).state == "running", "an old repeat takes nothing from the new holder"


async def test_a_requeue_voids_the_text_only_where_there_was_some(store: Store) -> None:
    silent = await submitted(store)
    await claimed(store, silent)
    await store.requeue(silent, dead_worker="w1", max_crashes=3)
    assert not any(b'"restart"' in e for e in await events(store, silent))
    spoken = await submitted(store)
    epoch = (await claimed(store, spoken)).epoch
    await append(store, spoken, "claim-1", epoch, 2, TOKEN)
    await store.requeue(spoken, dead_worker="w1", max_crashes=3)
    assert b'"restart"' in (await events(store, spoken))[-1]


async def test_a_job_that_loses_every_worker_fails_with_its_attempts_listed(store: Store) -> None:
    job_id = await submitted(store)
    outcomes = []
    for i in range(3):
        await claimed(store, job_id, f"c{i}", f"w{i}", alone=i == 2)
        outcomes.append(await store.requeue(job_id, dead_worker=f"w{i}", max_crashes=3))
    assert outcomes == ["queued", "queued", "failed"]
    job = await store.get(job_id)
    assert job.error is not None
    assert job.error.code == "crashed"
    assert [(a.attempt, a.outcome) for a in job.attempts] == [(1, "crashed"), (2, "crashed"), (3, "crashed")]


async def quarantined(store: Store) -> str:
    """A job that lost two workers and waits to be run alone."""
    job_id = await submitted(store)
    for i in range(2):
        await claimed(store, job_id, f"c{i}", f"w{i}")
        assert await store.requeue(job_id, dead_worker=f"w{i}", max_crashes=6) == "queued"
    return job_id


async def test_a_job_that_lost_two_workers_is_claimed_alone_only(store: Store) -> None:
    job_id = await quarantined(store)
    assert await store.claim(job_id, "c2", "w2", STARTED) == "alone"
    await claimed(store, job_id, "c3", "w3", alone=True)
    # Handed back it is still one to be run alone.
    assert await store.requeue(job_id, claim="c3", max_crashes=6) == "queued"
    assert await store.claim(job_id, "c4", "w4", STARTED) == "alone"


async def test_a_job_seen_to_end_its_own_process_is_poisoned_once_and_kept_longer(store: Store) -> None:
    job_id = await quarantined(store)
    await claimed(store, job_id, "c3", "w3", alone=True)
    assert await store.requeue(job_id, dead_worker="w2", max_crashes=6, poisoned=True) == "not_running"
    assert await store.requeue(job_id, dead_worker="w3", max_crashes=6, poisoned=True, token="t") == "failed"
    assert await store.requeue(job_id, dead_worker="w3", max_crashes=6, poisoned=True, token="t") == "failed"
    assert await store.requeue(job_id, dead_worker="w3", max_crashes=6) == "not_running"
    job = await store.get(job_id)
    assert job.error is not None
    assert (job.state, job.error.code, len(job.attempts)) == ("failed", "poisoned", 3)
    assert sum(b'"error"' in e for e in await events(store, job_id)) == 1
    kept_s = await store.redis.ttl(keys.record(job_id))
    assert kept_s > keys.DEAD_TTL.total_seconds() - 60


async def test_a_handed_back_job_costs_no_attempt(store: Store) -> None:
    job_id = await submitted(store)
    await claimed(store, job_id)
    assert await store.requeue(job_id, claim="somebody else's", max_crashes=3) == "not_running"
    assert await store.requeue(job_id, claim="claim-1", max_crashes=3) == "queued"
    job = await store.get(job_id)
    assert (job.state, job.attempt, job.attempts) == ("queued", 0, [])


async def test_epochs_rise_with_every_transition(store: Store) -> None:
    job_id = await submitted(store)
    for i in range(3):
        await claimed(store, job_id, f"c{i}", "w")
        await store.requeue(job_id, claim=f"c{i}", max_crashes=3)
    await store.cancel(job_id, "stop", "t")
    entries, _, _ = await store.read_log(job_id, START)
    epochs = [e.epoch for e, _ in entries]
    assert len(epochs) == 8
    assert epochs == sorted(set(epochs))


async def test_an_idempotency_key_stands_for_one_request(store: Store) -> None:
    key, hour = keys.new_token(), timedelta(hours=1)
    assert await store.reserve("u", key, "job-1", "d1", hour) == "job-1"
    assert await store.reserve("u", key, "job-2", "d1", hour) == "job-1"
    assert await store.reserve("other", key, "job-3", "d1", hour) == "job-3"
    with pytest.raises(IdempotencyConflict):
        await store.reserve("u", key, "job-4", "d2", hour)


async def test_scripts_survive_a_flushed_script_cache(store: Store) -> None:
    job_id = await submitted(store)
    await store.redis.script_flush()
    await claimed(store, job_id)
    await store.redis.script_flush()
    assert await submitted(store)


async def test_scripts_survive_a_cache_that_is_flushed_before_each_write(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = store.ask

    async def flushed_before(*args, **options) -> list:
        await store.redis.script_flush()
        return await ask(*args, **options)

    monkeypatch.setattr(store, "ask", flushed_before)
    job_id = await submitted(store)
    await claimed(store, job_id)
    assert await store.cancel(job_id, "stop", "t")
