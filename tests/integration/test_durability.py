"""What is on a disk when, and what becomes of jobs whose store forgot the last moments: power loss, failover."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest
import redis.asyncio

from promptmill import AsyncProducer, keys
from promptmill.contract import Event, Progress, Restart, Timeouts, parse_request
from promptmill.errors import StoreUnavailable
from promptmill.settings import Settings
from promptmill.settings.parts import Durability
from promptmill.store import START, Claimed, Store, Submission, durable
from promptmill_workers.writer import Writer
from tests.support.processes import wait_until
from tests.support.server import server_process
from tests.support.store import StoreServer, keys_without_ttl, running_store
from tests.support.streams import check_whole, collect, follow_sse, phases, text_of, wait_for_tokens
from tests.support.worker import worker_process

QUICK = "heartbeat_s = 0.4\ndead_after_s = 5.0\nkeepalive_s = 1\n"
MODELS = '[models.slow]\ntype = "echo"\noptions = { tokens_per_s = 20 }\n'
LONG = "word " * 80
EACH_SECOND = ("--appendfsync", "everysec")


@asynccontextmanager
async def client_of(server: StoreServer) -> AsyncGenerator[Any]:
    async with redis.asyncio.Redis(port=server.port) as client:
        yield client


@asynccontextmanager
async def store_of(server: StoreServer) -> AsyncGenerator[Store]:
    store = await Store.connect(server.url)
    try:
        yield store
    finally:
        await store.aclose()


def producer_of(server: StoreServer, level: Durability) -> AsyncProducer:
    return AsyncProducer(Settings(redis_url=server.url, durability=level))


# -- what a submission waits for ------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["everysec", "always"])
async def test_a_local_submission_returns_once_it_is_on_the_disk(tmp_path: Path, policy: str) -> None:
    with running_store(tmp_path) as server:
        async with client_of(server) as client, producer_of(server, "local") as producer:
            await client.config_set("appendfsync", policy)
            job = await producer.submit("x", model="echo")
            assert (await job.get()).state == "queued"
        assert keys_without_ttl(server.url) == []


async def test_what_no_disk_confirmed_is_said_and_exists_all_the_same(tmp_path: Path) -> None:
    with running_store(tmp_path) as server:
        async with client_of(server) as client, producer_of(server, "local") as producer:
            with pytest.raises(StoreUnavailable) as caught:
                await producer.submit("x", model="echo", idempotency_key="k")
            assert caught.value.retryable
            assert "not known to be durable" in caught.value.message
            (job,) = (await producer.list()).jobs
            assert await client.llen("promptmill.api") == 1, "its message is sent: it runs, durable or not"
            await client.config_set("appendfsync", "always")
            assert (await producer.submit("x", model="echo", idempotency_key="k")).id == job.id


async def test_by_default_nothing_is_waited_for(tmp_path: Path) -> None:
    with running_store(tmp_path) as server:
        async with client_of(server) as client, producer_of(server, "server") as producer:
            await producer.submit("x", model="echo")
            assert not await client.exists(keys.MARK)


async def test_a_server_that_cannot_confirm_is_found_before_anything_is_stored(tmp_path: Path) -> None:
    with running_store(tmp_path, append_only=False) as server:
        async with producer_of(server, "local") as producer:
            with pytest.raises(StoreUnavailable) as caught:
                await producer.submit("x", model="echo")
            assert (caught.value.retryable, caught.value.field) == (False, "durability")
            assert "appendonly yes" in caught.value.message
            assert (await producer.list()).jobs == []


async def test_a_confirmation_that_takes_its_time_holds_nobody_else_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "WAIT_S", 9.0)
    with running_store(tmp_path) as server:
        async with client_of(server) as client, producer_of(server, "local") as producer:
            waiting = asyncio.create_task(producer.submit("x", model="echo"))
            await wait_until(lambda: blocked(client), "the confirmation is waited for")
            (job,) = (await producer.list()).jobs
            assert (await producer.get(job.id)).state == "queued"
            await producer.cancel(job.id)
            assert not waiting.done()
            await client.config_set("appendfsync", "always")
            await client.set("another", "write", ex=60)
            await waiting


async def blocked(client: Any) -> bool:
    return (await client.info("clients"))["blocked_clients"] > 0


async def test_all_who_wait_at_the_same_moment_share_one_confirmation(tmp_path: Path) -> None:
    with running_store(tmp_path, options=EACH_SECOND) as server:
        async with client_of(server) as client, producer_of(server, "local") as producer:
            await asyncio.gather(*(producer.submit("x", model="echo") for _ in range(200)))
            # Synced each second, so each mark but the first takes up to one: as many marks as the 200 took seconds.
            assert await confirmations(client) < 20, "one by one a disk that syncs each second takes minutes"


async def test_whether_it_can_confirm_is_asked_once_by_all_who_come_before_it_has_answered(tmp_path: Path) -> None:
    with running_store(tmp_path) as server:
        async with client_of(server) as client, store_of(server) as store:
            await asyncio.gather(*(store.durable.check("local") for _ in range(200)))
            await store.durable.check("local")
            assert await confirmations(client) == 1


async def test_one_who_no_longer_waits_for_the_answer_takes_it_from_nobody_else(tmp_path: Path) -> None:
    with running_store(tmp_path) as server:
        async with client_of(server) as client, store_of(server) as store:
            first, second = (asyncio.create_task(store.durable.check("local")) for _ in range(2))
            await asyncio.sleep(0)
            first.cancel()
            await second
            assert first.cancelled()
            assert await confirmations(client) == 1


async def confirmations(client: Any) -> int:
    """How often the server was asked for one."""
    return int((await client.info("commandstats"))["cmdstat_waitaof"]["calls"])


async def test_a_replicas_disk_counts_and_a_failover_to_it_loses_nothing(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    with (
        running_store(first, options=EACH_SECOND) as primary,
        running_store(second, options=EACH_SECOND) as replica,
    ):
        async with client_of(replica) as there, producer_of(primary, "replica") as producer:
            with pytest.raises(StoreUnavailable, match="no replica"):
                await producer.submit("x", model="echo")
            await there.replicaof("127.0.0.1", primary.port)

            async def linked() -> bool:
                return (await there.info("replication"))["master_link_status"] == "up"

            await wait_until(linked, "the replica follows", 30)
            jobs: list[str] = []
            # A replica that has just synchronised may not have told of its disk yet.
            for _ in range(10):
                jobs += await taken(producer, 5)
            assert jobs
            primary.kill()
            await there.replicaof("NO", "ONE")
            async with producer_of(replica, "local") as after:
                assert {(await after.get(job_id)).state for job_id in jobs} == {"queued"}


async def taken(producer: AsyncProducer, count: int) -> list[str]:
    """Submit some; the ids of those that count as stored."""
    answers = await asyncio.gather(*(producer.submit("x", model="echo") for _ in range(count)), return_exceptions=True)
    refused = [a for a in answers if isinstance(a, BaseException)]
    assert all(isinstance(a, StoreUnavailable) for a in refused), refused
    return [a.id for a in answers if not isinstance(a, BaseException)]


# -- a store that forgot its last moments ---------------------------------------------------------------------------


class Forgetful:
    """A store whose append-only file is cut back to where it was: what power loss or a failover may take away."""

    def __init__(self, server: StoreServer, directory: Path) -> None:
        self.server = server
        self._directory = directory / "appendonlydir"

    def mark(self) -> Callable[..., None]:
        """A moment to fall back to; call what this answers, with options, to kill the store and start it as it was."""
        (file,) = self._directory.glob("*.incr.aof")
        size = file.stat().st_size

        def fall_back(*options: str) -> None:
            self.server.kill()
            with file.open("r+b") as opened:
                opened.truncate(size)
            self.server.start(*options)

        return fall_back


async def test_a_server_that_forgot_a_submission_does_not_confirm_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "WAIT_S", 9.0)
    with running_store(tmp_path) as server:
        async with client_of(server) as client, producer_of(server, "local") as producer:
            first = asyncio.create_task(producer.submit("x", model="echo"))
            await wait_until(lambda: blocked(client), "the first one's confirmation is waited for")
            fall_back = Forgetful(server, tmp_path).mark()
            second = asyncio.create_task(producer.submit("x", model="echo", idempotency_key="k"))

            async def sent() -> bool:
                return await client.llen("promptmill.api") == 2

            await wait_until(sent, "the second one is stored, and waits for its turn")
            await asyncio.to_thread(fall_back, *EACH_SECOND)
            for submission in first, second:
                with pytest.raises(StoreUnavailable, match="not known to be durable"):
                    await submission
            job = await producer.submit("x", model="echo", idempotency_key="k")
            assert (await job.get()).state == "queued"


@asynccontextmanager
async def forgetful(tmp_path: Path, write_config) -> AsyncGenerator[tuple[Forgetful, Path, AsyncProducer]]:
    with running_store(tmp_path) as server:
        path, settings = write_config(QUICK + MODELS, url=server.url)
        async with AsyncProducer(settings) as producer:
            yield Forgetful(server, tmp_path), path, producer
        assert keys_without_ttl(server.url) == []


async def test_a_new_connection_is_not_written_to_before_it_said_what_its_log_has(store: Store) -> None:
    writer = Writer(store.wire)
    writer.start()
    request, timeouts = parse_request({"prompt": "x"}), Timeouts(queue_s=60, total_s=60)
    job = Submission(keys.new_job_id(), request, "q", timeouts, 3, timedelta(hours=1))
    await store.submit([job])
    claimed = await store.claim(job.job_id, "c", "w", Progress(phase="started"))
    assert isinstance(claimed, Claimed)
    log = writer.open(job.job_id, "c", claimed.epoch)
    for text in ("a", "b", "c"):
        log.add_text(text)
        writer.mark(log)
        await writer.settle(log)
    serial = writer.serial
    entries, _, _ = await store.read_log(job.job_id, START)
    await store.redis.delete(keys.log(job.job_id))
    for event_id, data in entries[:-2]:
        await store.redis.xadd(keys.log(job.job_id), {"e": data}, id=str(event_id))
    await store.redis.client_kill_filter(_id=await store.wire.call("CLIENT", "ID"))
    await wait_until(lambda: store.wire.serial == 0, "the connection is lost")
    await store.wire.call("PING")  # somebody else's call makes a new one
    with pytest.raises(StoreUnavailable):
        await store.finish(job.job_id, "c", "succeeded", b'{"type":"done"}', {}, [], serial=serial)
    log.add_text("d")
    writer.mark(log)
    await writer.settle(log)
    again, _, _ = await store.read_log(job.job_id, START)
    assert [event_id for event_id, _ in again[:-1]] == [event_id for event_id, _ in entries]
    assert [orjson.loads(data).get("text") for _, data in again[-4:]] == ["a", "b", "c", "d"]
    done = b'{"type":"done","text":"abcd"}'
    assert await store.finish(job.job_id, "c", "succeeded", done, {"text": "abcd"}, [], serial=writer.serial)
    await writer.aclose()


async def test_tokens_that_the_store_forgot_are_sent_again(tmp_path: Path, write_config) -> None:
    async with forgetful(tmp_path, write_config) as (store, path, producer):
        with worker_process(path) as worker, server_process("promptmill_gateway", path) as gateway:
            await worker.ready(store.server.url)
            await gateway.until_ready(200)
            job = await producer.submit(LONG, model="slow")
            async with asyncio.TaskGroup() as group:
                library = group.create_task(collect(producer, job.id))
                page = group.create_task(follow_sse(gateway.port, job.id))
                await wait_for_tokens(producer, job.id, 5)
                fall_back = store.mark()
                await wait_for_tokens(producer, job.id, 25)
                await asyncio.to_thread(fall_back)
            for events in (library.result(), page.result()):
                check_whole(events)
                assert text_of(events) == LONG
                assert not any(isinstance(e, Restart) for e in events)
            # Whoever comes now reads the log: it is as long as what the others saw.
            assert [e.id for e in await collect(producer, job.id)] == [e.id for e in library.result()]


async def test_an_attempt_that_the_store_forgot_is_void_for_those_who_saw_it(tmp_path: Path, write_config) -> None:
    async with forgetful(tmp_path, write_config) as (store, path, producer):
        job = await producer.submit(LONG, model="slow")
        fall_back = store.mark()
        library, page = list[Event](), list[Event]()
        with worker_process(path) as worker, server_process("promptmill_gateway", path) as gateway:
            await worker.ready(store.server.url)
            await gateway.until_ready(200)
            async with asyncio.TaskGroup() as group:
                group.create_task(collect(producer, job.id, found=library))
                group.create_task(follow_sse(gateway.port, job.id, found=page))
                await wait_until(lambda: all(text_of(seen) for seen in (library, page)), "both saw some of it")
                await asyncio.to_thread(fall_back)
            for events in (library, page):
                assert [e for e in events if e.ends] == events[-1:]
                assert events[-1].type == "done", events[-1]
                assert any(isinstance(e, Restart) for e in events)
                assert text_of(events) == LONG
            fresh = await collect(producer, job.id)
            check_whole(fresh)
            assert phases(fresh) == ["queued", "started"]
            assert [a.outcome for a in (await job.get()).attempts].count("succeeded") == 1


async def test_a_job_whose_end_the_store_forgot_ends_again(tmp_path: Path, write_config) -> None:
    async with forgetful(tmp_path, write_config) as (store, path, producer):
        with worker_process(path) as worker:
            await worker.ready(store.server.url)
            job = await producer.submit(LONG, model="slow")
            await wait_for_tokens(producer, job.id, 5)
            fall_back = store.mark()
            assert (await job.result(60)).text == LONG
            await asyncio.to_thread(fall_back)
            events = await collect(producer, job.id)
            check_whole(events)
            assert text_of(events) == LONG
            assert (await job.get()).state == "succeeded"
