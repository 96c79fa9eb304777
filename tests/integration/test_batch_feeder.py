"""Batches on real worker processes: they die, drain and lose their store, and every line runs once and has its result.

What ran is counted by a simulated provider, which nobody kills.
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import AsyncExitStack
from pathlib import Path

import orjson
import pytest

from promptmill import AsyncProducer, keys
from promptmill.batch import BatchStatus
from promptmill.batch.feeder import Feeder
from promptmill.errors import StoreUnavailable
from promptmill.settings import Settings, load_settings
from promptmill.store import Store
from tests.support.batch_lines import QUEUE, all_results, feed_once, line, made
from tests.support.processes import block_until, wait_until
from tests.support.simulator import SimulatorHandle, running_simulator
from tests.support.store import StoreServer, keys_without_ttl, running_store
from tests.support.worker import STEADY, WorkerProcess, worker_process


@pytest.fixture(scope="module")
def simulator() -> Generator[SimulatorHandle]:
    with running_simulator() as handle:
        yield handle


@pytest.fixture
def server(tmp_path: Path) -> Generator[StoreServer]:
    """A store of the test's own, which it may kill."""
    (tmp_path / "store").mkdir()
    with running_store(tmp_path / "store") as started:
        yield started
        assert keys_without_ttl(started.url) == []


Configured = Callable[..., Path]

DYING = STEADY.replace("dead_after_s = 60.0", "dead_after_s = 12.0")
"""Where lines are counted that were asked again: only the dead look so, and none that is stopped for seconds."""

LAST = 20
"""How many lines an open batch lacks."""


@pytest.fixture
def config(tmp_path: Path, server: StoreServer, simulator: SimulatorHandle) -> Configured:
    """Writes a configuration whose model ``sim`` answers ``tokens`` words at ``rate`` a second."""

    def write(
        name: str = "batch",
        *,
        tokens: int = 4,
        rate: float = 40,
        more: str = "concurrency = 20\n",
        beats: str = STEADY,
    ) -> Path:
        path = tmp_path / f"{name}.toml"
        path.write_text(
            f'redis_url = "{server.url}"\n{beats}{more}'
            f'[models.sim]\ntype = "local_openai"\napi_url = "{simulator.url}/v1"\n'
            f'model_name = "sim:tokens={tokens},rate={rate},key={tmp_path.name}"\n'
            "[models.fast]\ntype = 'echo'\n"
        )
        return path

    return write


@pytest.fixture
async def stack() -> AsyncGenerator[AsyncExitStack]:
    async with AsyncExitStack() as opened:
        yield opened


async def producer_of(stack: AsyncExitStack, path: Path) -> AsyncProducer:
    return await stack.enter_async_context(AsyncProducer(load_settings(path)))


def asked(simulator: SimulatorHandle, path: Path) -> Counter[str]:
    """How often the provider was asked for each prompt of this test."""
    own = [r for r in simulator.requests if r.model and r.model.endswith(f"key={path.parent.name}")]
    return Counter(r.body["messages"][-1]["content"] for r in own)


async def until_done(producer: AsyncProducer, batch_id: str, lines: int) -> None:
    async def done() -> bool:
        try:
            return (await producer.batches.status(batch_id)).done >= lines
        except StoreUnavailable:
            return False  # it restarts

    await wait_until(done, f"{lines} lines of the batch have ended")


async def ended(producer: AsyncProducer, batch_id: str) -> BatchStatus:
    """The batch, once it has ended; waits while the store is away."""
    found: list[BatchStatus] = []

    async def over() -> bool:
        try:
            found[:] = [await producer.batches.status(batch_id)]
        except StoreUnavailable:
            return False
        return found[0].ended

    await wait_until(over, "the batch has ended", timeout_s=100)
    return found[0]


async def check_all_there(producer: AsyncProducer, batch_id: str, lines: int) -> None:
    """Every line has one result, and it succeeded."""
    results = await all_results(producer.batches, batch_id)
    assert sorted(r.index for r in results) == list(range(lines))
    assert {r.id for r in results} == {f"line-{i}" for i in range(lines)}
    assert {r.job.state if r.job else "gone" for r in results} == {"succeeded"}


