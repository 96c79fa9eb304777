"""One pool of connections for all HTTP backends of a process, and nothing of it left after the last one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator
from contextlib import contextmanager

import pytest

from promptmill.settings import ModelConfig
from promptmill_workers.backends import load_backend
from promptmill_workers.backends.base import Backend
from promptmill_workers.backends.http import Lease, open_pools
from promptmill_workers.testing import call, collect, failure, text_of
from tests.support.processes import PATIENCE_S
from tests.support.simulator import Simulator, running_simulator

PATHS = {"local_openai": "/v1", "anthropic_api": "", "gemini_api": "/v1beta/openai"}
WORDS = "".join(f"tok{i} " for i in range(20))


@pytest.fixture
async def sim() -> AsyncIterator[Simulator]:
    async with Simulator() as simulator:
        yield simulator


def made(kind: str, url: str, model: str = "sim") -> Backend:
    return load_backend(kind, ModelConfig(type=kind, model_name=model, api_url=url + PATHS[kind]))


@contextmanager
def a_proxy(monkeypatch: pytest.MonkeyPatch, url: str) -> Generator[None]:
    with monkeypatch.context() as patch:
        for name in ("NO_PROXY", "no_proxy"):
            patch.delenv(name, raising=False)
        for name in ("HTTP_PROXY", "http_proxy"):
            patch.setenv(name, url)
        yield


async def test_all_kinds_share_one_pool_and_its_connections(sim: Simulator) -> None:
    backends = [made(kind, sim.url) for kind in (*PATHS, "local_openai")]
    assert open_pools() == 0, "a backend that was not called holds nothing"
    for backend in backends:
        assert text_of(await collect(backend, call())) == WORDS
        assert (open_pools(), sim.open_connections) == (1, 1)
    for backend in backends[:-1]:
        await backend.aclose()
        assert (open_pools(), sim.open_connections) == (1, 1)
    await backends[-1].aclose()
    assert open_pools() == 0
    await sim.wait_idle(connections=True)


@pytest.mark.parametrize("kind", PATHS)
async def test_closing_one_backend_cuts_no_stream_of_another(sim: Simulator, kind: str) -> None:
    other, streaming = made("local_openai", sim.url), made(kind, sim.url, "sim:tokens=20,rate=50")
    await collect(other, call())
    reading = asyncio.create_task(collect(streaming, call()))
    await sim.wait_requests(2)
    await other.aclose()
    await other.aclose()
    assert text_of(await reading) == WORDS
    await streaming.aclose()
    await sim.wait_idle(connections=True)


@pytest.mark.parametrize("kind", PATHS)
async def test_closing_the_last_backend_ends_what_still_runs(sim: Simulator, kind: str) -> None:
    backend = made(kind, sim.url, "sim:fault=stall")
    reading = asyncio.create_task(failure(backend, call()))
    await sim.wait_requests(1)
    await sim.wait_for(lambda: sim.requests[0].tokens_written > 0, description="a token")
    await backend.aclose()
    await sim.wait_idle(connections=True)
    async with asyncio.timeout(PATIENCE_S):
        _, error = await reading
    assert error.code in {"cut", "unreachable"}


async def test_a_backend_that_opens_while_the_last_one_closes_gets_a_pool_of_its_own(sim: Simulator) -> None:
    for _ in range(5):
        leaving, coming = made("local_openai", sim.url), made("anthropic_api", sim.url)
        await collect(leaving, call())
        _, items = await asyncio.gather(leaving.aclose(), collect(coming, call()))
        assert text_of(items) == WORDS
        assert open_pools() == 1
        await coming.aclose()
        assert open_pools() == 0


async def test_a_backend_that_was_closed_can_be_called_again(sim: Simulator) -> None:
    for kind in PATHS:
        backend = made(kind, sim.url)
        for _ in range(2):
            assert text_of(await collect(backend, call())) == WORDS
            await backend.aclose()
        assert open_pools() == 0


async def test_a_proxy_and_certificates_have_pools_of_their_own(
    sim: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    leases = [Lease(sim.url), Lease("https://model.invalid"), Lease("https://other.invalid")]
    with a_proxy(monkeypatch, sim.url):
        leases += [Lease("http://model.invalid"), Lease("http://127.0.0.1:9")]
    sessions = [lease.session() for lease in leases]
    assert sessions[0] is sessions[4] is not sessions[1]
    assert sessions[1] is sessions[2] is not sessions[3]
    assert open_pools() == 3
    for lease in leases:
        await lease.aclose()
    assert open_pools() == 0
    assert all(session.closed for session in sessions)


def test_each_event_loop_has_a_pool_of_its_own() -> None:
    async def one(url: str) -> None:
        backend = made("local_openai", url)
        assert open_pools() == 0
        assert text_of(await collect(backend, call())) == WORDS
        assert open_pools() == 1
        await backend.aclose()

    with running_simulator() as sim:
        for _ in range(2):
            asyncio.run(one(sim.url))
        sim.wait_idle(connections=True)
