"""Ways to run a simulator beside synchronous code, and addresses where no provider answers."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.processes import PATIENCE_S
from tests.support.simulator.records import RequestRecord
from tests.support.simulator.script import Plan
from tests.support.simulator.server import Simulator

_ROOT = Path(__file__).resolve().parents[3]


class SimulatorHandle:
    """A simulator on another thread's event loop, for synchronous tests. Same meanings as `Simulator`'s."""

    def __init__(self, simulator: Simulator, loop: asyncio.AbstractEventLoop) -> None:
        self._simulator = simulator
        self._loop = loop
        self.url = simulator.url

    @property
    def requests(self) -> list[RequestRecord]:
        async def read() -> list[RequestRecord]:
            return self._simulator.requests

        return self._run(read())

    def plan(self, plan: Plan | None = None, **fields: Any) -> Plan:
        async def queue() -> Plan:
            return self._simulator.plan(plan, **fields)

        return self._run(queue())

    def reset(self) -> None:
        async def reset() -> None:
            self._simulator.reset()

        self._run(reset())

    def stats(self) -> dict[str, Any]:
        async def read() -> dict[str, Any]:
            return self._simulator.stats()

        return self._run(read())

    def wait_idle(self, *, timeout_s: float = PATIENCE_S, connections: bool = False) -> None:
        self._run(self._simulator.wait_idle(timeout_s=timeout_s, connections=connections))

    def wait_requests(self, count: int, *, timeout_s: float = PATIENCE_S) -> None:
        self._run(self._simulator.wait_requests(count, timeout_s=timeout_s))

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(2 * PATIENCE_S)


@contextmanager
def running_simulator(**options: Any) -> Iterator[SimulatorHandle]:
    """A simulator in a background thread (`options` as for `Simulator`); gone, with its loop, on exit."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="simulator", daemon=True)
    thread.start()
    try:
        simulator = Simulator(**options)
        asyncio.run_coroutine_threadsafe(simulator.start(), loop).result(PATIENCE_S)
        try:
            yield SimulatorHandle(simulator, loop)
        finally:
            asyncio.run_coroutine_threadsafe(simulator.stop(), loop).result(2 * PATIENCE_S)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@dataclass(frozen=True, slots=True)
class SpawnedSimulator:
    """A simulator process: its address and process id."""

    url: str
    pid: int


@contextmanager
def spawned_simulator(*, key: str | None = None) -> Iterator[SpawnedSimulator]:
    """A simulator in a process of its own, which dies with this one (its standard input ends)."""
    command = [sys.executable, "-m", "tests.support.simulator", "--port", "0", "--die-with-stdin"]
    if key is not None:
        command += ["--key", key]
    with subprocess.Popen(command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"the simulator exited with {process.wait(PATIENCE_S)}")
            yield SpawnedSimulator(json.loads(line)["url"], process.pid)
        finally:
            process.terminate()


@contextmanager
def refusing_url() -> Iterator[str]:
    """An address that refuses connections: a port that is bound, so nobody else gets it, but not listened on."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


@contextmanager
def unanswering_url() -> Iterator[str]:
    """An address where connecting neither succeeds nor fails: a listener whose queue is full (Linux drops the SYN)."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        fillers: list[socket.socket] = []
        try:
            for _ in range(16):
                filler = socket.socket()
                fillers.append(filler)
                filler.settimeout(0.2)
                try:
                    filler.connect(listener.getsockname())
                except TimeoutError:
                    break
            else:
                raise RuntimeError("the listener's queue does not fill up on this system")
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            for filler in fillers:
                filler.close()