async def feeders_worker(store: Store, workers: list[WorkerProcess]) -> WorkerProcess:
    """The worker that holds the lease."""
    found: list[WorkerProcess] = []

    async def somebody() -> bool:
        token: bytes = await store.redis.get(keys.FEEDER) or b""
        found[:] = [w for w in workers if token.decode().startswith(f"{w.name}@") and f"-{w.pid}-" in token.decode()]
        return bool(found)

    await wait_until(somebody, "a worker has the feeder's lease")
    return found[0]


async def test_a_batch_runs_on_a_worker_without_one_message(config, simulator, server, stack) -> None:
    path = config(tokens=2)
    producer = await producer_of(stack, path)
    batch_id = await made(producer.batches, [line(i, model="sim") for i in range(250)])
    with worker_process(path) as worker:
        status = await ended(producer, batch_id)
        assert (status.state, status.succeeded, status.models) == ("completed", 250, {"sim": 250})
        assert status.usage.output_tokens == 500
        await check_all_there(producer, batch_id, 250)
        assert asked(simulator, path) == Counter(f"say {i}" for i in range(250))
        store = await producer.store()
        assert not await store.redis.exists(QUEUE, keys.ready(QUEUE))
        await wait_until(lambda: nothing_left(store), "nothing waits any more")
        assert worker.process.poll() is None
        beyond = await bytes_beyond(store, batch_id, 250)
        assert beyond < 2048, f"{beyond:.0f} bytes a finished line beyond its request and its answer"


async def bytes_beyond(store: Store, batch_id: str, lines: int) -> float:
    """What the store keeps of a finished line beside request and answer: its record, its part of batch and ledger."""
    total = 0
    async for name in store.redis.scan_iter(count=1000):
        if name.endswith(b"}:events"):
            continue  # goes a minute after the end
        if name.endswith(b"}:job"):
            request, end = await store.redis.hmget(name, "request", "end")
            total -= len(request) + len((orjson.loads(end)["text"] or "").encode())
        elif b"{batch:" not in name and b"{ledger:" not in name:
            continue  # grows with no line
        total += await store.redis.memory_usage(name, samples=0)
    assert await store.redis.exists(keys.batch(batch_id))
    return total / lines


async def nothing_left(store: Store) -> bool:
    return not await store.redis.exists(keys.OUTBOX, keys.BATCHES, keys.UNBOOKED)


async def test_a_job_of_a_batch_is_streamed_and_cancelled_like_any_other(config, stack) -> None:
    path = config(tokens=1000, rate=20)
    producer = await producer_of(stack, path)
    batch_id = await made(producer.batches, [line(i, model="sim") for i in range(2)])
    with worker_process(path):
        store = await producer.store()
        ids: list[str] = []

        async def begun() -> bool:
            ids[:] = [raw.decode() for raw in await store.redis.zrange(keys.UNBOOKED, 0, -1)]
            return len(ids) == 2

        await wait_until(begun, "both lines run")
        events = producer.events(ids[0])
        async for event in events:
            if event.type == "token":
                break
        await events.aclose()
        assert (await producer.cancel(ids[0])).state == "cancelled"
        await until_done(producer, batch_id, 1)
        assert (await producer.batches.cancel(batch_id)).state == "cancelling"
        status = await ended(producer, batch_id)
        assert (status.state, status.cancelled) == ("cancelled", 2)


