"""The public conformance suite over the built-in backends, the HTTP ones against the provider simulator."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import ClassVar

import pytest

from promptmill.settings import ModelConfig
from promptmill_workers.backends import load_backend
from promptmill_workers.backends.base import Backend
from promptmill_workers.testing import BackendConformance, Scenario
from tests.support.conformance import echo_options, simulator_plan
from tests.support.processes import PATIENCE_S
from tests.support.simulator import Simulator


class OverHttp(BackendConformance):
    answer_s: ClassVar[float] = PATIENCE_S
    kind: ClassVar[str]
    path: ClassVar[str] = ""
    options: ClassVar[dict[str, object]] = {}
    sim: Simulator

    @pytest.fixture(autouse=True)
    async def _provider(self) -> AsyncIterator[None]:
        async with Simulator(key="planted-key") as self.sim:
            yield

    @pytest.fixture(autouse=True)
    def _key(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SIMULATOR_KEY", "planted-key")

    @asynccontextmanager
    async def opened(self, scenario: Scenario) -> AsyncIterator[Backend]:
        self.sim.default = simulator_plan(scenario)
        config = ModelConfig(
            type=self.kind,
            model_name="sim",
            api_url=self.sim.url + self.path,
            api_key_env="SIMULATOR_KEY",
            options=self.options,
        )
        backend = load_backend("model", config)
        try:
            yield backend
        finally:
            await backend.aclose()

    async def wait_disconnected(self) -> None:
        await self.sim.wait_idle(connections=True)


class TestLocalOpenAI(OverHttp):
    kind = "local_openai"
    path = "/v1"


class TestAnthropicApi(OverHttp):
    kind = "anthropic_api"
    options: ClassVar[dict[str, object]] = {"max_tokens": 100_000}


class TestGeminiApi(OverHttp):
    kind = "gemini_api"
    path = "/v1beta/openai"


class TestEcho(BackendConformance):
    answer_s: ClassVar[float] = PATIENCE_S

    @asynccontextmanager
    async def opened(self, scenario: Scenario) -> AsyncIterator[Backend]:
        backend = load_backend("model", ModelConfig(type="echo", options=echo_options(scenario)))
        try:
            yield backend
        finally:
            await backend.aclose()
