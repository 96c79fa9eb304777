"""Real worker processes: jobs run, workers die, stop and freeze, stores restart, and every job ends once."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncGenerator, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from promptmill import AsyncProducer, JobCancelled, JobFailed, Producer, keys
from promptmill.contract import Restart
from promptmill.errors import Closed
from promptmill.settings import Settings, load_settings
from promptmill.store import Store
from tests.support.processes import PATIENCE_S, wait_until
from tests.support.simulator import Plan, Simulator
from tests.support.store import keys_without_ttl, running_store
from tests.support.streams import check_whole, collect, phases, text_of, wait_for_tokens
from tests.support.worker import QUICK, STEADY, worker_process

MODELS = """
[models.fast]
type = "echo"
[models.slow]
type = "echo"
options = { tokens_per_s = 20 }
[models.hang]
type = "echo"
options = { fault = "hang" }
timeouts = { first_token_s = 0.3 }
[models.stall]
type = "echo"
options = { fault = "stall", fault_after = 2 }
timeouts = { idle_s = 0.3 }
[models.endless]
type = "echo"
options = { tokens_per_s = 20, repeat = 1000 }
timeouts = { total_s = 0.6 }
[models.flaky]
type = "echo"
options = { fault = "overloaded", times = 2 }
[models.broken]
type = "echo"
options = { fault = "cut", fault_after = 2 }
"""
LONG = "word " * 40
ENDLESS = "word " * 6000
"""Five minutes of ``slow``: a job that still runs, however late the test comes to it."""


def simulated(sim: Simulator) -> str:
    """A model whose answers the test plans one by one."""
    return f'[models.sim]\ntype = "local_openai"\napi_url = "{sim.url}/v1"\nmodel_name = "sim"\n'


SHARED = pytest.mark.xdist_group("worker")
"""Of tests that leave the module's worker as it is."""


@pytest.fixture(scope="module")
def shared_worker(tmp_path_factory: pytest.TempPathFactory) -> Generator[Settings]:
    """A worker with all of ``MODELS``, at a store of its own: it must not take the other tests' jobs."""
    directory = tmp_path_factory.mktemp("worker")
    path = directory / "promptmill.toml"
    with running_store(directory, append_only=False) as server:
        path.write_text(f'redis_url = "{server.url}"\n' + QUICK + MODELS)
        with worker_process(path, "shared") as worker:
            asyncio.run(worker.ready(server.url))
            yield load_settings(path)
        assert keys_without_ttl(server.url) == []


@pytest.fixture
async def running(shared_worker: Settings) -> AsyncGenerator[AsyncProducer]:
    """A producer whose jobs the module's worker runs."""
    async with AsyncProducer(shared_worker) as made:
        yield made


@SHARED
async def test_a_job_runs_and_its_tokens_are_its_text(running: AsyncProducer) -> None:
    assert (await running.ready()).ok
    for prompt in [
        "hello",
        "zwölf Boxkämpfer",
        "日本語 🏳️‍🌈",
        "a\u2028b\u0085c",
        "half \ud83d pair \ud83d\ude00",
    ]:
        job = await running.submit(prompt, model="fast", metadata={"k": "v"})
        events = await collect(running, job.id)
        check_whole(events)
        stored = await job.result(PATIENCE_S)
        assert stored.text == text_of(events)
        assert (stored.state, stored.model, stored.backend) == ("succeeded", "fast", "echo")
        assert stored.metadata == {"k": "v"}
        assert stored.started_at is not None
        assert stored.finished_at is not None
        assert stored.created_at <= stored.started_at <= stored.finished_at
        assert [a.outcome for a in stored.attempts] == ["succeeded"]


@SHARED
@pytest.mark.parametrize(
    ("model", "code"),
    [("hang", "timeout_first_token"), ("stall", "timeout_idle"), ("endless", "timeout_total"), ("broken", "cut")],
)
async def test_a_failed_attempt_ends_the_job_with_its_code_and_keeps_the_text(
    running: AsyncProducer, model, code
) -> None:
    job = await running.submit("one two three four", model=model)
    with pytest.raises(JobFailed) as caught:
        await job.result(PATIENCE_S)
    assert caught.value.code == code
    events = await collect(running, job.id)
    check_whole(events)
    stored = await job.get()
    assert (stored.text or "") == text_of(events)
    assert [a.outcome for a in stored.attempts] == [code]


