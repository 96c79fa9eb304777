"""A real worker process for tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from promptmill.heartbeat import read_beats
from promptmill.store import Store
from tests.support.processes import PATIENCE_S, wait_until


def pace(dead_after_s: float) -> str:
    """Lines of a configuration: how often workers beat, and after how long without it they are given up."""
    return f"heartbeat_s = 0.5\ndead_after_s = {dead_after_s}\n"


QUICK = pace(5.0)
"""For tests that wait until a worker counts as dead. Shorter, a live one looks dead on a busy machine."""
STEADY = pace(60.0)
"""For tests with several workers none of which dies: one that a busy machine stops for seconds is not given up."""


class WorkerProcess:
    """``python -m promptmill_workers`` with a configuration file; its output goes to ``log``."""

    def __init__(
        self, config: Path, name: str, log: Path, family: str = "api", env: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.log = log
        self._out = log.open("ab")
        command = [sys.executable, "-m", "promptmill_workers", "--name", name, "--family", family]
        self.process = subprocess.Popen(
            [*command, "--config", str(config)], stdout=self._out, stderr=self._out, env={**os.environ, **(env or {})}
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    async def ready(self, url: str) -> str:
        """Wait until it can claim; answers its worker id."""
        store = await Store.connect(url)
        found: list[str] = []

        async def beats() -> bool:
            assert self.process.poll() is None, f"the worker ended:\n{self.log.read_text()}"
            rows, now_ms = await read_beats(store)
            mine = (b for b in rows if b.worker.startswith(f"{self.name}@") and f"-{self.pid}-" in b.worker)
            found[:] = [b.worker for b in mine if b.state == "ready" and b.fresh(now_ms)]
            return bool(found)

        try:
            await wait_until(beats, f"worker {self.name} is ready", 1.5 * PATIENCE_S)
        finally:
            await store.aclose()
        return found[0]

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def stop(self) -> int:
        """TERM, then KILL where that takes too long; answers the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._out.close()
        return self.process.returncode


@contextmanager
def worker_process(
    config: Path, name: str = "worker", family: str = "api", env: Mapping[str, str] | None = None
) -> Generator[WorkerProcess]:
    """A worker that ends with the block. ``env`` comes on top of this process's environment."""
    worker = WorkerProcess(config, name, config.with_suffix(f".{name}.log"), family, env)
    try:
        yield worker
    finally:
        worker.stop()
