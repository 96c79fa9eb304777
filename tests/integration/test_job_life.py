"""A job's life where its submit, its message or its worker fails: it runs, ends once, and is paid for as it was used.

Workers freeze, are cut off from the store, or run out of memory; submits die half way. The store's own acts, repeated
late, are in ``tests/conformance/test_late_acts.py``.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import orjson
import psutil
import pytest

from promptmill import AsyncProducer, keys
from promptmill.contract import Restart
from promptmill.enqueue import Enqueuer
from promptmill.settings import Settings
from promptmill.store import START, Store
from promptmill.usage.verify import verify_usage
from promptmill.watch import Watcher
from promptmill_workers.process import EXIT_BROKEN
from tests.support.cutting import cutting_proxy
from tests.support.plugin import install_plugin
from tests.support.processes import PATIENCE_S, wait_until
from tests.support.simulator import Simulator
from tests.support.streams import check_whole, collect, phases, text_of, wait_for_tokens
from tests.support.sweeping import swept
from tests.support.worker import QUICK, worker_process

# -- submits that die half way --------------------------------------------------------------------------------------

DYING = """
import asyncio, os, sys
from promptmill import AsyncProducer
from promptmill.enqueue import Enqueuer

async def die(self, messages):
    print(messages[0][0], flush=True)
    os._exit(9)

Enqueuer.send = die
asyncio.run(AsyncProducer(redis_url=sys.argv[1]).submit("left behind", model="echo"))
"""


async def test_a_submit_that_dies_before_its_message_is_sent_has_made_a_job_that_runs(write_config) -> None:
    path, settings = write_config(QUICK)
    command = [sys.executable, "-c", DYING, settings.store_url]
    died = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
    assert died.returncode == 9, died.stderr
    job_id = died.stdout.strip()
    with worker_process(path):
        async with AsyncProducer(settings) as producer:
            assert (await producer.result(job_id, PATIENCE_S)).text == "left behind"
            check_whole(await collect(producer, job_id))


async def test_a_submit_that_dies_before_its_record_leaves_nothing(store: Store, settings: Settings) -> None:
    job_id = keys.new_job_id()
    await store.redis.zadd(keys.OUTBOX, {job_id: 0})
    enqueuer = Enqueuer(settings.queue_url)
    try:
        watcher = Watcher(store, settings, enqueuer)
        await swept(watcher, store)
        assert await store.redis.zscore(keys.OUTBOX, job_id) > 0, "its record may be on the way"
        await store.redis.zadd(keys.OUTBOX, {job_id: 1})
        await swept(watcher, store)
        assert await store.redis.zscore(keys.OUTBOX, job_id) is None
    finally:
        await enqueuer.aclose()


# -- workers that freeze, are cut off, run out of memory ------------------------------------------------------------


def streaming(url: str) -> str:
    """A model whose answer takes twelve seconds."""
    return (
        f'[models.sim]\ntype = "local_openai"\napi_url = "{url}/v1"\nmodel_name = "sim:tokens=240,rate=20"\n'
        "price = { input = 1, output = 2 }\n"
    )


@pytest.mark.timeout(300)
async def test_what_a_frozen_worker_spent_is_booked_once_and_what_it_says_late_is_heard_by_nobody(
    write_config, store: Store
) -> None:
    user = f"u-{keys.new_job_id()}"
    async with Simulator() as sim, AsyncExitStack() as stack:
        path, settings = write_config(QUICK + streaming(sim.url))
        producer = await stack.enter_async_context(AsyncProducer(settings))
        first = stack.enter_context(worker_process(path, "first"))
        await first.ready(settings.store_url)
        jobs = [await producer.submit("x" * 400, model="sim", user=user) for _ in range(5)]
        for job in jobs:
            await wait_for_tokens(producer, job.id, 3)
        second = stack.enter_context(worker_process(path, "second"))
        first.signal(signal.SIGSTOP)
        await second.ready(settings.store_url)
        for job in jobs:
            await wait_until(lambda job=job: taken_over(producer, job.id), "the job runs elsewhere")
        first.signal(signal.SIGCONT)
        for job in jobs:
            stored = await job.result(PATIENCE_S)
            events = await collect(producer, job.id)
            check_whole(events)
            assert text_of(events) == stored.text
            assert phases(events) == ["queued", "started", "requeued", "started"]
            assert sum(isinstance(e, Restart) for e in events) == 1

        async def booked() -> bool:
            total = (await producer.usage("yesterday", "today", "user", user)).total
            return total.attempts == len(sim.requests) == 2 * len(jobs)

        await wait_until(booked, "each request is an attempt in the ledger")
        assert (await verify_usage(store)).ok


async def taken_over(producer: AsyncProducer, job_id: str) -> bool:
    """It was claimed a second time."""
    job = await producer.get(job_id)
    return job.attempt >= 2


@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", ["cut", "stalled"])
async def test_a_worker_cut_off_from_the_store_loses_its_jobs_and_leaves_its_provider_once_it_knows(
    write_config, how: str
) -> None:
    async with Simulator() as sim, AsyncExitStack() as stack:
        model = streaming(sim.url).replace("tokens=240", "tokens=900")
        path, settings = write_config(QUICK + model)
        producer = await stack.enter_async_context(AsyncProducer(settings))
        proxy = await stack.enter_async_context(cutting_proxy(settings.store_url))
        cut_off = stack.enter_context(worker_process(path, "far", env={"PROMPTMILL_REDIS_URL": proxy.url}))
        await cut_off.ready(settings.store_url)
        jobs = [await producer.submit("x", model="sim") for _ in range(4)]
        for job in jobs:
            await wait_for_tokens(producer, job.id, 3)
        near = stack.enter_context(worker_process(path, "near"))
        await near.ready(settings.store_url)
        (proxy.cut if how == "cut" else proxy.stall)()
        for job in jobs:
            await wait_until(lambda job=job: taken_over(producer, job.id), "the job runs elsewhere")
        before = sim.requests[: len(jobs)]
        assert {r.outcome for r in before} == {"open"}, "cut off, it cannot know, and goes on"
        proxy.mend()
        await wait_until(
            lambda: {r.outcome for r in before} == {"client_disconnected"}, "it leaves the provider", PATIENCE_S
        )
        for job in jobs:
            assert phases_so_far(await log_of(producer, job.id)) == ["queued", "started", "requeued", "started"]
            await job.cancel()
        assert cut_off.process.poll() is None, "it needed no restart"
        last = await producer.submit("x", model="echo")
        assert (await last.result(PATIENCE_S)).text == "x"
        # Not in this loop, where the proxy runs that it needs for a good end.
        assert await asyncio.to_thread(cut_off.stop) == 0


async def log_of(producer: AsyncProducer, job_id: str) -> list[dict[str, Any]]:
    entries, _, _ = await (await producer.store()).read_log(job_id, START)
    return [orjson.loads(data) for _, data in entries]


def phases_so_far(log: list[dict[str, Any]]) -> list[str]:
    return [event["phase"] for event in log if event["type"] == "progress"]


EATER = """
import asyncio, os, resource, signal
from promptmill_workers.backends.base import Finished, TextDelta