@SHARED
async def test_a_failure_of_the_moment_is_tried_again_before_the_first_token(running: AsyncProducer) -> None:
    job = await running.submit("x y", model="flaky")
    stored = await job.result(PATIENCE_S)
    assert [a.outcome for a in stored.attempts] == ["overloaded", "overloaded", "succeeded"]
    events = await collect(running, job.id)
    assert phases(events) == ["queued", "started", "retrying", "retrying"]
    assert not any(isinstance(e, Restart) for e in events)


async def test_an_unknown_model_fails_the_job_where_the_producer_could_not_know(write_config) -> None:
    path, settings = write_config(QUICK + MODELS)
    blind = settings.model_copy(update={"models": {}})
    with worker_process(path) as worker:
        async with AsyncProducer(blind) as producer:
            await worker.ready(settings.store_url)
            job = await producer.submit("x", model="nobody")
            with pytest.raises(JobFailed) as caught:
                await job.result(PATIENCE_S)
            assert caught.value.code == "unknown_model"
            assert "fast" in caught.value.message


async def test_a_request_that_this_version_cannot_read_ends_its_job(write_config) -> None:
    path, settings = write_config(QUICK + MODELS)
    async with AsyncProducer(settings) as producer:
        job = await producer.submit("x", model="fast")
        store = await producer.store()
        await store.redis.hset(keys.record(job.id), "request", b'{"messages": [], "from_the_future": 1}')
        with worker_process(path):
            with pytest.raises(JobFailed) as caught:
                await job.result(PATIENCE_S)
            assert caught.value.code == "crashed"
            assert (await (await producer.submit("next", model="fast")).result(PATIENCE_S)).text == "next"


async def test_a_second_signal_hands_running_jobs_back_at_once(write_config) -> None:
    path, settings = write_config(QUICK + "drain_s = 60\n" + MODELS)
    async with AsyncProducer(settings) as producer:
        with worker_process(path, "first") as first:
            worker_id = await first.ready(settings.store_url)
            jobs = await producer.submit_many([{"prompt": ENDLESS, "model": "slow"} for _ in range(20)])
            await wait_for_tokens(producer, jobs[-1].id, 2)
            first.signal(signal.SIGTERM)
            await wait_until(lambda: workers_are(producer, 0), "the worker drains")
            await asyncio.sleep(0.3)  # a second signal counts only after a moment: supervisors signal twice
            first.signal(signal.SIGTERM)
            await wait_until(lambda: first.process.poll() is not None, "the worker ended")
        store = await producer.store()
        assert {(await job.get()).state for job in jobs} == {"queued"}
        assert not await store.redis.exists(keys.claims(worker_id))
        assert not await store.redis.hexists(keys.WORKERS, worker_id)
        for job in jobs:
            await job.cancel()


async def test_a_producer_that_is_closed_says_so_and_cuts_no_answer_short(write_config) -> None:
    path, settings = write_config(QUICK + "drain_s = 0\n" + MODELS)
    producer = AsyncProducer(settings)
    with worker_process(path) as worker:
        await worker.ready(settings.store_url)
        job = await producer.submit(ENDLESS, model="slow")
        reading = asyncio.create_task(collect(producer, job.id))
        await wait_for_tokens(producer, job.id, 2)
        await producer.aclose()
        with pytest.raises(Closed):
            await reading
        with pytest.raises(Closed):
            await job.result(PATIENCE_S)
        with pytest.raises(Closed):
            await producer.submit("x")


def test_closing_a_synchronous_producer_wakes_those_who_wait(write_config) -> None:
    _, settings = write_config(MODELS)
    producer = Producer(settings)
    job = producer.submit("x", model="fast")
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(job.result)
        following = threads.submit(lambda: list(job.events()))
        producer.close()
        for future in (waiting, following):
            with pytest.raises(Closed):
                future.result(PATIENCE_S)
    with pytest.raises(Closed):
        job.get()


