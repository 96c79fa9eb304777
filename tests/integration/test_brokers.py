"""A job's life over each broker: Redis and RabbitMQ, each apart from the store, so that it can die alone."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from kombu.connection import Connection

from promptmill import AsyncProducer, JobCancelled, enqueue, keys
from promptmill.client.aio import AsyncJob
from promptmill.contract import Restart
from promptmill.doctor.stores import check_broker
from promptmill.enqueue import Enqueuer
from promptmill.queues import API_FAMILY, queues_of
from promptmill.settings import Settings
from promptmill.up.embedded import free_port
from promptmill_workers.process import EXIT_BROKEN
from tests.support.brokers import Broker
from tests.support.metrics import scrape
from tests.support.processes import PATIENCE_S, wait_until
from tests.support.rabbit import running_rabbit
from tests.support.store import keys_without_ttl, redis_program, running_store
from tests.support.streams import check_whole, collect, phases, text_of, wait_for_tokens
from tests.support.worker import worker_process

INTERACTIVE, BATCH = queues_of(API_FAMILY)
FAMILIES = (API_FAMILY, "apart")
LONG = "word " * 40
CONFIG = """
heartbeat_s = 0.5
dead_after_s = 4.0
[models.fast]
type = "echo"
[models.slow]
type = "echo"
options = { tokens_per_s = 20 }
[models.apart]
type = "echo"
family = "apart"
"""
STALLING = CONFIG.replace("tokens_per_s = 20", 'tokens_per_s = 20, fault = "stall", fault_after = 5')
"""For a worker that is to end with jobs in its hands, however late that is: none of ``slow`` ends by itself there."""

ENDLESS = """
[models.endless]
type = "echo"
options = { tokens_per_s = 5, repeat = 1000 }
"""
ENDLESS_BATCH_JOB = {"prompt": "word ", "model": "endless", "priority": "batch"}

Configure = Callable[..., tuple[Path, Settings]]


REDIS = pytest.param("redis", marks=pytest.mark.xdist_group("broker-redis"))
AMQP = pytest.param("amqp", marks=pytest.mark.xdist_group("broker-amqp"))


@pytest.fixture(scope="module", params=[REDIS, AMQP])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generator[Broker]:
    """One broker for all tests here: RabbitMQ takes seconds to start."""
    directory = tmp_path_factory.mktemp("broker")
    with ExitStack() as stack:
        running = running_store(directory) if request.param == "redis" else running_rabbit(directory)
        yield Broker(stack.enter_context(running))


@pytest.fixture
def broker(server: Broker) -> Generator[Broker]:
    """The broker, with empty queues before; after the test nothing may be left in them."""
    queues = [queue for family in FAMILIES for queue in queues_of(family)]
    for queue in queues:
        server.purge(queue)
    yield server
    assert {queue: server.waiting(queue) for queue in queues} == dict.fromkeys(queues, 0)


@pytest.fixture
def configure(broker: Broker, write_config: Configure) -> Configure:
    """As ``write_config``, with the broker."""

    def write(
        text: str = "", more: str = "", *, config: str = CONFIG, name: str = "promptmill.toml"
    ) -> tuple[Path, Settings]:
        return write_config(f'broker_url = "{broker.url}"\n{text}{config}{more}', name)

    return write


async def states(producer: AsyncProducer, jobs: Sequence[AsyncJob]) -> list[str]:
    return [(await producer.get(job.id)).state for job in jobs]


async def running_are(producer: AsyncProducer, jobs: Sequence[AsyncJob], count: int) -> bool:
    return (await states(producer, jobs)).count("running") == count


async def nothing_waits(broker: Broker, queue: str) -> None:
    """What waits for a slot on a busy machine may be sent again: the worker finds nothing to do for it."""
    await wait_until(lambda: broker.waiting(queue) == 0, "no message is left")


async def workers_are(producer: AsyncProducer, count: int) -> bool:
    return (await producer.ready()).workers == count


async def test_jobs_run_and_their_tokens_are_their_text(configure: Configure, broker: Broker) -> None:
    path, settings = configure()
    with worker_process(path) as worker:
        async with AsyncProducer(settings) as producer:
            await worker.ready(settings.store_url)
            jobs = await producer.submit_many([{"prompt": f"zwölf 日本語 {i}", "model": "fast"} for i in range(100)])
            for job in jobs:
                events = await collect(producer, job.id)
                check_whole(events)
                assert text_of(events) == (await job.result(5)).text
                assert phases(events) == ["queued", "started"]


async def test_a_killed_workers_job_is_picked_up(configure: Configure) -> None:
    stalling, settings = configure(config=STALLING, name="stalling.toml")
    path, _ = configure()
    async with AsyncProducer(settings) as producer:
        with worker_process(stalling, "first") as first:
            await first.ready(settings.store_url)
            job = await producer.submit(LONG, model="slow")
            reading = asyncio.create_task(collect(producer, job.id))
            await wait_for_tokens(producer, job.id, 1)
            first.signal(signal.SIGKILL)
        with worker_process(path, "second"):
            stored = await job.result(60)
        events = await reading
        check_whole(events)
        assert text_of(events) == stored.text == LONG
        assert [a.outcome for a in stored.attempts] == ["crashed", "succeeded"]


async def test_past_the_drain_limit_a_job_is_handed_back_and_picked_up(configure: Configure) -> None:
    # Neither is to look dead: what a dead worker held costs an attempt.
    steady = CONFIG.replace("dead_after_s = 4.0", "dead_after_s = 60.0")
    stalling = STALLING.replace("dead_after_s = 4.0", "dead_after_s = 60.0")
    leaves, settings = configure("drain_s = 0.2\n", config=stalling, name="stalling.toml")
    path, _ = configure(config=steady)
    async with AsyncProducer(settings) as producer:
        with worker_process(leaves, "first") as first:
            await first.ready(settings.store_url)
            job = await producer.submit(LONG, model="slow")
            await wait_for_tokens(producer, job.id, 1)
            with worker_process(path, "second") as second:
                await second.ready(settings.store_url)
                first.signal(signal.SIGTERM)
                stored = await job.result(60)
                assert stored.text == LONG
                assert stored.attempt == 1, "a hand-back costs no attempt"
                await wait_until(lambda: first.process.poll() == 0, "the worker ended well")


async def test_a_second_signal_hands_jobs_back_and_nothing_is_lost(configure: Configure, broker: Broker) -> None:
    stalling, settings = configure("drain_s = 600\nconcurrency = 3\n", config=STALLING, name="stalling.toml")
    path, _ = configure("concurrency = 3\n")
    async with AsyncProducer(settings) as producer:
        with worker_process(stalling, "first") as first:
            await first.ready(settings.store_url)
            jobs = await producer.submit_many([{"prompt": LONG, "model": "slow"} for _ in range(5)])
            await wait_until(lambda: running_are(producer, jobs, 3), "three of the five run")
            assert broker.waiting(INTERACTIVE) == 2, "what has no slot waits in the broker"
            first.signal(signal.SIGTERM)
            await wait_until(lambda: workers_are(producer, 0), "the worker drains")
            while first.process.poll() is None:  # a second signal counts only after a moment
                first.signal(signal.SIGTERM)
                await asyncio.sleep(0.1)
        assert await states(producer, jobs) == ["queued"] * 5
        assert broker.waiting(INTERACTIVE) == 5
        with worker_process(path, "second"):
            for job in jobs:
                assert (await job.result(60)).text == LONG
            await nothing_waits(broker, INTERACTIVE)


async def test_a_lost_message_is_sent_again(configure: Configure, broker: Broker) -> None:
    path, settings = configure()
    async with AsyncProducer(settings) as producer:
        job = await producer.submit("lost", model="fast")
        assert broker.purge(INTERACTIVE) == 1
        with worker_process(path):
            assert (await job.result(60)).text == "lost"


async def test_a_doubled_message_runs_its_job_once(configure: Configure, broker: Broker) -> None:
    path, settings = configure()
    async with AsyncProducer(settings) as producer:
        job = await producer.submit("once", model="fast")
        await broker.put(*[(job.id, INTERACTIVE)] * 5)
        assert broker.waiting(INTERACTIVE) == 6
        port = free_port()
        with worker_process(path, env={"PROMPTMILL_METRICS_PORT": str(port)}):
            stored = await job.result(60)

            async def looked_at() -> bool:
                return (await scrape(port)).value("claims_total") >= 6

            # Taken off the queue is not enough: what a worker has in hand when it is to end goes back.
            await wait_until(looked_at, "all six messages are done with")
            assert broker.waiting(INTERACTIVE) == 0
            assert [a.outcome for a in stored.attempts] == ["succeeded"]
            check_whole(await collect(producer, job.id))


async def test_a_broker_that_dies_under_load_costs_no_job_and_no_attempt(configure: Configure, broker: Broker) -> None:
    path, settings = configure("concurrency = 4\n")
    with worker_process(path) as worker:
        async with AsyncProducer(settings) as producer:
            await worker.ready(settings.store_url)
            jobs = await producer.submit_many([{"prompt": LONG, "model": "slow"} for _ in range(10)])
            await wait_until(lambda: running_are(producer, jobs, 4), "four of the ten run")
            broker.kill()
            late = await producer.submit_many([{"prompt": "late", "model": "fast"} for _ in range(3)])
            broker.start()
            for job in jobs:
                events = await collect(producer, job.id)
                check_whole(events)
                assert text_of(events) == LONG
                assert not any(isinstance(event, Restart) for event in events)
            for job in late:
                assert (await job.result(60)).text == "late"
            assert worker.process.poll() is None, "the worker lived on"
            for job in [*jobs, *late]:
                assert [a.outcome for a in (await job.get()).attempts] == ["succeeded"]
            await nothing_waits(broker, INTERACTIVE)


async def test_jobs_submitted_without_a_broker_run_once_it_is_back(configure: Configure, broker: Broker) -> None:
    path, settings = configure()
    async with AsyncProducer(settings) as producer:
        broker.kill()
        jobs = [await producer.submit(f"{i}", model="fast") for i in range(3)]
        with worker_process(path) as worker:
            broker.start()
            await worker.ready(settings.store_url)
            for i, job in enumerate(jobs):
                assert (await job.result(60)).text == f"{i}"


async def test_an_interactive_job_goes_before_the_batch_that_waited_first(configure: Configure) -> None:
    path, settings = configure("concurrency = 1\n")
    async with AsyncProducer(settings) as producer:
        batch = await producer.submit_many(
            [{"prompt": "word " * 10, "model": "slow", "priority": "batch"} for _ in range(3)]
        )
        asked = await producer.submit_many([{"prompt": "word " * 10, "model": "slow"} for _ in range(3)])
        with worker_process(path):
            ended = [await job.result(60) for job in [*batch, *asked]]
        begun = [job.started_at.timestamp() for job in ended if job.started_at]
        assert max(begun[3:]) < min(begun[:3])


async def test_a_job_is_handed_on_to_the_family_that_its_producer_did_not_know(configure: Configure) -> None:
    # Neither worker is to look dead: its job would be put back once more.
    path, settings = configure(config=CONFIG.replace("dead_after_s = 4.0", "dead_after_s = 60.0"))
    with worker_process(path) as worker, worker_process(path, "own", "apart") as own:
        await worker.ready(settings.store_url)
        await own.ready(settings.store_url)
        # No models: all that this producer knows is a name.
        async with AsyncProducer(settings.model_copy(update={"models": {}})) as producer:
            job = await producer.submit("hello", model="apart")
            events = await collect(producer, job.id)
            check_whole(events)
            assert phases(events) == ["queued", "started", "requeued", "started"]
            assert (await job.result(5)).text == "hello"


async def test_queued_and_running_jobs_are_cancelled(configure: Configure, broker: Broker) -> None:
    path, settings = configure("concurrency = 1\n", ENDLESS)
    with worker_process(path) as worker:
        async with AsyncProducer(settings) as producer:
            await worker.ready(settings.store_url)
            running = await producer.submit("word ", model="endless")
            await wait_for_tokens(producer, running.id, 1)
            queued = await producer.submit("never", model="fast")
            for job in (queued, running):
                assert (await job.cancel()).state == "cancelled"
            assert (await (await producer.submit("next", model="fast")).result(60)).text == "next"
            for job in (queued, running):
                with pytest.raises(JobCancelled):
                    await job.result(5)
            assert (await queued.get()).attempts == []
            await nothing_waits(broker, INTERACTIVE)


async def test_no_message_is_held_unacknowledged_for_as_long_as_jobs_run(configure: Configure) -> None:
    """The RabbitMQ of the tests closes a channel after some 5 seconds of that."""
    path, settings = configure("concurrency = 1\n")
    with worker_process(path) as worker:
        async with AsyncProducer(settings) as producer:
            await worker.ready(settings.store_url)
            jobs = await producer.submit_many([{"prompt": "word " * 160, "model": "slow"} for _ in range(2)])
            for job in jobs:
                await job.result(60)
    assert "onnection to broker lost" not in worker.log.read_text()


async def test_batch_jobs_leave_slots_to_interactive_ones(configure: Configure, broker: Broker) -> None:
    path, settings = configure("concurrency = 5\n", ENDLESS)
    with worker_process(path) as worker:
        async with AsyncProducer(settings) as producer:
            await worker.ready(settings.store_url)
            batch = await producer.submit_many([ENDLESS_BATCH_JOB] * 8)
            await wait_until(lambda: running_are(producer, batch, 4), "four of the eight run")
            for _ in range(3):
                assert (await (await producer.submit("now", model="fast")).result(60)).text == "now"
            assert sorted(await states(producer, batch)) == ["queued"] * 4 + ["running"] * 4
            assert broker.waiting(BATCH) == 4
            # Chosen before the first slot is free: a job that waits may take it while the next one is cancelled.
            before = dict(zip(batch, await states(producer, batch), strict=True))
            rest = [job for job, state in before.items() if state == "queued"]
            for job, state in before.items():
                if state == "running":
                    await job.cancel()
            await wait_until(lambda: running_are(producer, rest, 4), "the other four run")
            for job in rest:
                assert (await job.cancel()).attempt == 1


async def test_short_batch_jobs_never_hold_more_than_their_share(configure: Configure, broker: Broker) -> None:
    path, settings = configure("concurrency = 5\n")
    with worker_process(path) as worker:
        async with AsyncProducer(settings) as producer:
            await worker.ready(settings.store_url)
            submitted = await producer.submit_many(
                [{"prompt": "word " * 4, "model": "slow", "priority": "batch"} for _ in range(40)]
            )
            ended = [await job.result(60) for job in submitted]
            await nothing_waits(broker, BATCH)
    # At one moment a job that begins comes after one that ends: the times are whole milliseconds.
    changes = sorted([(job.started_at, 1) for job in ended] + [(job.finished_at, -1) for job in ended])
    running = peak = 0
    for _, change in changes:
        running += change
        peak = max(peak, running)
    assert peak == 4


async def test_jobs_of_both_kinds_compete_for_the_last_slots_and_each_runs_once(
    configure: Configure, broker: Broker
) -> None:
    """Slots open and close all the time, and RabbitMQ sends messages for which there is none any more."""
    path, settings = configure("concurrency = 2\n")
    with worker_process(path) as worker:
        async with AsyncProducer(settings) as producer:
            await worker.ready(settings.store_url)
            kinds = ["interactive", "batch", "batch", "interactive", "interactive"]
            jobs = await producer.submit_many([{"prompt": "a b", "model": "fast", "priority": k} for k in kinds * 30])
            for job in jobs:
                stored = await job.result(90)
                assert [a.outcome for a in stored.attempts] == ["succeeded"]
            for queue in (INTERACTIVE, BATCH):
                await nothing_waits(broker, queue)


async def test_a_worker_stops_well_while_its_batch_jobs_wait(configure: Configure, broker: Broker) -> None:
    stalling, settings = configure("concurrency = 5\ndrain_s = 0.2\n", config=STALLING, name="stalling.toml")
    path, _ = configure("concurrency = 5\n")
    async with AsyncProducer(settings) as producer:
        with worker_process(stalling) as worker:
            await worker.ready(settings.store_url)
            jobs = await producer.submit_many([{"prompt": LONG, "model": "slow", "priority": "batch"}] * 8)
            await wait_until(lambda: running_are(producer, jobs, 4), "four of the eight run")
            worker.signal(signal.SIGTERM)
            await wait_until(lambda: worker.process.poll() == 0, "the worker ended well")
        assert await states(producer, jobs) == ["queued"] * 8
        assert broker.waiting(BATCH) == 8
        with worker_process(path, "next"):
            for job in jobs:
                stored = await job.result(90)
                assert (stored.text, stored.attempt) == (LONG, 1)
            await nothing_waits(broker, BATCH)


async def test_a_redis_is_store_and_broker_at_once(tmp_path: Path, write_config: Configure) -> None:
    """The run's own store is a Valkey."""
    with running_store(tmp_path, program=redis_program()) as redis:
        path, settings = write_config(CONFIG, url=redis.url)
        with worker_process(path) as worker:
            async with AsyncProducer(settings) as producer:
                await worker.ready(redis.url)
                job = await producer.submit(LONG, model="slow")
                events = await collect(producer, job.id)
                check_whole(events)
                assert text_of(events) == (await job.result(5)).text == LONG
        assert keys_without_ttl(redis.url) == []


