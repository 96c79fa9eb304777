"""The public conformance suite over the backends that run programs: the real ones, against the provider simulator."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import ClassVar

import pytest

from promptmill.settings import ModelConfig
from promptmill_workers.backends import load_backend
from promptmill_workers.backends.base import Backend, Call, Item
from promptmill_workers.testing import BackendConformance, Scenario
from tests.support.processes import PATIENCE_S
from tests.support.programs import ProgramSimulator, descendants, real_program, wait_for_none
from tests.support.simulator import Plan, stream

pytestmark = pytest.mark.xdist_group("programs")


class Provided:
    """A provider that goes wrong at the first ``times`` attempts (None: at all), a few calls at a time.

    The simulator could only count requests, and programs do not send theirs in the order in which they were started.
    Each program takes up to 400 MB: thirty at once are more than a small machine has.
    """

    def __init__(self, wrong: Backend, right: Backend, times: int | None) -> None:
        self._wrong, self._right, self._times = wrong, right, times
        self._few = asyncio.Semaphore(6)

    async def complete(self, call: Call) -> AsyncGenerator[Item, None]:
        wrong = self._times is None or call.attempt <= self._times
        async with self._few, aclosing((self._wrong if wrong else self._right).complete(call)) as items:
            async for item in items:
                yield item

    async def aclose(self) -> None:
        await self._wrong.aclose()
        await self._right.aclose()


class OfProgram(BackendConformance):
    answer_s: ClassVar[float] = PATIENCE_S
    kind: ClassVar[str]
    name: ClassVar[str]
    sim: ProgramSimulator
    before: set[int]

    @pytest.fixture(autouse=True)
    async def _provider(self, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
        monkeypatch.setenv("SIMULATOR_KEY", "planted-key")
        self.before = {process.pid for process in descendants()}
        async with ProgramSimulator(key="planted-key") as self.sim:
            yield

    @asynccontextmanager
    async def opened(self, scenario: Scenario) -> AsyncIterator[Backend]:
        self.sim.default = Plan(
            chunks=scenario.pieces,
            echo=scenario.pieces is None,
            chars=4000 if scenario.pieces is None else None,
            # What arrives in one packet with the connection's end is not passed on by the claude program.
            rate=20 if scenario.fault == "cut" else 0,
        )
        fault = f"sim:fault={scenario.fault}" if scenario.fault else "sim"
        if scenario.fault in {"cut", "stall"}:
            fault += f",after={scenario.after}"
        backends = Provided(self._made(fault), self._made("sim"), scenario.times)
        try:
            yield backends
        finally:
            await backends.aclose()

    def _made(self, model: str) -> Backend:
        options = {"program": real_program(self.name)}
        config = ModelConfig(
            type=self.kind, model_name=model, api_url=self.sim.url, api_key_env="SIMULATOR_KEY", options=options
        )
        return load_backend("model", config)

    async def wait_disconnected(self) -> None:
        await wait_for_none(self.before)
        await self.sim.wait_idle(connections=True)


class TestClaudeCli(OfProgram):
    kind = "claude_cli"
    name = "claude"


class TestGeminiCli(OfProgram):
    kind = "gemini_cli"
    name = "gemini"

    @pytest.fixture(autouse=True)
    def _escapes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # Protobuf's JSON escapes U+2028 and U+2029. The program relies on it: it takes them for line ends (a `.` in a
        # JavaScript regular expression) and calls an event that holds one incomplete.
        monkeypatch.setattr(stream, "dumps", lambda value: json.dumps(value).encode())
