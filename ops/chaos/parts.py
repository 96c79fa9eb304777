"""The processes of a run, each started again when it ends, as a supervisor does."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Final

from ops.chaos.ledger import Ledger

REPOSITORY: Final = Path(__file__).resolve().parents[2]
EXIT_BROKEN: Final = 7
"""What a worker answers whose consumer ended; a supervisor starts it again."""
EXIT_STORE_AWAY: Final = 5
"""What a part answers that finds no store at its start; a supervisor starts it again."""
_AGAIN_S: Final = 0.2
_STOP_S: Final = 60.0


class Part:
    """One program that is started again whenever it ends, until :meth:`stop`.

    Its output is appended to ``log``. Every end goes to the ledger, with whether we caused it. ``lifeline`` is the
    reading end of a pipe of this process: the part dies with it, see :mod:`promptmill.lifeline`.
    """

    def __init__(
        self, name: str, command: Sequence[str], env: Mapping[str, str], log: Path, *, ledger: Ledger, lifeline: int
    ) -> None:
        self.name = name
        self.frozen = False
        self.starts = 0
        self.code: int | None = None
        """How it ended last."""
        self._command = command
        self._env = env
        self._log = log
        self._ledger = ledger
        self._lifeline = lifeline
        self._process: asyncio.subprocess.Process | None = None
        self._caused: set[int] = set()
        self._thawed: set[int] = set()
        self.excused: frozenset[int] = frozenset()
        """The exit codes with which a process may end that was frozen before."""
        self._stopping = False
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Of the running process; None between two."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    def start(self) -> None:
        """Begin to keep it running."""
        self._task = asyncio.create_task(self._keep(), name=self.name)

    async def _keep(self) -> None:
        with self._log.open("ab") as out:
            while not self._stopping:
                await self._once(out)
                if not self._stopping:
                    await asyncio.sleep(_AGAIN_S)

    async def _once(self, out: IO[bytes]) -> None:
        self.starts += 1
        process = await asyncio.create_subprocess_exec(
            *self._command,
            cwd=REPOSITORY,
            env={**os.environ, **self._env, "PROMPTMILL_LIFELINE_FD": str(self._lifeline)},
            pass_fds=[self._lifeline],
            stdin=asyncio.subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
        self._process = process
        if self._stopping:
            # Asked to stop while it was being started: nobody else would tell it.
            process.terminate()
        self.code = await process.wait()
        expected = process.pid in self._caused or self._stopping or self.code == EXIT_STORE_AWAY
        expected = expected or (process.pid in self._thawed and self.code in self.excused)
        self._ledger.write("exit", part=self.name, code=self.code, expected=expected, told=self._stopping)

    def send(self, number: signal.Signals) -> int | None:
        """Send a signal that may end it; answers the pid that got it, None where none runs."""
        pid = self.pid
        if pid is not None:
            self._caused.add(pid)
            os.kill(pid, number)
        return pid

    @property
    def doomed(self) -> bool:
        """It was sent such a signal, and its end has not been seen yet."""
        return self.pid in self._caused

    async def freeze(self, lasts_s: float) -> int | None:
        """Stop it and continue it ``lasts_s`` later; answers the pid that was met."""
        pid = self.pid
        if pid is None:
            return None
        os.kill(pid, signal.SIGSTOP)
        self._thawed.add(pid)
        self.frozen = True
        try:
            await asyncio.sleep(lasts_s)
        finally:
            self.frozen = False
            if self.pid == pid:
                os.kill(pid, signal.SIGCONT)
        return pid

    async def stop(self) -> int | None:
        """TERM, then KILL where that takes too long; answers the exit code of the last process."""
        self._stopping = True
        if self._task is None:
            return None
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)
        done, _ = await asyncio.wait({self._task}, timeout=_STOP_S)
        if not done and self.pid is not None:
            os.kill(self.pid, signal.SIGKILL)
        await self._task
        return self.code

    def said(self, length: int = 2000) -> str:
        """The end of its output."""
        return self._log.read_text(errors="replace")[-length:]


def module(name: str, *arguments: str) -> list[str]:
    """The command that runs one of our modules."""
    return [sys.executable, "-m", name, *arguments]


async def listening(port: int, part: Part, timeout_s: float = 60) -> None:
    """Until somebody listens on ``port``; fails with what the part said."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{part.name} does not listen on {port}: {part.said()}") from None
            await asyncio.sleep(0.05)
        else:
            writer.close()
            return