async def test_a_killed_workers_job_is_picked_up_and_the_text_begins_anew(write_config) -> None:
    async with Simulator() as sim, AsyncExitStack() as stack:
        path, settings = write_config(QUICK + simulated(sim))
        producer = await stack.enter_async_context(AsyncProducer(settings))
        sim.plan(text=LONG, fault="stall", after=5)
        sim.default = Plan(text=LONG)
        first = stack.enter_context(worker_process(path, "first"))
        await first.ready(settings.store_url)
        job = await producer.submit("x", model="sim")
        reading = asyncio.create_task(collect(producer, job.id))
        await wait_for_tokens(producer, job.id, 1)
        first.signal(signal.SIGKILL)
        with worker_process(path, "second"):
            stored = await job.result(PATIENCE_S)
            events = await reading
        check_whole(events)
        assert stored.text == LONG == text_of(events)
        assert sum(isinstance(e, Restart) for e in events) == 1
        assert [a.outcome for a in stored.attempts] == ["crashed", "succeeded"]
        assert stored.attempt == 2


async def test_a_frozen_worker_that_wakes_writes_nothing_more(write_config) -> None:
    async with Simulator() as sim, AsyncExitStack() as stack:
        path, settings = write_config(QUICK + MODELS + simulated(sim))
        producer = await stack.enter_async_context(AsyncProducer(settings))
        sim.plan(text=ENDLESS, rate=20)
        sim.default = Plan(text=LONG, rate=20)
        workers = [stack.enter_context(worker_process(path, name)) for name in ("first", "second")]
        ids = [await worker.ready(settings.store_url) for worker in workers]
        job = await producer.submit("x", model="sim")
        reading = asyncio.create_task(collect(producer, job.id))
        await wait_for_tokens(producer, job.id, 5)
        store = await producer.store()
        held = [bool(await store.redis.sismember(keys.claims(worker_id), job.id)) for worker_id in ids]
        frozen, other = workers if held[0] else reversed(workers)
        frozen.signal(signal.SIGSTOP)
        await wait_until(lambda: attempt_is(producer, job.id, 2), "the other worker has the job")
        frozen.signal(signal.SIGCONT)
        stored = await job.result(PATIENCE_S)
        events = await reading
        check_whole(events)
        assert stored.text == LONG == text_of(events)
        # The woken worker is alive and serves again.
        await wait_until(lambda: workers_are(producer, 2), "both workers are ready")
        other.stop()
        assert (await (await producer.submit("again", model="fast")).result(PATIENCE_S)).text == "again"


async def test_a_terminated_worker_lets_its_job_finish_and_claims_no_other(write_config) -> None:
    path, settings = write_config(QUICK + "drain_s = 20\n" + MODELS)
    async with AsyncProducer(settings) as producer, AsyncExitStack() as stack:
        worker = stack.enter_context(worker_process(path))
        await worker.ready(settings.store_url)
        job = await producer.submit("word " * 20, model="slow")
        await wait_for_tokens(producer, job.id, 2)
        worker.signal(signal.SIGTERM)
        await wait_until(lambda: workers_are(producer, 0), "the worker says that it drains")
        late = await producer.submit("late", model="fast")
        stored = await job.result(PATIENCE_S)
        assert [a.outcome for a in stored.attempts] == ["succeeded"]
        await wait_until(lambda: worker.process.poll() is not None, "the worker ended")
        assert worker.process.returncode == 0
        assert (await late.get()).state == "queued"
        with worker_process(path, "next"):
            assert (await late.result(PATIENCE_S)).text == "late"


