"""Cancelling: wherever a job is and however it is asked for, it ends once, at once, and nothing of it goes on."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from pathlib import Path

import pytest
from ops.bench.cancels import SLOW_ANSWER, SLOW_SCHEMA, Models, Plan, experiment

from promptmill import AsyncJob, AsyncProducer, Producer, keys
from promptmill.settings import Settings, load_settings
from promptmill.store import Store
from tests.support.cancelling import (
    SOON_S,
    Ground,
    cancelling_ground,
    check_booked,
    check_ended,
    entries,
    so_far,
    submit,
)
from tests.support.presence import MARK
from tests.support.processes import wait_until
from tests.support.server import server_process
from tests.support.streams import collect, phases, wait_for_tokens
from tests.support.up import PROMPTMILL, environment, promptmill
from tests.support.web import request
from tests.support.worker import worker_process

pytestmark = pytest.mark.xdist_group("cancel")

SETTINGS = """
# Claims are compared every fifth heartbeat: a worker that missed the message would go on for longer than SOON_S.
heartbeat_s = 6
dead_after_s = 30
timeouts = { first_token_s = 300, idle_s = 300, total_s = 900 }
"""
ENDLESS = "sim:tokens=100000,rate=20"
MODELS: Models = {
    "openai": {"type": "local_openai", "model_name": ENDLESS},
    "anthropic": {"type": "anthropic_api", "model_name": ENDLESS},
    "gemini": {"type": "gemini_api", "model_name": ENDLESS},
    "silent": {"type": "local_openai", "model_name": "sim:fault=hang"},
    "wordless": {"type": "anthropic_api", "model_name": "sim:fault=hang_headers"},
    "stalled": {"type": "local_openai", "model_name": "sim:tokens=40,rate=200,fault=stall,after=5"},
    "checked": {"type": "local_openai", "model_name": f"sim:text={SLOW_ANSWER}"},
    "retrying": {"type": "local_openai", "model_name": "sim:fault=529"},
    "put_off": {"type": "local_openai", "model_name": "sim:fault=429,retry_after=25"},
    "narrow": {"type": "local_openai", "model_name": ENDLESS, "limits": {"concurrency": 1}},
    "elsewhere": {"type": "echo", "family": "nobody"},
    "alone": {"type": "local_openai", "model_name": ENDLESS, "isolation": "process", "family": "programs"},
}


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Generator[Ground]:
    with cancelling_ground(tmp_path_factory.mktemp("cancel"), MODELS, SETTINGS) as made:
        yield made


@pytest.fixture
async def producer(ground: Ground) -> AsyncGenerator[AsyncProducer]:
    async with AsyncProducer(ground.settings) as made:
        yield made


@pytest.fixture
async def store(ground: Ground) -> AsyncGenerator[Store]:
    connected = await Store.connect(ground.settings.store_url)
    yield connected
    await connected.aclose()


# -- wherever it is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["openai", "anthropic", "gemini", "claude", "gemini_program", "alone"])
async def test_a_job_that_streams_is_cut_and_what_it_used_is_booked_once(
    ground: Ground, producer: AsyncProducer, store: Store, model: str
) -> None:
    job, name = await submit(producer, model)
    reading = asyncio.create_task(collect(producer, job.id))
    await wait_for_tokens(producer, job.id, 3)
    assert any(r.open for r in ground.asked(name)) or ground.presence.here(name)
    assert (await job.cancel("enough")).state == "cancelled"
    await check_ended(ground, producer, job, name, await reading)
    await check_booked(store, job, ["cancelled"])
    (entry,) = await entries(store, job.id)
    assert entry["estimated"]
    assert entry["out"] > 0


@pytest.mark.parametrize("model", ["silent", "wordless"])
async def test_a_job_that_waits_for_its_first_token_is_cut(
    ground: Ground, producer: AsyncProducer, store: Store, model: str
) -> None:
    job, name = await submit(producer, model)
    reading = asyncio.create_task(collect(producer, job.id))
    await wait_until(lambda: any(r.open for r in ground.asked(name)), "the provider is asked", SOON_S)
    await job.cancel()
    await check_ended(ground, producer, job, name, await reading)
    await check_booked(store, job, ["cancelled"])


async def test_a_job_whose_provider_stalls_is_cut(ground: Ground, producer: AsyncProducer, store: Store) -> None:
    job, name = await submit(producer, "stalled")
    reading = asyncio.create_task(collect(producer, job.id))
    await wait_for_tokens(producer, job.id, 1)
    await wait_until(lambda: any(r.tokens_written == 5 for r in ground.asked(name)), "it stalls", SOON_S)
    await job.cancel()
    await check_ended(ground, producer, job, name, await reading)
    await check_booked(store, job, ["cancelled"])


async def test_a_job_whose_answer_is_being_checked_is_cut_and_the_check_is_ended(
    ground: Ground, producer: AsyncProducer, store: Store
) -> None:
    form = {"type": "json_schema", "json_schema": SLOW_SCHEMA}
    job, name = await submit(producer, "checked", response_format=form)
    reading = asyncio.create_task(collect(producer, job.id))
    await wait_until(lambda: any(not r.open for r in ground.asked(name)), "the answer is whole", SOON_S)
    await wait_until(lambda: bool(ground.checks()), "it is checked apart", SOON_S)
    await job.cancel()
    await check_ended(ground, producer, job, name, await reading)
    await check_booked(store, job, ["cancelled"])


async def test_a_job_between_two_attempts_is_cut(ground: Ground, producer: AsyncProducer, store: Store) -> None:
    job, name = await submit(producer, "retrying")
    reading = asyncio.create_task(collect(producer, job.id))

    async def tried_again() -> bool:
        return "retrying" in phases(await so_far(store, job.id))

    await wait_until(tried_again, "an attempt failed", SOON_S)
    await job.cancel()
    await check_ended(ground, producer, job, name, await reading)
    asked = ground.asked(name)
    refused = [r for r in asked if r.status == 529]
    await wait_until(lambda: not any(r.open for r in asked), "nothing is asked any more", SOON_S)

    async def booked() -> bool:
        return len(await entries(store, job.id)) >= len(asked)

    await wait_until(booked, "each attempt is in the ledger", SOON_S)
    outcomes = [e["outcome"] for e in await entries(store, job.id)]
    assert len(refused) - 1 <= outcomes.count("overloaded") <= len(refused), outcomes
    assert len(outcomes) - outcomes.count("overloaded") <= 1, outcomes


@pytest.mark.parametrize("model", ["put_off", "narrow"])
async def test_a_job_that_waits_in_the_queue_for_its_model_is_cut(
    ground: Ground, producer: AsyncProducer, store: Store, model: str
) -> None:
    holder = await submit(producer, "narrow") if model == "narrow" else None
    if holder is not None:
        await wait_for_tokens(producer, holder[0].id, 1)
    job, name = await submit(producer, model)
    reading = asyncio.create_task(collect(producer, job.id))

    async def waits() -> bool:
        record = await store.find(job.id)
        return record is not None and record.state == "queued" and "not_before" in record.st

    await wait_until(waits, "it is put off", SOON_S)
    await job.cancel()
    await check_ended(ground, producer, job, name, await reading)
    await check_booked(store, job, ["rate_limited"] if model == "put_off" else [])
    if holder is not None:
        assert (await holder[0].get()).state == "running", "who has the place keeps it"
        await holder[0].cancel()


async def test_a_job_that_waits_here_for_its_models_place_is_cut_and_the_place_is_not_lost(
    ground: Ground, producer: AsyncProducer, store: Store
) -> None:
    holder, _ = await submit(producer, "narrow")
    await wait_for_tokens(producer, holder.id, 1)
    job, name = await submit(producer, "narrow")
    reading = asyncio.create_task(collect(producer, job.id))

    async def waits() -> bool:
        return "waiting" in phases(await so_far(store, job.id))

    await wait_until(waits, "it waits", SOON_S)
    await job.cancel()
    await check_ended(ground, producer, job, name, await reading)
    assert ground.asked(name) == []
    await holder.cancel()
    after, _ = await submit(producer, "narrow")
    await wait_for_tokens(producer, after.id, 1)
    await after.cancel()


async def test_a_job_that_was_handed_to_a_family_without_workers_is_cut(
    ground: Ground, producer: AsyncProducer, store: Store
) -> None:
    # No models: it sends the job to the API workers, who hand it on.
    async with AsyncProducer(ground.settings.model_copy(update={"models": {}})) as blind:
        job, name = await submit(blind, "elsewhere")
        reading = asyncio.create_task(collect(producer, job.id))

        async def handed_on() -> bool:
            record = await store.find(job.id)
            return record is not None and record.state == "queued" and record.queue == "promptmill.nobody"

        await wait_until(handed_on, "it waits for the other family", SOON_S)
        await job.cancel()
        seen = await reading
        assert phases(seen) == ["queued", "started", "requeued"]
        await check_ended(ground, producer, job, name, seen)


async def test_a_queued_job_is_cut_and_its_message_finds_nothing(ground: Ground, producer: AsyncProducer) -> None:
    job, name = await submit(producer, "elsewhere")
    assert (await job.cancel()).state == "cancelled"
    with worker_process(ground.config, "late", "nobody") as worker:
        await worker.ready(ground.settings.store_url)
        other, _ = await submit(producer, "elsewhere")
        await other.result(SOON_S)
    seen = await collect(producer, job.id)
    assert phases(seen) == ["queued"]
    await check_ended(ground, producer, job, name, seen)


# -- however it is asked for ----------------------------------------------------------------------------------------


async def by_http(ground: Ground, job_id: str) -> None:
    with server_process("promptmill_gateway", ground.config) as gateway:
        await gateway.until_ready(200)
        path = f"/v1/jobs/{job_id}/cancel"
        async with request(gateway.port, path, method="POST", body=b'{"reason": "over HTTP"}') as answer:
            assert (answer.status, json.loads(await answer.body())["state"]) == (200, "cancelled")


async def by_command(ground: Ground, job_id: str) -> None:
    arguments = ("job", "cancel", job_id, "--reason", "by command", "--json", "--config", str(ground.config))
    done = await asyncio.to_thread(promptmill, *arguments, home=ground.config.parent)
    assert (done.returncode, json.loads(done.stdout)["state"]) == (0, "cancelled"), done.stderr


async def by_library(ground: Ground, job_id: str) -> None:
    def cancel() -> str:
        with Producer(ground.settings) as other:
            return other.cancel(job_id, "from a thread").state

    assert await asyncio.to_thread(cancel) == "cancelled"


@pytest.mark.parametrize("way", [by_http, by_command, by_library])
@pytest.mark.parametrize("model", ["openai", "claude", "elsewhere"])
async def test_every_way_to_cancel_reaches_the_job(
    ground: Ground, producer: AsyncProducer, way: Callable[[Ground, str], Awaitable[None]], model: str
) -> None:
    job, name = await submit(producer, model)
    reading = asyncio.create_task(collect(producer, job.id))
    if model != "elsewhere":
        await wait_for_tokens(producer, job.id, 1)
    await way(ground, job.id)
    await check_ended(ground, producer, job, name, await reading)


@pytest.mark.parametrize("model", ["openai", "claude", "elsewhere"])
async def test_an_interrupt_of_run_reaches_the_job_wherever_it_is(
    ground: Ground, producer: AsyncProducer, model: str
) -> None:
    name = keys.new_token()
    home = ground.config.parent
    command = [*PROMPTMILL, "run", "-m", model, f"{MARK}{name} please", "--json", "--config", str(ground.config)]
    running = await asyncio.create_subprocess_exec(*command, cwd=home, env=environment(home), stdout=-1, stderr=-1)
    try:
        assert running.stdout is not None
        async with asyncio.timeout(60):
            job = AsyncJob(producer, json.loads(await running.stdout.readline())["job_id"])
            if model != "elsewhere":
                await wait_for_tokens(producer, job.id, 1)
            running.send_signal(signal.SIGINT)
            _, said = await running.communicate()
    finally:
        if running.returncode is None:
            running.kill()
            await running.communicate()
    assert running.returncode == 130
    assert f"cancelled job {job.id}" in said.decode()
    await check_ended(ground, producer, job, name, await collect(producer, job.id))


# -- whatever has become of its worker ------------------------------------------------------------------------------

QUICK = "heartbeat_s = 0.5\ndead_after_s = 3\n"


@pytest.fixture
def lonely(ground: Ground, tmp_path: Path) -> tuple[Path, Settings]:
    """A configuration with one model, for workers that this test may harm, and watchers that do not wait long."""
    config = tmp_path / "lonely.toml"
    config.write_text(
        f'redis_url = "{ground.settings.store_url}"\n{QUICK}'
        f'[models.lonely]\ntype = "local_openai"\napi_url = "{ground.simulator.url}/v1"\n'
        f'model_name = "{ENDLESS}"\nfamily = "lonely"\n'
    )
    return config, load_settings(config)


async def test_a_job_whose_worker_is_frozen_ends_at_once_and_its_request_when_the_worker_wakes(
    ground: Ground, store: Store, lonely: tuple[Path, Settings]
) -> None:
    config, settings = lonely
    async with AsyncProducer(settings) as producer:
        with worker_process(config, "frozen", "lonely") as worker:
            await worker.ready(settings.store_url)
            job, name = await submit(producer, "lonely")
            reading = asyncio.create_task(collect(producer, job.id))
            await wait_for_tokens(producer, job.id, 3)
            worker.signal(signal.SIGSTOP)
            assert (await job.cancel()).state == "cancelled"
            seen = await reading
            worker.signal(signal.SIGCONT)
            await check_ended(ground, producer, job, name, seen)
            await check_booked(store, job, ["cancelled"])
            # It serves again.
            after, _ = await submit(producer, "lonely")
            await wait_for_tokens(producer, after.id, 1)
            await after.cancel()


async def test_a_job_whose_worker_is_dead_ends_at_once_and_is_not_run_again(
    ground: Ground, store: Store, lonely: tuple[Path, Settings]
) -> None:
    config, settings = lonely
    async with AsyncProducer(settings) as producer:
        with worker_process(config, "dead", "lonely") as worker:
            worker_id = await worker.ready(settings.store_url)
            job, name = await submit(producer, "lonely")
            reading = asyncio.create_task(collect(producer, job.id))
            await wait_for_tokens(producer, job.id, 3)
            worker.signal(signal.SIGKILL)
            assert (await job.cancel()).state == "cancelled"
            seen = await reading
        with worker_process(config, "next", "lonely") as other:
            await other.ready(settings.store_url)

            async def settled() -> bool:
                return not await store.redis.hexists(keys.WORKERS, worker_id)

            await wait_until(settled, "the dead worker is settled", SOON_S)
            await check_ended(ground, producer, job, name, seen)
            assert len(ground.asked(name)) == 1
            assert not await store.redis.exists(keys.claims(worker_id))


async def test_cancels_at_random_moments_end_every_job_once_and_leave_nothing() -> None:
    out = await experiment(Plan(jobs=60, programs=6, checked=2, at_once=60, within_s=2.0, booked=False))
    assert out.problems == []
    assert out.states["cancelled"] > 20, out.states
    assert sum(out.states.values()) == 60
    assert out.program_ms
    # A bound for any machine; what it is on a quiet one, the benchmark tells.
    assert max(*out.end_ms, *out.provider_ms, *out.program_ms) < 15_000
