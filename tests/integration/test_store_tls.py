"""A cluster, and a store and broker behind Sentinel, that speak TLS to their clients and among themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from promptmill import AsyncProducer
from promptmill.doctor.stores import check_broker, check_store
from promptmill.errors import StoreUnavailable
from promptmill.settings import load_settings
from promptmill.store import Store
from tests.support.cluster import running_cluster
from tests.support.sentinel import watched_store
from tests.support.store import StoreServer
from tests.support.streams import check_whole, collect, text_of
from tests.support.tls import Certificate
from tests.support.worker import worker_process

TEXT = "word " * 20


async def runs_a_job(directory: Path, redis_url: str, broker_url: str) -> None:
    """A worker takes a job by way of this broker, its reader gets every token, and doctor finds nothing wrong."""
    path = directory / "promptmill.toml"
    path.write_text(f'redis_url = "{redis_url}"\nbroker_url = "{broker_url}"\n[models.echo]\ntype = "echo"\n')
    settings = load_settings(path)
    with worker_process(path) as worker:
        await worker.ready(redis_url)
        async with AsyncProducer(settings) as producer:
            job = await producer.submit(TEXT, model="echo")
            events = await collect(producer, job.id)
        check_whole(events)
        assert text_of(events) == TEXT
        checks = [*await check_store(settings), *await check_broker(settings)]
        assert [check for check in checks if check.status == "fail"] == []
        assert {"redis", "broker", "workers api"} <= {check.name for check in checks}


async def test_a_job_runs_on_a_cluster_that_speaks_tls(tmp_path: Path, store_server: StoreServer) -> None:
    with running_cluster(tmp_path / "cluster", certificate=Certificate(tmp_path)) as cluster:
        await runs_a_job(tmp_path, cluster.url, store_server.empty_database())
        store = await Store.connect(cluster.url)
        await store.redis.ping()  # redis-py's own client
        await store.aclose()
        with pytest.raises(StoreUnavailable, match="certificate verify failed"):
            await Store.connect(cluster.url.partition("?")[0])


async def test_a_job_runs_on_a_store_and_a_broker_behind_sentinels_that_speak_tls(tmp_path: Path) -> None:
    with watched_store(tmp_path / "store", Certificate(tmp_path)) as watched:
        await runs_a_job(tmp_path, watched.url, watched.url.replace("/0?", "/1?"))
        with pytest.raises(StoreUnavailable, match="cannot be reached"):
            await Store.connect(watched.url.replace("rediss+", "redis+").partition("&ssl")[0])
