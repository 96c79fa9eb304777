"""A job's life where replies are lost and things arrive late: nothing happens twice, nothing is undone.

First the store's acts, each with a reply that was lost on the network and each repeated after others went on; then
whole workers that freeze, are cut off, or are ended by the kernel; then submits that die half way.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import orjson
import psutil
import pytest

from promptmill import AsyncProducer, keys
from promptmill.contract import Progress, Restart, Timeouts, Token, parse_request
from promptmill.enqueue import Enqueuer
from promptmill.errors import StoreUnavailable
from promptmill.settings import Settings
from promptmill.store import START, Store, Submission
from promptmill.store.scripts import APPEND
from promptmill.usage.verify import verify_usage
from promptmill.watch import MAX_CRASHES, Watcher
from promptmill_workers.process import EXIT_BROKEN
from tests.support.cutting import cutting_proxy
from tests.support.plugin import install_plugin
from tests.support.processes import PATIENCE_S, wait_until
from tests.support.simulator import Simulator
from tests.support.streams import check_whole, collect, phases, text_of, wait_for_tokens
from tests.support.worker import QUICK, worker_process

# -- the store's acts -----------------------------------------------------------------------------------------------

TRY = {"attempt": 1, "claim": "claim-1", "outcome": "succeeded"}
Act = Callable[["Life"], Awaitable[Any]]


@dataclass
class Life:
    """One job and those who act on it, each always with the same token."""

    store: Store
    job_id: str
    queue_s: float = 60
    epochs: dict[int, int] = field(default_factory=dict)

    async def submit(self) -> bool:
        request = parse_request({"prompt": "hi", "user": "u"})
        timeouts = Timeouts(queue_s=self.queue_s, total_s=60)
        job = Submission(self.job_id, request, "promptmill.api", timeouts, 3, timedelta(hours=1))
        return (await self.store.submit([job]))[0]

    async def _claim(self, number: int) -> str:
        got = await self.store.claim(self.job_id, f"claim-{number}", f"w{number}", Progress(phase="started"))
        if isinstance(got, str):
            return got
        self.epochs[number] = got.epoch
        return "claimed"

    async def claim(self) -> str:
        return await self._claim(1)

    async def claim_elsewhere(self) -> str:
        return await self._claim(2)

    async def _append(self, claim: int) -> int:
        events = [Token(text=f"{claim}{n} ").to_json() for n in range(3)]
        epoch = self.epochs.get(claim, 1)
        return await self.store.run(APPEND, self.job_id, f"claim-{claim}", epoch, 2, *events)

    async def append(self) -> int:
        return await self._append(1)

    async def append_elsewhere(self) -> int:
        return await self._append(2)

    async def _finish(self, claim: int) -> bool:
        done = orjson.dumps({"type": "done", "text": "x"})
        tries = [TRY | {"claim": f"claim-{claim}"}]
        return await self.store.finish(self.job_id, f"claim-{claim}", "succeeded", done, {"text": "x"}, tries)

    async def finish(self) -> bool:
        return await self._finish(1)

    async def finish_elsewhere(self) -> bool:
        return await self._finish(2)

    async def cancel(self) -> bool:
        return await self.store.cancel(self.job_id, "enough", "cancel-1")

    async def cancel_elsewhere(self) -> bool:
        return await self.store.cancel(self.job_id, "too much", "cancel-2")

    async def expire(self) -> bool:
        return await self.store.expire(self.job_id, "expire-1")

    async def settle(self) -> str:
        return await self.store.requeue(self.job_id, dead_worker="w1", max_crashes=MAX_CRASHES, token="settle-1")

    async def settle_elsewhere(self) -> str:
        return await self.store.requeue(self.job_id, dead_worker="w2", max_crashes=MAX_CRASHES, token="settle-2")

    async def hand_back(self) -> str:
        return await self.store.requeue(self.job_id, claim="claim-1", max_crashes=MAX_CRASHES, token="back-1")

    async def put_off(self) -> str:
        return await self.store.requeue(
            self.job_id,
            claim="claim-1",
            max_crashes=MAX_CRASHES,
            token="off-1",
            tries=[TRY],
            wait_ms=1,
            phase="waiting",
        )

    async def hand_on(self) -> str:
        return await self.store.requeue(
            self.job_id, claim="claim-1", max_crashes=MAX_CRASHES, token="on-1", queue="promptmill.b", chain=["m"]
        )

    async def snapshot(self) -> dict[str, Any]:
        """All that the store keeps of the job, times to live aside."""
        await self.store.ask([("PING",)])  # behind what was told
        entries, _, _ = await self.store.read_log(self.job_id, START)
        return {"record": await self.store.redis.hgetall(keys.record(self.job_id)), "log": entries}


@pytest.fixture
async def life(store: Store) -> AsyncGenerator[Life]:
    job = Life(store, keys.new_job_id())
    yield job
    await store.redis.delete(keys.record(job.job_id), keys.log(job.job_id))
    await store.redis.zrem(keys.OUTBOX, job.job_id)
    await store.redis.zrem(keys.UNBOOKED, job.job_id)


BEFORE: dict[Act, list[Act]] = {
    Life.submit: [],
    Life.claim: [Life.submit],
    Life.append: [Life.submit, Life.claim],
    Life.finish: [Life.submit, Life.claim, Life.append],
    Life.cancel: [Life.submit, Life.claim, Life.append],
    Life.expire: [Life.submit],
    Life.settle: [Life.submit, Life.claim, Life.append],
    Life.hand_back: [Life.submit, Life.claim, Life.append],
    Life.put_off: [Life.submit, Life.claim, Life.append],
    Life.hand_on: [Life.submit, Life.claim, Life.append],
}
"""What must have happened before each act has its effect."""
ELSEWHERE = [Life.claim_elsewhere, Life.append_elsewhere]
OTHERS: dict[Act, list[list[Act]]] = {
    Life.submit: [[Life.claim], [Life.claim, Life.finish], [Life.claim, Life.settle], [Life.cancel]],
    Life.claim: [
        [Life.append],
        [Life.finish],
        [Life.cancel],
        [Life.settle, *ELSEWHERE],
        [Life.settle, *ELSEWHERE, Life.finish_elsewhere],
        [Life.hand_back, *ELSEWHERE],
        [Life.settle, Life.cancel],
    ],
    Life.append: [
        [Life.finish],
        [Life.cancel],
        [Life.settle],
        [Life.hand_back],
        [Life.settle, *ELSEWHERE],
        [Life.settle, *ELSEWHERE, Life.finish_elsewhere],
    ],
    Life.finish: [[Life.cancel], [Life.settle], [Life.append], [Life.claim_elsewhere]],
    Life.cancel: [[Life.finish], [Life.cancel_elsewhere], [Life.settle], [Life.claim_elsewhere], [Life.append]],
    Life.expire: [[Life.claim_elsewhere], [Life.cancel_elsewhere], [Life.settle]],
    **{
        requeue: [
            [Life.cancel],
            ELSEWHERE,
            [*ELSEWHERE, Life.finish_elsewhere],
            [*ELSEWHERE, Life.settle_elsewhere],
            [*ELSEWHERE, Life.cancel],
            [Life.append],
            [Life.finish],
        ]
        for requeue in (Life.settle, Life.hand_back, Life.put_off, Life.hand_on)
    },
}
"""What others may do after it, before its repetition arrives."""


def named(acts: list[Act]) -> str:
    return "+".join(act.__name__ for act in acts)


LATE = [
    pytest.param(act, others, id=f"{act.__name__}-after-{named(others)}")
    for act, sequences in OTHERS.items()
    for others in sequences
]


async def lead_up_to(life: Life, act: Act) -> None:
    if act is Life.expire:
        life.queue_s = 0.001
    for step in BEFORE[act]:
        await step(life)
    if act is Life.expire:
        await wait_until(lambda: overdue(life), "the job is past its time in the queue")


async def overdue(life: Life) -> bool:
    record = await life.store.find(life.job_id)
    seconds, micros = await life.store.redis.time()
    return record is not None and seconds * 1000 + micros // 1000 > record.st["deadline"]


@pytest.mark.parametrize(("act", "others"), LATE)
async def test_a_late_repetition_changes_nothing_that_others_did_since(life: Life, act: Act, others: list[Act]) -> None:
    await lead_up_to(life, act)
    await act(life)
    for other in others:
        await other(life)
    before = await life.snapshot()
    await act(life)
    assert await life.snapshot() == before


@pytest.mark.parametrize("act", [act for act in BEFORE if act is not Life.submit])
async def test_an_act_that_comes_for_the_first_time_after_the_end_changes_nothing(life: Life, act: Act) -> None:
    for step in (Life.submit, Life.claim_elsewhere, Life.append_elsewhere, Life.finish_elsewhere):
        await step(life)
    before = await life.snapshot()
    assert await act(life) in {False, "not_queued", "not_running", -1}
    assert await life.snapshot() == before


ANSWERS: dict[Act, Any] = {
    Life.submit: True,
    Life.claim: "claimed",
    Life.append: 0,
    Life.finish: True,
    Life.cancel: True,
    Life.expire: True,
    Life.settle: "queued",
    Life.hand_back: "queued",
    Life.put_off: "queued",
    Life.hand_on: "queued",
}


@pytest.mark.parametrize("act", list(BEFORE))
async def test_an_act_whose_reply_was_lost_is_done_once_and_answered_as_if_it_had_come(life: Life, act: Act) -> None:
    await lead_up_to(life, act)
    async with cutting_proxy(f"redis://{life.store.address}/0") as proxy, AsyncExitStack() as stack:
        store = await Store.connect(proxy.url)
        stack.push_async_callback(store.aclose)
        await store.load_scripts()
        await store.wire.connected()
        far = Life(store, life.job_id, life.queue_s, life.epochs)
        proxy.deafen()
        doing = asyncio.create_task(act(far))
        await wait_until(lambda: proxy.dropped_bytes > 0, "the reply is on its way")
        proxy.reset()
        with pytest.raises(StoreUnavailable):
            await doing
        proxy.mend()
        after = await life.snapshot()
        assert after["record"], "it was done all the same"
        again = await act(far)
        assert await life.snapshot() == after
    assert (type(again), again) == (type(ANSWERS[act]), ANSWERS[act])


async def test_a_claim_that_arrives_after_its_worker_was_given_up_is_an_attempt_of_its_own(life: Life) -> None:
    for step in (Life.submit, Life.claim, Life.append, Life.settle):
        await step(life)
    assert await life.claim() == "claimed"
    assert (await life.store.get(life.job_id)).attempt == 2
    texts = [data for _, data in (await life.snapshot())["log"]]
    assert b'"restart"' in texts[-2], "what the first attempt said is void"
    assert await life.finish()
    entries = (await life.snapshot())["log"]
    epochs = [event_id.epoch for event_id, _ in entries]
    assert epochs == sorted(epochs)


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


async def swept(watcher: Watcher, store: Store) -> None:
    """One sweep, whoever swept a moment ago."""
    await store.redis.delete(keys.SWEEP_LOCK)
    await watcher.sweep()


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
import os, resource, signal
from promptmill_workers.backends.base import Finished, TextDelta

class Backend:
    def __init__(self, name, config):
        pass

    async def complete(self, call):
        if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
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
    models = '[models.eater]\ntype = "eater"\n[models.slow]\ntype = "echo"\noptions = { tokens_per_s = 20 }\n'
    path, settings = write_config(QUICK + models)
    async with AsyncProducer(settings) as producer, AsyncExitStack() as stack:
        small = stack.enter_context(worker_process(path, "small", env=env))
        await small.ready(settings.store_url)
        about = psutil.Process(small.pid)
        bound = about.memory_info().vms + (64 << 20)
        about.rlimit(psutil.RLIMIT_AS, (bound, bound))
        beside = await producer.submit("word " * 60, model="slow")
        await wait_for_tokens(producer, beside.id, 3)
        eater = await producer.submit("x", model="eater")
        await wait_until(lambda: small.process.poll() == -signal.SIGKILL, "the kernel ends the worker")
        with worker_process(path, "large", env=env):
            assert (await eater.result(PATIENCE_S)).text == "enough"
            assert (await beside.result(PATIENCE_S)).text == "word " * 60
            for job in (eater, beside):
                check_whole(await collect(producer, job.id))
                assert [a.outcome for a in (await job.get()).attempts] == ["crashed", "succeeded"]
