"""A reader that leaves stops no job, but for one that asked for it, and only where nobody comes back in time.

No test waits for a grace to pass: the grace is long, and its end is set by hand in the store, whose clock decides.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncGenerator, Generator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from promptmill import AsyncProducer, keys
from promptmill.contract import Progress
from promptmill.errors import NotFound, StoreUnavailable
from promptmill.settings import Settings
from promptmill.store import Claimed, Store
from promptmill_gateway.disconnect import Disconnects
from tests.support.gateway import Front, gateway_process, running_gateway, running_relay
from tests.support.processes import wait_until
from tests.support.simulator import Simulator
from tests.support.store import running_store
from tests.support.web import Exchange, request
from tests.support.worker import worker_process

ECHO: dict[str, Any] = {"prompt": "hello", "model": "echo"}
TIED: dict[str, Any] = {**ECHO, "cancel_on_disconnect": True}
GRACE_S = 3000
LONG_S = 60.0


@pytest.fixture
def own_store(tmp_path: Path) -> Generator[str]:
    """For who counts what a provider is asked: what other tests left in the shared queues would be asked too."""
    with running_store(tmp_path, append_only=False) as server:
        yield server.url


@pytest.fixture
def patient(redis_url: str) -> Settings:
    """A grace that does not pass during a test."""
    return Settings(redis_url=redis_url, disconnect_grace_s=GRACE_S)


async def submit(front: Front, body: dict[str, Any] = TIED, **headers: str) -> tuple[str, str]:
    """A job's id and the address of its stream."""
    job = (await front.http.post("/v1/jobs", json=body, headers=headers)).json()
    return job["id"], job["stream_url"]


@asynccontextmanager
async def reading(front: Front, path: str, events: int = 1) -> AsyncGenerator[Exchange]:
    """A reader that has seen some events; it leaves with the block."""
    async with request(front.port, path) as stream:
        assert stream.status == 200
        await stream.read_events(events)
        yield stream


async def visit(front: Front, path: str, events: int = 1) -> None:
    """Read some events and leave; returns when the gateway has noticed."""
    before = front.service.streams.open_streams
    async with reading(front, path, events):
        pass
    await wait_until(lambda: front.service.streams.open_streams == before, "the reader is gone", LONG_S)


async def due_ms(store: Store, job_id: str) -> float | None:
    return await store.redis.zscore(keys.LEFT, job_id)


async def on_record(store: Store, job_id: str) -> None:
    async def there() -> bool:
        return await due_ms(store, job_id) is not None

    await wait_until(there, "it is on record that a reader left", LONG_S)


async def grace_passes(store: Store, job_id: str) -> None:
    """The time to look at a job has come; waits until somebody did."""
    await store.redis.zadd(keys.LEFT, {job_id: 1}, xx=True)

    async def looked() -> bool:
        score = await due_ms(store, job_id)
        return score is None or score > 1

    await wait_until(looked, "somebody looked at the job", LONG_S)


async def state_of(store: Store, job_id: str) -> str:
    return (await store.get(job_id)).state


async def test_a_reader_that_leaves_for_good_ends_the_job_and_the_providers_connection(
    tmp_path: Path, own_store: str
) -> None:
    async with Simulator() as provider:
        config = tmp_path / "p.toml"
        model = 'type = "local_openai"\nmodel_name = "sim:tokens=100000,rate=20"\n'
        config.write_text(f'redis_url = "{own_store}"\n[models.slow]\n{model}api_url = "{provider.url}/v1"\n')
        settings = Settings(redis_url=own_store, disconnect_grace_s=0.5)
        with worker_process(config) as worker:
            await worker.ready(own_store)
            async with running_gateway(settings) as front:
                job_id, path = await submit(front, {**TIED, "model": "slow"})
                async with reading(front, path, 5) as other:
                    await visit(front, path, 5)
                    await provider.wait_requests(1, timeout_s=LONG_S)
                    assert provider.requests[0].open
                    assert not other.ended
                await provider.wait_idle(timeout_s=LONG_S, connections=True)
                assert [r.outcome for r in provider.requests] == ["client_disconnected"]
                job = (await front.http.get(f"/v1/jobs/{job_id}")).json()
                assert (job["state"], job["error"]) == ("cancelled", None)
                assert "tok0 tok1 tok2" in job["text"]
                async with request(front.port, path) as late:
                    (*_, end) = await late.read_events()
                    assert end.type == "cancelled"
                    assert "nobody came back within 0.5 s" in end.data


