"""A full queue refuses new jobs, at the library, over HTTP and at the terminal, and nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Generator
from pathlib import Path
from typing import Any

import httpx
import pytest

from promptmill import AsyncProducer, Producer, keys
from promptmill.backlog import Backlog
from promptmill.cli import exits
from promptmill.cli.app import run
from promptmill.contract import JobRequest, Progress
from promptmill.errors import Overloaded
from promptmill.heartbeat import beat
from promptmill.settings import Settings
from promptmill.store import Claimed, Store
from promptmill_gateway.app import open_gateway
from tests.support.store import keys_without_ttl, running_store
from tests.support.web import serving

ECHO: dict[str, Any] = {"prompt": "hello", "model": "echo"}


@pytest.fixture(scope="module")
def own_url(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    """A store of this module's own: what other tests leave in the queue must not count."""
    with running_store(tmp_path_factory.mktemp("backlog"), append_only=False) as server:
        yield server.url
        assert keys_without_ttl(server.url) == []


@pytest.fixture
async def own(own_url: str) -> AsyncGenerator[Store]:
    """The store, with an empty outbox."""
    store = await Store.connect(own_url)
    await store.redis.delete(keys.OUTBOX)
    yield store
    await store.aclose()


@pytest.fixture
def settings(own_url: str, own: Store) -> Callable[..., Settings]:
    def made(max_queued: int, **values: Any) -> Settings:
        return Settings(redis_url=own_url, max_queued=max_queued, **values)

    return made


def request(**fields: Any) -> JobRequest:
    return JobRequest.model_validate({**ECHO, **fields})


async def claim(store: Store, job_id: str) -> None:
    claimed = await store.claim(job_id, keys.new_token(), "w", Progress(phase="started"))
    assert isinstance(claimed, Claimed)
    await store.redis.zrem(keys.OUTBOX, job_id)  # the claim's own hint may still be on its way


async def test_a_job_over_the_bound_is_refused_with_when_to_try_again_and_nothing_of_it_is_stored(own, settings):
    async with AsyncProducer(settings(3)) as producer:
        user = f"u-{keys.new_job_id()}"
        for _ in range(3):
            await producer.submit(**ECHO, user=user)
        with pytest.raises(Overloaded) as caught:
            await producer.submit(**ECHO, user=user, idempotency_key="k")
        error = caught.value
        assert (error.code, error.limit, error.retry_after_s, error.retryable) == ("backlog_full", 3, 5, True)
        assert "3 jobs wait" in error.message
        assert len((await producer.list(user)).jobs) == 3
        assert await own.redis.zcard(keys.OUTBOX) == 3
        assert not await own.redis.exists(keys.idempotency(user, "k"))


async def test_a_place_that_becomes_free_is_given_at_once(own, settings):
    async with AsyncProducer(settings(2)) as producer:
        first = await producer.submit(**ECHO)
        await producer.submit(**ECHO)
        with pytest.raises(Overloaded):
            await producer.submit(**ECHO)
        await claim(own, first.id)
        await producer.submit(**ECHO)


async def test_batch_jobs_leave_a_fifth_of_the_room_to_interactive_ones(own, settings):
    async with AsyncProducer(settings(10)) as producer:
        await producer.submit_many([{**ECHO, "priority": "batch"}] * 8)
        with pytest.raises(Overloaded) as caught:
            await producer.submit(**ECHO, priority="batch")
        assert caught.value.limit == 8
        assert "80%" in caught.value.message
        await producer.submit(**ECHO)
        await producer.submit(**ECHO)
        with pytest.raises(Overloaded) as caught:
            await producer.submit(**ECHO)
        assert caught.value.limit == 10


async def test_many_at_once_go_in_all_or_none(own, settings):
    async with AsyncProducer(settings(5)) as producer:
        await producer.submit_many([ECHO] * 3)
        with pytest.raises(Overloaded) as caught:
            await producer.submit_many([ECHO] * 3)
        assert caught.value.retryable
        assert await own.redis.zcard(keys.OUTBOX) == 3
        with pytest.raises(Overloaded, match="fewer at a time") as caught:
            await producer.submit_many([ECHO] * 6)
        assert not caught.value.retryable, "it will be no different later"
        await producer.submit_many([ECHO] * 2)


