"""A store and a broker behind Sentinel, whose primary dies under load."""

from __future__ import annotations

import asyncio
import socket
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import pytest

from promptmill import AsyncProducer
from promptmill.contract import Restart
from promptmill.doctor.stores import check_broker, check_store
from promptmill.errors import StoreUnavailable
from promptmill.settings import Settings, load_settings
from promptmill.store import Store
from promptmill.store.connection import open_redis
from promptmill.store.wire import Wire
from tests.support.processes import wait_until
from tests.support.sentinel import watched_store
from tests.support.server import server_process
from tests.support.store import keys_without_ttl
from tests.support.streams import check_whole, collect, follow_sse, text_of, wait_for_tokens
from tests.support.worker import pace, worker_process

MODELS = '[models.slow]\ntype = "echo"\noptions = { tokens_per_s = 30 }\n'
LONG = "word " * 100


async def test_a_primary_that_dies_under_load_costs_time_and_no_token(tmp_path: Path) -> None:
    with watched_store(tmp_path / "store") as watched:
        path = tmp_path / "promptmill.toml"
        # The broker is the same Redis behind the same Sentinel.
        path.write_text(f'redis_url = "{watched.url}"\n{pace(20.0)}{MODELS}')
        settings = load_settings(path)
        async with AsyncProducer(settings) as producer, AsyncExitStack() as stack:
            worker = stack.enter_context(worker_process(path))
            gateway = stack.enter_context(server_process("promptmill_gateway", path))
            await worker.ready(watched.url)
            await gateway.until_ready(200)
            jobs = await producer.submit_many([{"prompt": LONG, "model": "slow"} for _ in range(6)])
            readings = [asyncio.create_task(collect(producer, job.id)) for job in jobs]
            readings += [asyncio.create_task(follow_sse(gateway.port, job.id)) for job in jobs]
            await wait_for_tokens(producer, jobs[-1].id, 5)
            primary, replica = watched.servers
            primary.kill()
            await wait_until(lambda: watched.primary_port == replica.port, "the replica took over")
            for events in await asyncio.gather(*readings):
                check_whole(events)
                assert text_of(events) == LONG
                assert not any(isinstance(event, Restart) for event in events), "nobody was given up"
            # Celery's consumer follows as well: a new job runs.
            later = await producer.submit("again", model="echo")
            assert (await later.result(90)).text == "again"
        assert keys_without_ttl(replica.url) == []


async def test_doctor_names_the_service_and_no_password(tmp_path: Path) -> None:
    with watched_store(tmp_path / "store") as watched:
        settings = Settings(redis_url=watched.url, broker_url=watched.url.replace("/0?", "/1?"))
        found = [*await check_store(settings), *await check_broker(settings)]
        said = {check.name: check for check in found}
        assert "mymaster of Sentinel 127.0.0.1:1,127.0.0.1:" in said["redis"].found
        assert said["broker"].status == "ok", said["broker"]
        assert not any("watch" in f"{check.found}{check.advice}" for check in found)


async def test_a_service_that_no_sentinel_knows_is_unavailable() -> None:
    with pytest.raises(StoreUnavailable, match=r"nobody of Sentinel 127\.0\.0\.1:1") as failed:
        await Store.connect("redis+sentinel://:secret@127.0.0.1:1/nobody/0?sentinel_password=secret")
    assert "secret" not in str(failed.value)
    assert str(failed.value).endswith("No master found for 'nobody' (not all Sentinels answer)")


async def test_sentinels_that_are_silent_are_passed_over(tmp_path: Path) -> None:
    with watched_store(tmp_path / "store") as watched, ExitStack() as stack:
        # Connected to by the kernel, and never answered.
        mute = [stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(3)]
        names = "".join(f"127.0.0.1:{port}," for port in mute)
        redis = open_redis(watched.url.replace("127.0.0.1:1,", names))
        wire = Wire(redis)
        try:
            assert await wire.call("PING") == b"PONG"
        finally:
            await wire.aclose()
            await redis.aclose()
