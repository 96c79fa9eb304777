"""The public conformance suite, unchanged, over backends that run in a process of their own for each call."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any, ClassVar

import pytest

from promptmill.settings import ModelConfig
from promptmill_workers.backends.base import Backend, Call, Item
from promptmill_workers.isolated import Isolated, make_backend
from promptmill_workers.programs import prepare
from promptmill_workers.testing import BackendConformance, Scenario
from tests.support.conformance import echo_options, simulator_plan
from tests.support.processes import PATIENCE_S, tree, wait_until
from tests.support.simulator import Simulator


@asynccontextmanager
async def isolated(**fields: Any) -> AsyncIterator[Backend]:
    backend = make_backend("model", ModelConfig(isolation="process", **fields))
    assert isinstance(backend, Isolated)
    try:
        yield backend
    finally:
        await backend.aclose()


class Apart(BackendConformance):
    """Whatever a test did: no process of ours is left behind it."""

    answer_s: ClassVar[float] = PATIENCE_S

    @pytest.fixture(autouse=True)
    async def _nothing_left(self) -> AsyncIterator[None]:
        await prepare()  # the warden stays as long as this process
        self.before = tree(os.getpid())
        yield
        await self.wait_disconnected()

    async def wait_disconnected(self) -> None:
        await wait_until(lambda: tree(os.getpid()) <= self.before, "no process of ours runs")


class TestIsolatedEcho(Apart):
    @asynccontextmanager
    async def opened(self, scenario: Scenario) -> AsyncIterator[Backend]:
        async with isolated(type="echo", options=echo_options(scenario)) as backend:
            yield backend


class InOrder:
    """A backend whose later attempts wait until the earlier ones have reached the provider.

    The provider counts requests to know which is to fail, and processes that start together may overtake one another.
    """

    def __init__(self, backend: Backend, sim: Simulator) -> None:
        self._backend = backend
        self._sim = sim

    async def complete(self, call: Call) -> AsyncGenerator[Item, None]:
        await self._sim.wait_requests(call.attempt - 1)
        async with aclosing(self._backend.complete(call)) as items:
            async for item in items:
                yield item

    async def aclose(self) -> None:
        await self._backend.aclose()


class TestIsolatedLocalOpenAI(Apart):
    sim: Simulator

    @pytest.fixture(autouse=True)
    async def _provider(self, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
        monkeypatch.setenv("SIMULATOR_KEY", "planted-key")
        async with Simulator(key="planted-key") as self.sim:
            yield

    @asynccontextmanager
    async def opened(self, scenario: Scenario) -> AsyncIterator[Backend]:
        self.sim.default = simulator_plan(scenario)
        url = f"{self.sim.url}/v1"
        async with isolated(type="local_openai", model_name="sim", api_url=url, api_key_env="SIMULATOR_KEY") as backend:
            yield InOrder(backend, self.sim)

    async def wait_disconnected(self) -> None:
        await super().wait_disconnected()
        await self.sim.wait_idle(connections=True)
