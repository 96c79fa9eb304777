"""The public conformance suite over the backends that run programs: the real ones, against the provider simulator."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import ClassVar

import pytest

from promptmill.settings import ModelConfig
from promptmill_workers.backends import load_backend
from promptmill_workers.backends.base import Backend
from promptmill_workers.testing import BackendConformance, Scenario
from tests.support.programs import ProgramSimulator, descendants, real_program, wait_for_none
from tests.support.simulator import Plan, stream


class OfProgram(BackendConformance):
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
            fault=scenario.fault,
            after=scenario.after if scenario.fault in {"cut", "stall"} else None,
            times=scenario.times,
            # What arrives in one packet with the connection's end is not passed on by the claude program.
            rate=20 if scenario.fault == "cut" else 0,
        )
        config = ModelConfig(
            type=self.kind,
            model_name="sim",
            api_url=self.sim.url,
            api_key_env="SIMULATOR_KEY",
            options={"program": real_program(self.name)},
        )
        backend = load_backend("model", config)
        try:
            yield backend
        finally:
            await backend.aclose()

    async def wait_disconnected(self) -> None:
        await wait_for_none(self.before, timeout_s=2)
        await self.sim.wait_idle(timeout_s=2, connections=True)


@pytest.mark.xdist_group("claude")
class TestClaudeCli(OfProgram):
    kind = "claude_cli"
    name = "claude"


@pytest.mark.xdist_group("gemini")
class TestGeminiCli(OfProgram):
    kind = "gemini_cli"
    name = "gemini"

    @pytest.fixture(autouse=True)
    def _escapes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # Protobuf's JSON escapes U+2028 and U+2029. The program relies on it: it takes them for line ends (a `.` in a
        # JavaScript regular expression) and calls an event that holds one incomplete.
        monkeypatch.setattr(stream, "dumps", lambda value: json.dumps(value).encode())