async def test_a_page_that_is_reloaded_keeps_its_job_also_at_another_gateway(store: Store, patient: Settings) -> None:
    async with running_gateway(patient) as front, running_gateway(patient) as other:
        job_id, path = await submit(front)
        await visit(front, path)
        await on_record(store, job_id)
        async with reading(other, path):
            for _ in range(2):
                await grace_passes(store, job_id)
                assert await state_of(store, job_id) == "queued"
        # The second one has left too: by now it is the reader at the other gateway whose grace counts.
        await wait_until(lambda: other.service.streams.open_streams == 0, "the second reader is gone", LONG_S)
        await grace_passes(store, job_id)
        await wait_until(lambda: ended(store, job_id), "the job is cancelled", LONG_S)
        assert await state_of(store, job_id) == "cancelled"
        assert await due_ms(store, job_id) is None


async def ended(store: Store, job_id: str) -> bool:
    await store.redis.zadd(keys.LEFT, {job_id: 1}, xx=True)
    return (await store.get(job_id)).ended


async def test_who_leaves_again_within_the_grace_begins_a_new_one(store: Store, patient: Settings) -> None:
    async with running_gateway(patient) as front, running_gateway(patient) as other:
        job_id, path = await submit(front)
        await visit(front, path)
        await on_record(store, job_id)
        first = await due_ms(store, job_id)
        await visit(other, path)

        async def later() -> bool:
            due = await due_ms(store, job_id)
            return due is not None and first is not None and due > first

        await wait_until(later, "the second leaving counts", LONG_S)


async def test_one_of_two_readers_may_leave(store: Store, patient: Settings) -> None:
    async with running_gateway(patient) as front:
        job_id, path = await submit(front)
        async with reading(front, path) as stays:
            await visit(front, path)
            await on_record(store, job_id)
            await grace_passes(store, job_id)
            await front.http.post(f"/v1/jobs/{job_id}/cancel", json={"reason": "read to the end"})
            (end,) = await stays.read_events()
            assert "read to the end" in end.data


async def test_a_job_that_did_not_ask_for_it_outlives_its_readers(store: Store, patient: Settings) -> None:
    async with running_gateway(patient) as front:
        plain, path = await submit(front, ECHO)
        await visit(front, f"{path}&cancel_on_disconnect=1")
        await visit(front, f"/v1/jobs/{plain}/stream?cancel_on_disconnect=true")
        # Leavings go on record in the order in which they come.
        tied, path = await submit(front)
        await visit(front, path)
        await on_record(store, tied)
        assert await due_ms(store, plain) is None
        assert await state_of(store, plain) == "queued"


async def test_a_job_of_the_library_is_tied_as_well_and_the_librarys_readers_count(
    store: Store, patient: Settings
) -> None:
    async with running_gateway(patient) as front, AsyncProducer(patient) as producer:
        job = await producer.submit(**ECHO, cancel_on_disconnect=True)
        await visit(front, f"/v1/jobs/{job.id}/stream")
        await on_record(store, job.id)
        async with aclosing(job.events()) as events:
            assert isinstance(await anext(events), Progress)
            await grace_passes(store, job.id)
            assert await state_of(store, job.id) == "queued"
        await wait_until(lambda: ended(store, job.id), "the job is cancelled", LONG_S)


async def test_a_relays_reader_keeps_a_job_alive_but_stops_none(store: Store, patient: Settings) -> None:
    async with running_gateway(patient) as front, running_relay(patient) as relay:
        read, path = await submit(front)
        await visit(relay, path)
        left, left_path = await submit(front)
        async with reading(relay, left_path):
            await visit(front, left_path)
            await on_record(store, left)
            assert await due_ms(store, read) is None
            await grace_passes(store, left)
            assert await state_of(store, left) == "queued"