class Backend:
    def __init__(self, name, config):
        self.eats = config.options["eats"]

    async def complete(self, call):
        small = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
        if small and not self.eats:
            yield TextDelta("not ")
            await asyncio.sleep(3600)  # it runs when the worker ends, however late that is
        if small:
            eaten = []
            try:
                while True:
                    eaten.append(bytearray(16 << 20))
            except MemoryError:
                os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does
        yield TextDelta("enough")
        yield Finished("stop")

    async def aclose(self):
        pass
"""


@pytest.mark.timeout(300)
async def test_a_worker_without_memory_for_another_thread_ends_and_its_jobs_run_elsewhere(write_config) -> None:
    models = '[models.slow]\ntype = "echo"\noptions = { tokens_per_s = 20 }\n'
    path, settings = write_config(QUICK + "drain_s = 1\n" + models)
    async with AsyncProducer(settings) as producer, AsyncExitStack() as stack:
        small = stack.enter_context(worker_process(path, "small"))
        await small.ready(settings.store_url)
        about = psutil.Process(small.pid)
        bound = about.memory_info().vms + (24 << 20)
        about.rlimit(psutil.RLIMIT_AS, (bound, bound))
        jobs = await producer.submit_many([{"prompt": "word " * 100, "model": "slow"} for _ in range(20)])
        await wait_until(lambda: small.process.poll() is not None, "the worker ends")
        assert small.process.returncode == EXIT_BROKEN, small.log.read_text()
        with worker_process(path, "large"):
            for job in jobs:
                assert (await job.result(PATIENCE_S)).text == "word " * 100
                check_whole(await collect(producer, job.id))


async def test_the_jobs_of_a_worker_that_the_kernel_ends_for_its_memory_run_elsewhere(
    write_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = install_plugin(tmp_path / "site", "eater", EATER)
    monkeypatch.syspath_prepend(site)
    env = {"PYTHONPATH": os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))}
    models = '[models.eater]\ntype = "eater"\noptions = { eats = true }\n'
    models += '[models.beside]\ntype = "eater"\noptions = { eats = false }\n'
    path, settings = write_config(QUICK + models)
    async with AsyncProducer(settings) as producer, AsyncExitStack() as stack:
        small = stack.enter_context(worker_process(path, "small", env=env))
        await small.ready(settings.store_url)
        about = psutil.Process(small.pid)
        bound = about.memory_info().vms + (64 << 20)
        about.rlimit(psutil.RLIMIT_AS, (bound, bound))
        beside = await producer.submit("x", model="beside")
        await wait_for_tokens(producer, beside.id, 1)
        eater = await producer.submit("x", model="eater")
        await wait_until(lambda: small.process.poll() == -signal.SIGKILL, "the kernel ends the worker")
        with worker_process(path, "large", env=env):
            for job in (eater, beside):
                assert (await job.result(PATIENCE_S)).text == "enough"
                check_whole(await collect(producer, job.id))
                assert [a.outcome for a in (await job.get()).attempts] == ["crashed", "succeeded"]
