"""A look at a deployment finds what is there: queues, workers, servers, batches, usage and troubled models."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from promptmill import AsyncProducer, keys
from promptmill.enqueue import Enqueuer
from promptmill.errors import JobFailed
from promptmill.fleet import Fleet, Lookout, look
from promptmill.settings import Settings
from promptmill.store import Store
from tests.support.batch_lines import client_of, line, made
from tests.support.processes import PATIENCE_S, wait_until
from tests.support.server import server_process
from tests.support.store import running_store
from tests.support.streams import follow_sse, wait_for_tokens
from tests.support.worker import QUICK, worker_process

MODELS = """
[models.slow]
type = "echo"
options = { tokens_per_s = 20 }
[models.broken]
type = "echo"
options = { fault = "refused" }
[models.apart]
type = "echo"
family = "apart"
"""
ENDLESS = "word " * 6000


@asynccontextmanager
async def lookout(settings: Settings) -> AsyncGenerator[Lookout]:
    store = await Store.connect(settings.store_url)
    enqueuer = Enqueuer(settings.queue_url)
    try:
        yield Lookout(store, settings, enqueuer)
    finally:
        await enqueuer.aclose()
        await store.aclose()


async def seen(view: Lookout, what: str, condition: Any) -> Fleet:
    """The first look for which ``condition`` holds."""
    found: list[Fleet] = []

    async def holds() -> bool:
        found[:] = [await view.look()]
        return condition(found[0])

    try:
        await wait_until(holds, what)
    except AssertionError as err:
        raise AssertionError(f"{err}; it was {found[0].to_dict()}") from None
    return found[0]


def queue(fleet: Fleet, name: str) -> Any:
    return next(queue for queue in fleet.queues if queue.name == name)


async def test_what_waits_is_seen_by_queue_and_with_its_age(write_config) -> None:
    _, settings = write_config(QUICK + MODELS)
    async with AsyncProducer(settings) as producer, lookout(settings) as view:
        empty = await view.look()
        assert (empty.waiting, empty.running, empty.readers, empty.workers, empty.servers) == (0, 0, 0, [], [])
        assert [q.name for q in empty.queues] == [
            "promptmill.api",
            "promptmill.api.batch",
            "promptmill.apart",
            "promptmill.apart.batch",
        ]
        assert {(q.messages, q.lines, q.oldest_s, q.workers) for q in empty.queues} == {(0, 0, None, 0)}
        first = await producer.submit("one", model="slow")
        await asyncio.sleep(0.2)
        await producer.submit_many([{"prompt": "two", "model": "slow", "priority": "batch"}] * 70)
        await producer.submit("three", model="apart")
        fleet = await view.look()
        assert fleet.waiting == 72
        assert {q.name: q.messages for q in fleet.queues} == {
            "promptmill.api": 1,
            "promptmill.api.batch": 70,
            "promptmill.apart": 1,
            "promptmill.apart.batch": 0,
        }
        assert queue(fleet, "promptmill.api").oldest_s >= 0.2
        assert queue(fleet, "promptmill.api.batch").oldest_s is not None
        assert queue(fleet, "promptmill.apart.batch").oldest_s is None
        # What no longer waits is not the oldest, though its message is still there.
        await first.cancel()
        fleet = await view.look()
        assert queue(fleet, "promptmill.api").messages == 1
        assert queue(fleet, "promptmill.api").oldest_s is None


async def test_workers_servers_jobs_and_usage_are_seen(write_config) -> None:
    path, settings = write_config(QUICK + MODELS)
    async with AsyncProducer(settings) as producer, lookout(settings) as view:
        with worker_process(path, "seen") as worker, server_process("promptmill_relay", path) as relay:
            worker_id = await worker.ready(settings.store_url)
            await relay.until_ready(200)
            failed = await producer.submit("no", model="broken")
            with pytest.raises(JobFailed):
                await failed.result(PATIENCE_S)
            done = await producer.submit("one two three", model="echo")
            await done.result(PATIENCE_S)
            await seen(view, "two jobs ended within the last seconds", lambda f: f.jobs_per_s > 0)
            running = await producer.submit(ENDLESS, model="slow")
            await wait_for_tokens(producer, running.id, 1)
            reading = asyncio.create_task(follow_sse(relay.port, running.id))
            fleet = await seen(
                view,
                "the running job, its reader and both that ended are seen",
                # All at one look: the rates are of the last ten seconds, and a process that rests looks silent.
                lambda f: (
                    (f.running, f.readers, f.today.total.attempts) == (1, 1, 2)
                    and f.failures == {"refused": 1}
                    and f.events_per_s > 0
                    and f.pieces_per_s > 0
                ),
            )
            (seen_worker,) = fleet.workers
            assert (seen_worker.id, seen_worker.name, seen_worker.family) == (worker_id, "seen", "api")
            assert f"@{seen_worker.host}-{worker.pid}-" in worker_id
            assert (seen_worker.state, seen_worker.alive, seen_worker.running) == ("ready", True, 1)
            assert seen_worker.done.ended == {"failed": 1, "succeeded": 1}
            (server,) = fleet.servers
            assert (server.kind, server.alive, server.readers) == ("relay", True, 1)
            assert {row.group["model"]: row.sums.failed for row in fleet.today.rows} == {"broken": 1, "echo": 0}
            assert queue(fleet, "promptmill.api").workers == 1
            assert queue(fleet, "promptmill.apart").workers == 0
            await running.cancel()
            await reading
            await seen(view, "a cancelled job counts as stopped", lambda f: f.workers[0].done.ended.get("stopped") == 1)
            worker.signal(signal.SIGSTOP)
            await seen(view, "a worker that is frozen is seen as such", lambda f: f.workers and not f.workers[0].alive)
            worker.signal(signal.SIGCONT)
        # Both ended in order.
        gone = await view.look()
        assert (gone.workers, gone.servers) == ([], [])


async def test_a_server_that_was_killed_is_seen_as_silent(write_config) -> None:
    path, settings = write_config(QUICK)
    async with lookout(settings) as view:
        with server_process("promptmill_gateway", path) as gateway:
            await gateway.until_ready(503, "no worker")
            await seen(view, "the gateway is there", lambda f: [s.kind for s in f.servers if s.alive] == ["gateway"])
            gateway.process.kill()
            fleet = await seen(view, "the gateway is silent", lambda f: [s.alive for s in f.servers] == [False])
            assert fleet.readers == 0


async def test_a_broker_that_is_away_only_leaves_its_numbers_out(write_config, tmp_path) -> None:
    with running_store(tmp_path) as broker:
        _, settings = write_config(f'broker_url = "{broker.url}"\n')
        async with lookout(settings) as view:
            assert {q.messages for q in (await view.look()).queues} == {0}
            broker.kill()
            assert {q.messages for q in (await view.look()).queues} == {None}


async def test_open_batches_and_troubled_models_are_seen(write_config, store: Store) -> None:
    path, settings = write_config(
        QUICK + '[models.down]\ntype = "local_openai"\napi_url = "http://127.0.0.1:9/v1"\nmodel_name = "x"\n'
    )
    async with AsyncProducer(settings) as producer:
        batch_id = await made(client_of(store), [line(0), line(1)], seal=False)
        fleet = await look(store, settings)
        assert fleet.batches == 1
        assert [(b.id, b.state, b.lines, b.ended) for b in fleet.open_batches] == [(batch_id, "uploading", 2, 0)]
        assert {q.messages for q in fleet.queues} == {None}
        await store.wire.call("ZADD", keys.DEAD, 1, "some-job")
        await store.wire.call("EXPIRE", keys.DEAD, 60)
        with worker_process(path, "holds") as worker:
            await worker.ready(settings.store_url)
            job = await producer.submit("x", model="down")
            with pytest.raises(JobFailed):
                await job.result(PATIENCE_S)
        fleet = await look(store, settings)
        assert fleet.given_up == 1
        assert ("host", "unreachable") in {(c.kind, c.code) for c in fleet.held}