async def test_past_the_drain_limit_a_job_is_handed_back_at_once(write_config) -> None:
    async with Simulator() as sim, AsyncExitStack() as stack:
        path, settings = write_config(STEADY + "drain_s = 0.2\n" + simulated(sim))
        producer = await stack.enter_async_context(AsyncProducer(settings))
        sim.plan(text=LONG, fault="stall", after=5)
        sim.default = Plan(text=LONG)
        first = stack.enter_context(worker_process(path, "first"))
        second = stack.enter_context(worker_process(path, "second"))
        holder = {await first.ready(settings.store_url): first, await second.ready(settings.store_url): second}
        job = await producer.submit("x", model="sim")
        await wait_for_tokens(producer, job.id, 1)
        store = await producer.store()
        for worker_id, worker in holder.items():
            if await store.redis.sismember(keys.claims(worker_id), job.id):
                worker.signal(signal.SIGTERM)
        stored = await job.result(PATIENCE_S)
        events = await collect(producer, job.id)
        check_whole(events)
        assert stored.text == LONG == text_of(events)
        assert phases(events) == ["queued", "started", "requeued", "started"]
        assert stored.attempt == 1, "a hand-back costs no attempt"


async def test_a_cancelled_job_ends_at_once_and_its_connection_is_closed(write_config) -> None:
    async with Simulator() as sim:
        sim.plan(text=ENDLESS, rate=20)
        path, settings = write_config(QUICK + simulated(sim))
        async with AsyncProducer(settings) as producer, AsyncExitStack() as stack:
            worker = stack.enter_context(worker_process(path))
            await worker.ready(settings.store_url)
            job = await producer.submit("x", model="sim")
            reading = asyncio.create_task(collect(producer, job.id))
            await wait_for_tokens(producer, job.id, 3)
            assert sim.open_connections > 0
            assert (await job.cancel("enough")).state == "cancelled"
            await wait_until(lambda: sim.requests[0].outcome == "client_disconnected", "the provider sees us leave")
            events = await reading
            check_whole(events)
            assert events[-1].type == "cancelled"
            with pytest.raises(JobCancelled):
                await job.result(PATIENCE_S)
            assert (await job.cancel("again")).state == "cancelled"


async def test_a_queued_job_can_be_cancelled_and_never_runs(write_config) -> None:
    path, settings = write_config(QUICK + MODELS)
    async with AsyncProducer(settings) as producer:
        job = await producer.submit("x", model="fast")
        assert (await job.cancel()).state == "cancelled"
        with worker_process(path) as worker:
            await worker.ready(settings.store_url)
            other = await producer.submit("y", model="fast")
            await other.result(PATIENCE_S)
            assert (await job.get()).attempts == []
            assert (await job.get()).state == "cancelled"


async def test_a_lost_message_is_sent_again(write_config) -> None:
    path, settings = write_config(QUICK + MODELS)
    async with AsyncProducer(settings) as producer:
        job = await producer.submit("lost", model="fast")
        store = await producer.store()
        assert await store.redis.delete("promptmill.api") == 1
        with worker_process(path):
            assert (await job.result(PATIENCE_S)).text == "lost"


async def test_a_doubled_message_runs_the_job_once(write_config) -> None:
    path, settings = write_config(QUICK + MODELS)
    async with AsyncProducer(settings) as producer:
        job = await producer.submit("once", model="slow")
        store = await producer.store()
        message = await store.redis.lindex("promptmill.api", 0)
        await store.redis.lpush("promptmill.api", *[message] * 5)
        with worker_process(path):
            stored = await job.result(PATIENCE_S)
            assert [a.outcome for a in stored.attempts] == ["succeeded"]
            check_whole(await collect(producer, job.id))


async def test_a_job_expires_unstarted_even_without_any_worker(write_config) -> None:
    path, settings = write_config(QUICK + MODELS)
    async with AsyncProducer(settings) as producer:
        job = await producer.submit("x", model="fast", timeouts={"queue_s": 0.2})
        await asyncio.sleep(0.3)  # the deadline is the store's clock's, nothing to wait on
        with worker_process(path), pytest.raises(JobFailed) as caught:
            await job.result(PATIENCE_S)
        assert caught.value.code == "expired"
        assert (await job.get()).state == "expired"