async def test_a_repetition_of_a_job_that_exists_is_answered_however_full_the_queue_is(own, settings):
    keyed = [{**ECHO, "user": f"u-{keys.new_job_id()}", "idempotency_key": f"k{n}"} for n in range(3)]
    async with AsyncProducer(settings(3)) as producer:
        jobs = await producer.submit_many(keyed)
        again = await producer.submit_many(keyed)
        assert [job.id for job in again] == [job.id for job in jobs]
        with pytest.raises(Overloaded):
            await producer.submit_many([*keyed, ECHO])
        await claim(own, jobs[0].id)
        # Three of the four are known: one place is enough.
        assert len(await producer.submit_many([*keyed, ECHO])) == 4


async def test_without_a_bound_nothing_is_counted(own, settings):
    async def nowhere() -> Store:
        raise AssertionError("the store was asked")

    await Backlog(settings(0)).admit([request()] * 1000, nowhere)


async def test_while_there_is_room_the_queue_is_counted_once_a_second_and_what_is_let_in_is_added(own, settings):
    asked = 0
    now = 0.0

    async def store() -> Store:
        nonlocal asked
        asked += 1
        return own

    backlog = Backlog(settings(10), clock=lambda: now)
    for _ in range(10):
        await backlog.admit([request()], store)
    assert asked == 1
    # Counted anew before anything is refused: nothing was stored here, so there is room again.
    await backlog.admit([request()] * 10, store)
    assert asked == 2
    now = 1.5
    await backlog.admit([request()], store)
    assert asked == 3


def test_the_synchronous_producer_says_it_too(own_url: str, settings) -> None:
    with Producer(settings(1)) as producer:
        producer.submit(**ECHO)
        with pytest.raises(Overloaded):
            producer.submit(**ECHO)


@contextlib.asynccontextmanager
async def gateway(settings: Settings) -> AsyncGenerator[httpx.AsyncClient]:
    async with (
        open_gateway(settings) as service,
        serving(service.app, service.streams) as running,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{running.port}", timeout=60) as http,
    ):
        yield http


async def test_over_http_it_is_429_with_retry_after_and_the_gateway_stays_ready(own, settings):
    await beat(own, "worker@here-1-x", 1, "ready", every_s=600)
    async with gateway(settings(1)) as http:
        keyed = {**ECHO, "idempotency_key": keys.new_job_id()}
        first = await http.post("/v1/jobs", json=keyed)
        assert first.status_code == 202
        full = await http.post("/v1/jobs", json=ECHO)
        assert full.status_code == 429
        assert full.headers["retry-after"] == "5"
        assert full.headers["content-type"] == "application/problem+json"
        fields = full.json()
        assert (fields["code"], fields["retryable"], fields["limit"]) == ("backlog_full", True, 1)
        assert fields["retry_after_s"] == 5
        again = await http.post("/v1/jobs", json=keyed)
        assert (again.status_code, again.json()["id"]) == (202, first.json()["id"])
        ready = await http.get("/readyz")
        assert (ready.status_code, ready.json()["ready"]) == (200, True)


async def test_a_full_queue_is_no_reason_to_stop_reading_or_cancelling(own, settings):
    async with gateway(settings(1)) as http:
        path = (await http.post("/v1/jobs", json=ECHO)).headers["location"]
        assert (await http.get(path)).status_code == 200
        assert (await http.post(f"{path}/cancel")).json()["state"] == "cancelled"


def test_the_command_line_names_it_and_ends_with_usage(own_url: str, settings, tmp_path: Path, capsys) -> None:
    config = tmp_path / "p.toml"
    config.write_text(f'redis_url = "{own_url}"\nmax_queued = 1\n')
    with Producer(settings(1)) as producer:
        producer.submit(**ECHO)
    assert run(["run", "--config", str(config), "--model", "echo", "hello"]) == exits.USAGE
    assert "backlog_full" in capsys.readouterr().err