async def test_the_feeders_worker_and_then_the_other_one_are_killed(config, simulator, stack) -> None:
    path = config(tokens=8, rate=20, beats=DYING)
    producer = await producer_of(stack, path)
    store = await producer.store()
    lines = 400
    with worker_process(path, "one") as one, worker_process(path, "two") as two:
        batch_id = await open_batch(producer, lines)
        await until_done(producer, batch_id, 40)
        first = await feeders_worker(store, [one, two])
        first.signal(signal.SIGKILL)
        with worker_process(path, "three") as three:
            await until_done(producer, batch_id, 120)
            second = two if first is one else one
            await feeders_worker(store, [second, three])
            second.signal(signal.SIGKILL)
            await close_batch(producer, batch_id, lines)
            status = await ended(producer, batch_id)
            assert (status.state, status.succeeded) == ("completed", lines)
            await check_all_there(producer, batch_id, lines)
    often = asked(simulator, path)
    assert set(often) == {f"say {i}" for i in range(lines)}
    # Only what ran when its worker was killed was asked again: at most all slots of both.
    assert sum(count - 1 for count in often.values()) <= 2 * 16
    assert max(often.values()) <= 3


async def open_batch(producer: AsyncProducer, lines: int) -> str:
    """A batch that takes some lines more: until it has them somebody feeds it, however soon the others have run."""
    first = [line(i, model="sim") for i in range(lines - LAST)]
    return await made(producer.batches, first, seal=False, chunk_lines=LAST)