async def test_a_foreign_user_stops_nothing_by_coming_and_going(
    store: Store, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY_A", "key-a")
    monkeypatch.setenv("KEY_B", "key-b")
    keyring: Any = {"ann": {"key_env": "KEY_A"}, "bob": {"key_env": "KEY_B"}}
    settings = Settings(redis_url=redis_url, disconnect_grace_s=GRACE_S, api_keys=keyring)
    async with running_gateway(settings) as front:
        hers, _ = await submit(front, TIED, authorization="Bearer key-a")
        for headers in ({"X-API-Key": "key-b"}, {}):
            async with request(front.port, f"/v1/jobs/{hers}/stream", headers=headers) as refused:
                assert refused.status in {401, 404}
        his, path = await submit(front, TIED, authorization="Bearer key-b")
        await visit(front, path)
        await on_record(store, his)
        assert await due_ms(store, hers) is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_a_gateway_that_ends_has_not_been_left(number: signal.Signals, store: Store, redis_url: str) -> None:
    async with gateway_process(redis_url, PROMPTMILL_DISCONNECT_GRACE_S="0") as (process, port):
        async with AsyncProducer(Settings(redis_url=redis_url)) as producer:
            job = await producer.submit(**ECHO, cancel_on_disconnect=True)
        async with request(port, f"/v1/jobs/{job.id}/stream") as stream:
            await stream.read_events(1)
            process.send_signal(number)
            async with asyncio.timeout(LONG_S):
                await process.wait()
            assert await due_ms(store, job.id) is None
            assert await state_of(store, job.id) == "queued"


async def test_who_left_just_before_the_gateway_ends_is_on_record(store: Store, patient: Settings) -> None:
    async with running_gateway(patient) as front:
        job_id, path = await submit(front)
        await visit(front, path)
    assert await due_ms(store, job_id) is not None
    # Not told to anybody but the one that ended: any other sees to it.
    await store.redis.zadd(keys.LEFT, {job_id: 1}, xx=True)
    async with running_gateway(patient):
        await wait_until(lambda: ended(store, job_id), "the job is cancelled", LONG_S)


async def test_a_job_that_ended_is_let_be_and_forgotten(store: Store, patient: Settings) -> None:
    disconnects = Disconnects(store, patient)
    async with AsyncProducer(patient, store=store) as producer:
        job = await producer.submit(**ECHO, cancel_on_disconnect=True)
        disconnects.left(job.id)
        await disconnects.record()
        token = keys.new_token()
        assert isinstance(await store.claim(job.id, token, "w", Progress(phase="started")), Claimed)
        assert await store.finish(job.id, token, "succeeded", b'{"type":"done","text":"x"}', {"text": "x"}, [])
        await store.redis.zadd(keys.LEFT, {job.id: 1, "never-was": 1})
        assert await disconnects.look() == []
        assert await state_of(store, job.id) == "succeeded"
        assert await due_ms(store, job.id) is None
        assert await due_ms(store, "never-was") is None
        disconnects.left(job.id)
        await disconnects.record()
        assert await due_ms(store, job.id) is None


async def test_many_that_leave_at_once_are_all_seen_to_and_two_gateways_may_look_at_once(
    store: Store, patient: Settings
) -> None:
    settings = patient.model_copy(update={"disconnect_grace_s": 0})
    one, other = Disconnects(store, settings), Disconnects(store, settings)
    async with AsyncProducer(patient, store=store) as producer:
        jobs = await producer.submit_many([TIED] * 450)
        for job in jobs:
            one.left(job.id)
        await one.record()
        cancelled = [job_id for found in await asyncio.gather(one.look(), other.look()) for job_id in found]
        mine = {job.id for job in jobs}
        assert sorted(job_id for job_id in cancelled if job_id in mine) == sorted(mine), "each is cancelled once"


async def test_who_leaves_while_redis_is_away_goes_on_record_when_it_is_back(tmp_path: Path) -> None:
    with running_store(tmp_path) as server:
        settings = Settings(redis_url=server.url, disconnect_grace_s=GRACE_S)
        async with AsyncExitStack() as stack:
            store = await Store.connect(server.url)
            stack.push_async_callback(store.aclose)
            disconnects = Disconnects(store, settings)
            async with AsyncProducer(settings) as producer:
                job = await producer.submit(**ECHO, cancel_on_disconnect=True)
            server.kill()
            disconnects.left(job.id)
            with pytest.raises(StoreUnavailable):
                await disconnects.record()
            running = asyncio.create_task(disconnects.run())
            stack.callback(running.cancel)
            server.start()
            await on_record(store, job.id)
            assert not running.done()


async def test_a_job_that_vanishes_between_look_and_cancel_fails_nobody(
    store: Store, patient: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    disconnects = Disconnects(store, patient)

    async def gone(*_: object) -> bool:
        raise NotFound("there is no job x")

    async with AsyncProducer(patient, store=store) as producer:
        job = await producer.submit(**ECHO, cancel_on_disconnect=True)
        await store.redis.zadd(keys.LEFT, {job.id: 1})
        await store.redis.expire(keys.LEFT, 60)
        monkeypatch.setattr(store, "cancel", gone)
        assert await disconnects.look() == []
        assert await due_ms(store, job.id) is None
