"""A real gateway or relay process for tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import aiohttp

from tests.support.processes import wait_until

Module = Literal["promptmill_gateway", "promptmill_relay"]


class ServerProcess:
    """Serves on a socket that the test holds, so that its port stays its own. Its output goes to ``log``."""

    def __init__(self, module: Module, config: Path, env: Mapping[str, str] | None = None) -> None:
        self.log = config.with_suffix(f".{module}.log")
        self._out = self.log.open("ab")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        handed = {"PROMPTMILL_LISTEN_FD": str(self._listener.fileno()), **(env or {})}
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "--config", str(config)],
            stdout=self._out,
            stderr=self._out,
            env={**os.environ, **handed},
            pass_fds=[self._listener.fileno()],
        )

    async def ready(self) -> tuple[int, str]:
        """What ``/readyz`` says: the status and the body."""
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session,
            session.get(f"http://127.0.0.1:{self.port}/readyz") as answer,
        ):
            return answer.status, await answer.text()

    async def until_ready(self, status: int, *reasons: str) -> None:
        """Until ``/readyz`` answers ``status``, and its body names one of ``reasons``."""

        said: tuple[int, str] = (0, "")

        async def says() -> bool:
            nonlocal said
            assert self.process.poll() is None, f"the server ended:\n{self.log.read_text()}"
            said = await self.ready()
            return said[0] == status and (not reasons or any(reason in said[1] for reason in reasons))

        try:
            await wait_until(says, f"/readyz answers {status} {reasons}")
        except AssertionError as err:
            raise AssertionError(f"{err}; it says {said}") from err

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
        self._listener.close()
        self._out.close()
        return self.process.returncode


@contextmanager
def server_process(module: Module, config: Path, env: Mapping[str, str] | None = None) -> Generator[ServerProcess]:
    """A server that ends with the block."""
    server = ServerProcess(module, config, env)
    try:
        yield server
    finally:
        server.stop()