async def close_batch(producer: AsyncProducer, batch_id: str, lines: int) -> None:
    """The last lines."""
    last = [line(i, model="sim") for i in range(lines - LAST, lines)]
    await producer.batches.add(batch_id, lines // LAST - 1, last)
    await producer.batches.seal(batch_id, lines)


async def test_a_store_that_is_killed_loses_and_doubles_nothing(config, simulator, server, stack) -> None:
    path = config(tokens=8, rate=20)
    producer = await producer_of(stack, path)
    lines = 300
    with worker_process(path):
        batch_id = await made(producer.batches, [line(i, model="sim") for i in range(lines)])
        for done in (30, 120):
            await until_done(producer, batch_id, done)
            server.kill()
            server.start()
        status = await ended(producer, batch_id)
        assert (status.state, status.succeeded) == ("completed", lines)
        await check_all_there(producer, batch_id, lines)
    assert asked(simulator, path) == Counter(f"say {i}" for i in range(lines))


async def test_a_worker_that_drains_leaves_its_lines_and_the_lease_to_another_one(config, simulator, stack) -> None:
    path = config(tokens=8, rate=20, more="concurrency = 20\ndrain_s = 600\n")
    producer = await producer_of(stack, path)
    store = await producer.store()
    lines = 200
    with worker_process(path, "one") as one, worker_process(path, "two") as two:
        batch_id = await open_batch(producer, lines)
        await until_done(producer, batch_id, 30)
        leaving = await feeders_worker(store, [one, two])
        leaving.signal(signal.SIGTERM)
        staying = two if leaving is one else one
        await feeders_worker(store, [staying])
        await close_batch(producer, batch_id, lines)
        status = await ended(producer, batch_id)
        assert (status.state, status.succeeded) == ("completed", lines)
        block_until(lambda: leaving.process.poll() is not None, "the worker has ended")
        assert leaving.process.returncode == 0
        await check_all_there(producer, batch_id, lines)
    assert asked(simulator, path) == Counter(f"say {i}" for i in range(lines))


async def test_lines_that_a_dead_worker_had_taken_and_not_begun_are_found(config, server, stack) -> None:
    path = config()
    producer = await producer_of(stack, path)
    store = await producer.store()
    batch_id = await made(producer.batches, [line(i, model="fast") for i in range(20)])
    # Fed by somebody, taken by a worker, and then that worker was gone: no claim, no message, no list.
    feeder = Feeder(store, Settings())
    await feed_once(feeder)
    assert await store.redis.lpop(keys.ready(QUEUE), 15)
    await feeder.release()
    with worker_process(path):
        status = await ended(producer, batch_id)
        assert status.succeeded == 20
        await check_all_there(producer, batch_id, 20)


async def test_batch_lines_leave_slots_for_interactive_jobs(config, simulator, stack) -> None:
    path = config(tokens=100_000, rate=20, more="concurrency = 5\n")
    producer = await producer_of(stack, path)
    with worker_process(path) as worker:
        await worker.ready(load_settings(path).store_url)
        batch_id = await made(producer.batches, [line(i, model="sim") for i in range(10)])
        await wait_until(lambda: len(asked(simulator, path)) >= 4, "lines run")
        assert (await (await producer.submit("now", model="fast")).result(60)).text == "now"
        assert len(asked(simulator, path)) == 4, "80 % of five"
        await producer.batches.cancel(batch_id)
        await ended(producer, batch_id)


async def test_a_batch_does_not_keep_other_batch_jobs_from_running(config, simulator, stack) -> None:
    path = config(tokens=8, rate=20, more="concurrency = 5\n")
    producer = await producer_of(stack, path)
    with worker_process(path) as worker:
        await worker.ready(load_settings(path).store_url)
        batch_id = await made(producer.batches, [line(i, model="sim") for i in range(2000)])
        await until_done(producer, batch_id, 8)
        job = await producer.submit("by itself", model="fast", priority="batch")
        assert (await job.result(60)).text == "by itself"
        assert (await producer.batches.status(batch_id)).done < 2000
        await producer.batches.cancel(batch_id)
        await ended(producer, batch_id)


async def test_cancelling_a_batch_closes_the_providers_connections(config, simulator, stack) -> None:
    path = config(tokens=100_000, rate=20)
    producer = await producer_of(stack, path)
    with worker_process(path):
        batch_id = await made(producer.batches, [line(i, model="sim") for i in range(100)])
        await wait_until(lambda: len(asked(simulator, path)) == 16, "lines run")
        await producer.batches.cancel(batch_id)
        status = await ended(producer, batch_id)
        assert (status.state, status.cancelled) == ("cancelled", 100)

        def closed() -> bool:
            own = [r for r in simulator.requests if r.model and r.model.endswith(f"key={path.parent.name}")]
            return not any(r.open for r in own)

        await wait_until(closed, "no connection to the provider is open")


async def test_a_batch_that_costs_more_than_it_may_is_cancelled_with_nobody_watching(config, stack) -> None:
    path = config()
    path.write_text(path.read_text() + "price = { input = 0, output = 1000 }\n")  # 0.001 a token
    producer = await producer_of(stack, path)
    with worker_process(path):
        batch_id = await made(producer.batches, [line(i, model="fast") for i in range(5000)], max_cost_usd=0.05)
        status = await ended(producer, batch_id)
        assert status.state == "cancelled"
        assert status.cost_usd > 0.05
        assert status.succeeded + status.cancelled == 5000
        assert status.succeeded < 5000


async def test_lines_of_a_family_without_workers_hold_up_no_other_batch(config, stack) -> None:
    path = config(more="concurrency = 20\nbatch_window = 10\n")
    path.write_text(path.read_text() + "[models.other]\ntype = 'echo'\nfamily = 'elsewhere'\n")
    producer = await producer_of(stack, path)
    with worker_process(path):
        stuck = await made(producer.batches, [line(i, model="other") for i in range(50)])
        runs = await made(producer.batches, [line(i, model="fast") for i in range(200)])
        assert (await ended(producer, runs)).succeeded == 200
        assert (await producer.batches.status(stuck)).done == 0
        with worker_process(path, "elsewhere", "elsewhere"):
            assert (await ended(producer, stuck)).succeeded == 50


async def test_a_used_up_budget_holds_a_batch_and_fails_no_line(config, stack) -> None:
    path = config(more="concurrency = 20\n[users.poor.budget]\nhard_tokens = 1\n")
    producer = await producer_of(stack, path)
    with worker_process(path):
        await (await producer.submit("spend it", model="fast", user="poor")).result(60)

        async def used_up() -> bool:
            return (await producer.usage(user="poor")).total.tokens > 0

        await wait_until(used_up, "the budget is used up")
        held = await made(producer.batches, [line(i, model="fast") for i in range(5)], user="poor")
        free = await made(producer.batches, [line(i, model="fast") for i in range(5)], user="rich")
        assert (await ended(producer, free)).succeeded == 5
        status = await producer.batches.status(held)
        assert (status.fed, status.done) == (0, 0)
        await producer.batches.cancel(held)
        assert (await ended(producer, held)).cancelled == 5
