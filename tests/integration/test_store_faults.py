"""A store that fails in every way that stores do: nothing is lost or doubled, nobody is given up, all reconnect.

Each fault meets running jobs, readers through the library and through the gateway, and a producer that goes on
submitting. Real parts: Valkey, a worker, a gateway.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import redis.asyncio
from redis.exceptions import BusyLoadingError

from promptmill import AsyncProducer, keys
from promptmill.contract import Restart
from promptmill.enqueue import Enqueuer
from promptmill.errors import StoreUnavailable
from promptmill.heartbeat import beat, leave
from promptmill.settings import Settings
from promptmill.store import Store
from promptmill.watch import Watcher
from tests.support.processes import wait_until
from tests.support.server import ServerProcess, server_process
from tests.support.store import StoreServer, keys_without_ttl, running_store
from tests.support.streams import check_whole, collect, follow_sse, phases, text_of, wait_for_tokens
from tests.support.worker import WorkerProcess, worker_process

QUICK = "heartbeat_s = 0.5\ndead_after_s = 4.0\nkeepalive_s = 1\n"
MODELS = '[models.slow]\ntype = "echo"\noptions = { tokens_per_s = 20 }\n[models.fast]\ntype = "echo"\n'
JOBS = 8


def prompt(number: int) -> str:
    """Streams for 3 to 7 seconds: some end in a fault, some behind it."""
    return f"{number} " + "word " * (60 + 10 * number)


@dataclass
class Submitting:
    """A producer that goes on submitting, each job with a key of its own; one that is refused is repeated."""

    producer: AsyncProducer
    refused: int = 0
    ids: dict[str, str] = field(default_factory=dict)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        number = 0
        while not self.over.is_set():
            number += 1
            key = f"key-{number}"
            await wait_until(partial(self._submitted, key), "the store takes it")
            await asyncio.sleep(0.1)

    async def _submitted(self, key: str) -> bool:
        try:
            job = await self.producer.submit(f"say {key}", model="fast", idempotency_key=key)
        except StoreUnavailable:
            self.refused += 1
            return False
        self.ids[key] = job.id
        return True


@dataclass
class Mill:
    """What runs while a fault comes and goes."""

    store: StoreServer
    settings: Settings
    producer: AsyncProducer
    worker: WorkerProcess
    gateway: ServerProcess
    submitting: Submitting

    async def refuses(self) -> None:
        """Until a submission was refused."""
        before = self.submitting.refused
        await wait_until(lambda: self.submitting.refused > before, "a submission is refused")

    @asynccontextmanager
    async def client(self) -> AsyncGenerator[redis.asyncio.Redis]:
        async with redis.asyncio.Redis(port=self.store.port) as client:
            yield client


Fault = Callable[[Mill], AbstractAsyncContextManager[None]]


@asynccontextmanager
async def restart(mill: Mill) -> AsyncGenerator[None]:
    async with mill.client() as client:
        await client.shutdown(nosave=True)
    process = mill.store.process
    assert process is not None
    await wait_until(lambda: process.poll() is not None, "the store ended")
    yield
    await asyncio.to_thread(mill.store.start)


@asynccontextmanager
async def kill(mill: Mill) -> AsyncGenerator[None]:
    mill.store.kill()
    yield
    await asyncio.to_thread(mill.store.start)


@asynccontextmanager
async def loading(mill: Mill) -> AsyncGenerator[None]:
    """Killed, and back with so much to read that it answers LOADING for seconds."""
    async with mill.client() as client:
        for start in range(0, 20_000, 1000):
            pipe = client.pipeline(transaction=False)
            for number in range(start, start + 1000):
                pipe.set(f"filler:{number}", "x", ex=3600)
            await pipe.execute()
    mill.store.kill()
    slowly = asyncio.create_task(asyncio.to_thread(mill.store.start, "--key-load-delay", "100"))
    yield
    await slowly


@asynccontextmanager
async def frozen(mill: Mill) -> AsyncGenerator[None]:
    process = mill.store.process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    try:
        yield
        await asyncio.sleep(9)  # how long it lasts is what is tested: over twice dead_after_s
    finally:
        process.send_signal(signal.SIGCONT)


@asynccontextmanager
async def full(mill: Mill) -> AsyncGenerator[None]:
    async with mill.client() as client:
        await client.config_set("maxmemory-policy", "noeviction")
        await client.config_set("maxmemory", 1)
        yield
        await client.config_set("maxmemory", 0)


@asynccontextmanager
async def read_only(mill: Mill) -> AsyncGenerator[None]:
    async with mill.client() as client:
        await client.replicaof("127.0.0.1", 1)
        yield
        await client.replicaof("NO", "ONE")


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("fault", "reasons"),
    [
        (restart, ["cannot be reached"]),
        (kill, ["cannot be reached"]),
        (loading, ["loading the dataset"]),
        (frozen, ["does not answer"]),
        (full, ["takes no writes"]),
        (read_only, ["read-only"]),
    ],
)
async def test_a_store_that_is_away_costs_time_and_nothing_else(
    tmp_path: Path, write_config, fault: Fault, reasons: list[str]
) -> None:
    async with running_mill(tmp_path, write_config) as mill:

        async def away() -> None:
            async with fault(mill):
                await mill.gateway.until_ready(503, *reasons)
                await mill.refuses()

        await stands(mill, away)
        assert mill.submitting.refused


async def test_an_outage_of_any_length_that_all_see_kills_nobody(store: Store, settings: Settings) -> None:
    quick = settings.model_copy(update={"heartbeat_s": 0.05, "dead_after_s": 0.4})
    enqueuer = Enqueuer(settings.queue_url)
    try:
        watcher, worker = Watcher(store, quick, enqueuer), keys.new_token()
        await beat(store, worker, 1, "ready", 0.05)
        for length in (0.41, 0.6, 0.9, 1.5):
            await watcher.look()
            await asyncio.sleep(length)  # nobody beats and nobody looks: what is tested
            assert worker not in await watcher.look()
            await beat(store, worker, int(length * 100), "ready", 0.05)
        await leave(store, worker)
    finally:
        await enqueuer.aclose()


async def test_what_a_server_says_of_itself_is_never_taken_for_a_reply(store: Store) -> None:
    await store.wire.connected()
    call = asyncio.create_task(store.wire.many([("PING",), ("PING",)]))
    await asyncio.sleep(0)
    queue = store.wire._queue
    assert queue is not None
    queue._replied(BusyLoadingError("Redis is loading the dataset in memory"))
    with pytest.raises(BusyLoadingError):
        await call
    assert store.wire.serial == 0
    assert await store.wire.call("PING") == b"PONG"


async def flushed(mill: Mill) -> None:
    """The server forgets all scripts, again and again."""
    async with mill.client() as client:
        for _ in range(40):
            await client.script_flush()
            await asyncio.sleep(0.05)


async def slow(mill: Mill) -> None:
    """The server pauses for half a second, again and again."""
    async with mill.client() as client:
        for _ in range(8):
            await client.client_pause(500, all=True)
            await asyncio.sleep(0.55)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("trouble", [flushed, slow])
async def test_a_store_in_trouble_refuses_nothing(tmp_path: Path, write_config, trouble) -> None:
    async with running_mill(tmp_path, write_config) as mill:
        await stands(mill, lambda: trouble(mill))
        assert not mill.submitting.refused


@asynccontextmanager
async def running_mill(tmp_path: Path, write_config) -> AsyncGenerator[Mill]:
    async with AsyncExitStack() as stack:
        store = stack.enter_context(running_store(tmp_path))
        path, settings = write_config(QUICK + MODELS, url=store.url)
        worker = stack.enter_context(worker_process(path))
        gateway = stack.enter_context(server_process("promptmill_gateway", path))
        producer = await stack.enter_async_context(AsyncProducer(settings))
        await worker.ready(store.url)
        await gateway.until_ready(200)
        yield Mill(store, settings, producer, worker, gateway, Submitting(producer))


async def stands(mill: Mill, trouble) -> None:
    """Let jobs run and readers read while ``trouble()`` comes and goes; then all must be as if it had not been."""
    producer = mill.producer
    jobs = await producer.submit_many([{"prompt": prompt(n), "model": "slow"} for n in range(JOBS)])
    async with asyncio.TaskGroup() as group:
        library = [group.create_task(collect(producer, j.id)) for j in jobs]
        pages = [group.create_task(follow_sse(mill.gateway.port, j.id)) for j in jobs]
        group.create_task(mill.submitting.run())
        await wait_for_tokens(producer, jobs[-1].id, 5)
        await trouble()
        await mill.gateway.until_ready(200)
        mill.submitting.over.set()
    for number, job in enumerate(jobs):
        events, shown = library[number].result(), pages[number].result()
        check_whole(events)
        assert [(e.id, e.type) for e in shown] == [(e.id, e.type) for e in events]
        assert text_of(shown) == text_of(events) == prompt(number)
        assert not any(isinstance(e, Restart) for e in events), "no answer began anew for an outage"
        assert phases(events) == ["queued", "started"]
        stored = await job.result(10)
        assert stored.text == prompt(number)
        assert [a.outcome for a in stored.attempts] == ["succeeded"]
    assert mill.submitting.ids
    page = await producer.list(limit=10_000)
    assert {j.id for j in page.jobs} == {*mill.submitting.ids.values(), *(j.id for j in jobs)}, "none is there twice"
    for key, job_id in mill.submitting.ids.items():
        events = await collect(producer, job_id)
        check_whole(events)
        assert text_of(events) == f"say {key}"
        assert phases(events) == ["queued", "started"]
    assert mill.worker.process.poll() is None, "the worker needed no restart"
    assert mill.gateway.process.poll() is None, "nor did the gateway"
    assert keys_without_ttl(mill.store.url) == []
