"""Stopping a process at an awkward moment: what it held is picked up elsewhere, and it is gone in a bounded time."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from ops.bench.cancels import KEY_ENV, Models, configuration, program_models
from ops.bench.rolling import View, follow_over_http

from promptmill import AsyncJob, AsyncProducer, keys
from promptmill.settings import Settings, load_settings
from promptmill.store import Store
from promptmill_workers.engine import Engine
from tests.support.presence import MARK, presence
from tests.support.processes import tree, wait_gone, wait_until
from tests.support.server import Module, server_process
from tests.support.simulator import Simulator
from tests.support.store import keys_without_ttl, running_store
from tests.support.streams import check_whole, collect, phases, wait_for_tokens
from tests.support.worker import WorkerProcess, worker_process

pytestmark = pytest.mark.xdist_group("shutdown")

EXIT_S = 60.0
"""Long enough for any machine; the tests show that an end is bounded at all, the guide says by how much."""
QUICK = "heartbeat_s = 0.5\ndead_after_s = 4\ndrain_s = {drain_s}\n"
STEADY = QUICK.replace("dead_after_s = 4", "dead_after_s = 60")
"""Where both workers live, and one that a busy machine stops is not to be given up."""
ENDLESS: Models = {"endless": {"type": "echo", "options": {"tokens_per_s": 20, "repeat": 100_000}}}
FIVE = "tok0 tok1 tok2 tok3 tok4 "


async def ended(worker: WorkerProcess) -> int:
    """Its exit code, once it is gone with all that it started."""
    below = tree(worker.pid)
    await wait_until(lambda: worker.process.poll() is not None, f"{worker.name} ended", EXIT_S)
    await asyncio.to_thread(wait_gone, below)
    return worker.process.returncode


async def text_and_outcomes(job: AsyncJob) -> tuple[str, Counter[str]]:
    done = await job.result(60)
    return done.text or "", Counter(attempt.outcome for attempt in done.attempts)


@pytest.mark.parametrize("drain_s", [0, 60])
async def test_jobs_that_wait_are_given_back_with_the_attempts_that_they_made(tmp_path: Path, drain_s: float) -> None:
    """In a backoff, for a place of their model, or put off in the queue: none of it keeps the worker, or is lost."""
    models: Models = {
        "again": {"type": "local_openai", "model_name": "sim:tokens=5,fault=429,retry_after=1,times=2,key=again"},
        "later": {"type": "local_openai", "model_name": "sim:tokens=5,fault=429,retry_after=3,times=1,key=later"},
        "narrow": {"type": "local_openai", "model_name": "sim:tokens=40,rate=20", "limits": {"concurrency": 1}},
    }
    with running_store(tmp_path) as server:
        async with Simulator() as simulator:
            config = tmp_path / "promptmill.toml"
            config.write_text(configuration(server.url, simulator.url, models, QUICK.format(drain_s=drain_s)))
            settings = load_settings(config)
            async with AsyncProducer(settings) as producer:
                with worker_process(config, "first", env=KEY_ENV) as first:
                    await first.ready(server.url)
                    if drain_s == 0:
                        simulator.plan(model="sim:tokens=40,rate=20", tokens=100_000, rate=20)
                    jobs = {model: await producer.submit("please", model=model) for model in models}
                    reading = {model: asyncio.create_task(collect(producer, job.id)) for model, job in jobs.items()}
                    await wait_for_tokens(producer, jobs["narrow"].id, 1)
                    second = await producer.submit("please", model="narrow")
                    waiting = asyncio.create_task(collect(producer, second.id))

                    async def all_wait() -> bool:
                        asked = Counter(r.model or "" for r in simulator.requests)
                        return all(asked[str(model["model_name"])] for model in models.values())

                    await wait_until(all_wait, "each was asked once")
                    first.signal(signal.SIGTERM)
                    assert await ended(first) == 0
                with worker_process(config, "next", env=KEY_ENV):
                    done = {model: await text_and_outcomes(job) for model, job in jobs.items()}
                    assert (await second.result(60)).text == done["narrow"][0]
                for events in await asyncio.gather(*reading.values(), waiting):
                    check_whole(events)
            assert keys_without_ttl(server.url) == []
    assert done["again"] == (FIVE, Counter(rate_limited=2, succeeded=1))
    assert done["later"] == (FIVE, Counter(rate_limited=1, succeeded=1))
    cut = Counter(cancelled=1) if drain_s == 0 else Counter[str]()
    assert done["narrow"] == ("".join(f"tok{n} " for n in range(40)), cut + Counter(succeeded=1))


@pytest.mark.parametrize("how", ["killed", "frozen"])
async def test_a_worker_that_is_stopped_while_the_store_is_away_ends_and_its_jobs_are_found(
    tmp_path: Path, how: str
) -> None:
    models: Models = {"sim": {"type": "local_openai", "model_name": "sim:tokens=5"}}
    async with Simulator() as simulator:
        with running_store(tmp_path) as server, ExitStack() as stack:
            config = tmp_path / "promptmill.toml"
            config.write_text(configuration(server.url, simulator.url, models, QUICK.format(drain_s=0.2)))
            async with AsyncProducer(load_settings(config)) as producer:
                first = stack.enter_context(worker_process(config, "first", env=KEY_ENV))
                await first.ready(server.url)
                for _ in range(5):
                    simulator.plan(tokens=100_000, rate=20)
                jobs = await producer.submit_many([{"prompt": "please", "model": "sim"} for _ in range(5)])
                reading = [asyncio.create_task(collect(producer, job.id)) for job in jobs]
                for job in jobs:
                    await wait_for_tokens(producer, job.id, 2)
                second = stack.enter_context(worker_process(config, "second", env=KEY_ENV))
                await second.ready(server.url)
                assert server.process is not None
                if how == "killed":
                    server.kill()
                else:
                    server.process.send_signal(signal.SIGSTOP)
                first.signal(signal.SIGTERM)
                try:
                    assert await ended(first) == 0
                    assert all(not request.open for request in simulator.requests)
                finally:
                    if how == "frozen":
                        server.process.send_signal(signal.SIGCONT)
                    else:
                        server.start()
                for job, events in zip(jobs, await asyncio.gather(*reading), strict=True):
                    check_whole(events)
                    # Nobody was left who could hand them back: the watchers found them.
                    assert await text_and_outcomes(job) == (FIVE, Counter(crashed=1, succeeded=1))
            assert keys_without_ttl(server.url) == []


@pytest.mark.parametrize(("model", "second_term"), [("claude", False), ("gemini_program", True)])
async def test_programs_are_gone_and_their_jobs_run_elsewhere(tmp_path: Path, model: str, second_term: bool) -> None:
    with running_store(tmp_path) as server, presence() as there, ExitStack() as stack:
        config = tmp_path / "promptmill.toml"
        models = program_models(tmp_path, there, first_tokens=100_000, tokens=5)
        settings = STEADY.format(drain_s=600 if second_term else 0.2)
        config.write_text(configuration(server.url, "http://127.0.0.1:9", models, settings))
        async with AsyncProducer(load_settings(config)) as producer:
            first = stack.enter_context(worker_process(config, "first", "programs", KEY_ENV))
            await first.ready(server.url)
            job = await producer.submit(f"{MARK}one please", model=model)
            reading = asyncio.create_task(collect(producer, job.id))
            await wait_for_tokens(producer, job.id, 3)
            second = stack.enter_context(worker_process(config, "second", "programs", KEY_ENV))
            await second.ready(server.url)
            first.signal(signal.SIGTERM)
            if second_term:
                await wait_until(lambda: "draining: 1 jobs here" in first.log.read_text(), "it drains")
                await asyncio.sleep(0.3)  # a second signal counts only after a moment: supervisors signal twice
                assert there.here("one") == 1
                first.signal(signal.SIGTERM)
            assert await ended(first) == 0
            assert there.visits("one")[0].left_s is not None, "the first worker's program runs on"
            text, outcomes = await text_and_outcomes(job)
            events = await reading
            check_whole(events)
            assert phases(events) == ["queued", "started", "requeued", "started"]
            assert text == FIVE
            assert outcomes == Counter(cancelled=1, succeeded=1)
            assert len(there.visits("one")) == 2
        assert keys_without_ttl(server.url) == []


@pytest.mark.parametrize("modules", [("promptmill_gateway", "promptmill_relay"), ("promptmill_relay",) * 2])
async def test_readers_of_a_server_that_is_stopped_go_on_at_another_and_miss_nothing(
    tmp_path: Path, modules: tuple[Module, Module]
) -> None:
    with running_store(tmp_path) as server, ExitStack() as stack:
        config = tmp_path / "promptmill.toml"
        config.write_text(configuration(server.url, "", ENDLESS, QUICK.format(drain_s=1)))
        worker = stack.enter_context(worker_process(config))
        await worker.ready(server.url)
        first, other = (stack.enter_context(server_process(module, config)) for module in modules)
        for each in (first, other):
            await each.until_ready(200)
        async with AsyncProducer(load_settings(config)) as producer:
            jobs = await producer.submit_many([{"prompt": "word ", "model": "endless"} for _ in range(20)])
            views = [View(job.id, over_http=True) for job in jobs]
            ports = [first.port]
            reading = [asyncio.create_task(follow_over_http(view, lambda: ports)) for view in views]
            await wait_until(lambda: all(len(view.events) > 5 for view in views), "all read", 60)
            ports[:] = [other.port]
            assert await asyncio.to_thread(first.stop) == 0
            seen = [len(view.events) for view in views]
            await wait_until(
                lambda: all(len(view.events) > count + 5 for view, count in zip(views, seen, strict=True)),
                "all go on at the other",
                60,
            )
            for job in jobs:
                await job.cancel()
            async with asyncio.timeout(60):
                await asyncio.gather(*reading)
            for view in views:
                check_whole(view.events)
                assert view.connections == 2


async def test_a_claim_that_is_on_its_way_when_the_worker_stops_is_given_back_at_once(
    write_config: Callable[[str], tuple[Any, Settings]], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, settings = write_config(QUICK.format(drain_s=0) + '[models.fast]\ntype = "echo"\n')
    engine = await Engine.start(settings, "leaving")
    claim = engine.store.claim
    claimed = asyncio.Event()

    async def slow_claim(*given: Any, **options: Any) -> Any:
        answer = await claim(*given, **options)
        claimed.set()
        await asyncio.sleep(3600)  # its reply does not come before the worker stops
        return answer

    monkeypatch.setattr(engine.store, "claim", slow_claim)
    async with AsyncProducer(settings) as producer:
        job = await producer.submit("x", model="fast")
        await store.redis.delete("promptmill.api")  # popped, as far as others know
        serving = asyncio.create_task(asyncio.to_thread(engine.serve, job.id, "promptmill.api"))
        await claimed.wait()
        await engine.drain(0)
        await engine.aclose()
        await serving
        record = await store.find(job.id)
        assert record is not None
        assert (record.state, record.st["attempts"], record.st["crashes"]) == ("queued", 0, 0)
        assert await store.redis.llen("promptmill.api"), "no worker can take it now"
        assert not await store.redis.hexists(keys.WORKERS, engine.worker_id)
        await job.cancel()


async def test_an_answer_that_is_being_stored_when_the_worker_stops_is_not_asked_for_again(
    write_config: Callable[[str], tuple[Any, Settings]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, settings = write_config(QUICK.format(drain_s=0) + '[models.fast]\ntype = "echo"\n')
    engine = await Engine.start(settings, "ending")
    finish = engine.store.finish
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def slow_finish(*given: Any, **options: Any) -> bool:
        reached.set()
        await go_on.wait()
        return await finish(*given, **options)

    monkeypatch.setattr(engine.store, "finish", slow_finish)
    async with AsyncProducer(settings) as producer:
        job = await producer.submit("x", model="fast")
        serving = asyncio.create_task(asyncio.to_thread(engine.serve, job.id, "promptmill.api"))
        await reached.wait()
        ending = asyncio.create_task(engine.drain(0))
        await asyncio.wait({ending}, timeout=0.5)  # time enough for it to be cut off, where that is done
        go_on.set()
        await ending
        await engine.aclose()
        await serving
        assert await text_and_outcomes(job) == ("x", Counter(succeeded=1))
        check_whole(await collect(producer, job.id))