# -- the broker itself ----------------------------------------------------------------------------------------------


async def test_messages_survive_a_broker_that_is_killed(broker: Broker) -> None:
    await broker.put(*((keys.new_job_id(), INTERACTIVE) for _ in range(600)))
    broker.kill()
    broker.start()
    await wait_until(lambda: broker.waiting(INTERACTIVE) == 600, "the queue has all its messages again")
    assert broker.purge(INTERACTIVE) == 600


async def test_while_a_broker_hangs_the_event_loop_goes_on(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    sender = Enqueuer(broker.url)
    with monkeypatch.context() as patch:
        patch.setattr(enqueue, "ANSWER_S", PATIENCE_S)
        patient = Enqueuer(broker.url)
    try:
        for one in (sender, patient):
            assert await one.send([(keys.new_job_id(), INTERACTIVE)]) == 1
        os.kill(broker.pid, signal.SIGSTOP)
        try:
            messages = [(keys.new_job_id(), INTERACTIVE)] * 3
            assert await sender.send(messages) == 0, "what the broker did not confirm is not sent"
            assert await sender.depth(INTERACTIVE) is None
            # From here on for as long as it takes: who is stopped himself must not find it given up.
            monkeypatch.setattr(enqueue, "ANSWER_S", PATIENCE_S)
            sending = asyncio.create_task(patient.send(messages))
            for _ in range(10):
                await asyncio.sleep(0.01)
            assert not sending.done(), "the event loop stood still until the broker was given up"
        finally:
            os.kill(broker.pid, signal.SIGCONT)
        assert await sending == 3

        async def sent() -> bool:
            return await sender.send([(keys.new_job_id(), INTERACTIVE)]) == 1

        await wait_until(sent, "the broker takes messages again")
        assert (await sender.depth(INTERACTIVE) or 0) >= 6
    finally:
        await sender.aclose()
        await patient.aclose()
    broker.purge(INTERACTIVE)


async def test_who_closes_an_enqueuer_closes_no_other_one(broker: Broker) -> None:
    first, second = Enqueuer(broker.url), Enqueuer(broker.url)
    for sender in (first, second):
        assert await sender.send([(keys.new_job_id(), INTERACTIVE)]) == 1
    await first.aclose()
    assert await second.send([(keys.new_job_id(), INTERACTIVE)] * 2) == 2
    await second.aclose()
    assert broker.purge(INTERACTIVE) == 4


async def test_doctor_finds_the_broker(configure: Configure, broker: Broker) -> None:
    _, settings = configure()
    await broker.put((keys.new_job_id(), INTERACTIVE))
    (check,) = await check_broker(settings)
    assert check.status == "ok", check
    assert broker.url.split("@")[-1].rstrip("/").removeprefix("redis://").split("/")[0] in check.found
    broker.purge(INTERACTIVE)


@pytest.mark.parametrize("server", [AMQP], indirect=True)
async def test_a_queue_of_another_kind_is_told_and_what_to_do_about_it(
    configure: Configure, broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    path, settings = configure()
    with Connection(broker.url) as connection:
        channel: Any = connection.default_channel
        channel.queue_delete(INTERACTIVE)
        channel.queue_declare(INTERACTIVE, durable=True, auto_delete=False)
    advice = f"rabbitmqctl delete_queue {INTERACTIVE}"
    (check,) = await check_broker(settings)
    assert check.status == "fail"
    assert check.advice is not None
    assert advice in check.advice
    async with AsyncProducer(settings) as producer:
        job = await producer.submit("it waits", model="fast")
        assert advice in caplog.text
        with worker_process(path, "refused") as refused:
            await wait_until(lambda: refused.process.poll() is not None, "the worker ends")
            assert refused.process.returncode == EXIT_BROKEN
            assert advice in refused.log.read_text()
        with Connection(broker.url) as connection:
            channel = connection.default_channel
            channel.queue_delete(INTERACTIVE)
        with worker_process(path):
            assert (await job.result(60)).text == "it waits"