async def test_the_same_idempotency_key_is_the_same_job(producer: AsyncProducer) -> None:
    key = keys.new_token()
    first = await producer.submit("x", model="echo", user="a", idempotency_key=key)
    again = await producer.submit("x", model="echo", user="a", idempotency_key=key)
    other = await producer.submit("x", model="echo", user="b", idempotency_key=key)
    assert first.id == again.id != other.id
    both = await asyncio.gather(*(producer.submit("y", model="echo", idempotency_key=f"{key}2") for _ in range(10)))
    assert len({j.id for j in both}) == 1


async def test_jobs_are_listed_newest_first_by_user_and_page(producer: AsyncProducer) -> None:
    user = keys.new_token()
    jobs = await producer.submit_many([{"prompt": f"{i}", "model": "echo", "user": user} for i in range(7)])
    await jobs[3].cancel()
    seen: list[str] = []
    cursor = None
    while True:
        page = await producer.list(user=user, limit=3, cursor=cursor)
        assert len(page.jobs) <= 3
        seen += [j.id for j in page.jobs]
        cursor = page.next_cursor
        if cursor is None:
            break
    assert seen == [j.id for j in reversed(jobs)]
    cancelled = await producer.list(user=user, state="cancelled")
    assert [j.id for j in cancelled.jobs] == [jobs[3].id]
    assert jobs[0].id in {j.id for j in (await producer.list(limit=50)).jobs}


@pytest.mark.parametrize("how", ["kill", "restart"])
async def test_a_store_that_restarts_under_load_loses_and_doubles_nothing(tmp_path: Path, write_config, how) -> None:
    with running_store(tmp_path) as server:
        path, settings = write_config(QUICK + MODELS, url=server.url)
        async with AsyncProducer(settings) as producer, AsyncExitStack() as stack:
            worker = stack.enter_context(worker_process(path))
            await worker.ready(server.url)
            jobs = await producer.submit_many([{"prompt": LONG, "model": "slow"} for _ in range(10)])
            readings = [asyncio.create_task(collect(producer, j.id)) for j in jobs]
            await wait_for_tokens(producer, jobs[-1].id, 5)
            if how == "kill":
                server.kill()
            else:
                await (await producer.store()).redis.shutdown(nosave=True)
                assert server.process is not None
                await wait_until(lambda: server.process is None or server.process.poll() is not None, "the store ended")
            server.start()
            for events in await asyncio.gather(*readings):
                check_whole(events)
                assert text_of(events) == LONG
                assert not any(isinstance(e, Restart) for e in events), "no job was given up for an outage"
            for job in jobs:
                assert (await job.result(PATIENCE_S)).text == LONG
            assert keys_without_ttl(server.url) == []


async def attempt_is(producer: AsyncProducer, job_id: str, attempt: int) -> bool:
    return (await producer.get(job_id)).attempt == attempt


async def workers_are(producer: AsyncProducer, count: int) -> bool:
    return (await producer.ready()).workers == count


async def test_no_corpse_is_left_by_a_worker_that_ended_well(write_config, store: Store) -> None:
    path, settings = write_config(QUICK + MODELS)
    with worker_process(path) as worker:
        worker_id = await worker.ready(settings.store_url)
    assert not await store.redis.hexists(keys.WORKERS, worker_id)


PERSON = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}


@SHARED
@pytest.mark.parametrize(
    ("answer", "schema", "code", "says"),
    [
        ('{"age": 7}', PERSON, None, ""),
        ('{"age": "seven"}', PERSON, "malformed", "/age"),
        ("Sure! Seven.", PERSON, "malformed", "not JSON"),
        ('{"age": 7}', {"type": "no such type"}, "bad_request", "response_format.json_schema"),
    ],
)
async def test_a_structured_answer_is_checked_before_the_job_counts_as_succeeded(
    running: AsyncProducer, answer, schema, code, says
) -> None:
    wanted = {"type": "json_schema", "json_schema": schema}
    job = await running.submit(answer, model="fast", response_format=wanted)
    if code is None:
        assert (await job.result(PATIENCE_S)).text == answer
        return
    with pytest.raises(JobFailed) as failed:
        await job.result(PATIENCE_S)
    assert failed.value.code == code
    assert says in failed.value.message
