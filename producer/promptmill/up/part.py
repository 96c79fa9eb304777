"""One supervised process: how it is started, watched and ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT
from typing import IO, Final

from promptmill.errors import PromptmillError

_LINE_BYTES: Final = 4096
_TAIL_LINES: Final = 12
_KILL_WAIT_S: Final = 5.0
_DRAIN_S: Final = 0.5
_GUARD: Final = Path(__file__).with_name("guard.py")


@dataclass(frozen=True, slots=True)
class PartSpec:
    """What a part is. ``command`` is the program and its arguments, ``stdin`` what it reads there.

    A ``guarded`` part is a program that is not ours: it stands under a guard (:mod:`promptmill.up.guard`), and its pid
    is the program's own. Any other part inherits the lifeline and watches it itself. ``fds`` are inherited as they are.
    Parts of a lower ``stop_order`` are ended first, each with TERM and, after ``stop_s``, with KILL.
    """

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    stdin: bytes = b""
    fds: tuple[int, ...] = ()
    lock_fd: int = -1
    guarded: bool = False
    stop_order: int = 0
    stop_s: float = 5.0


class PartDied(PromptmillError):
    """The part ``name`` ended before everything was ready; ``tail`` holds the last lines that it wrote."""

    default_code = "part_died"

    def __init__(self, name: str, how: str, tail: list[str]) -> None:
        self.name = name
        self.tail = tail
        said = "".join(f"\n  {line}" for line in tail)
        super().__init__(f"{name} ended before it was ready ({how})" + (f"; it said:{said}" if said else ""))


def describe_status(status: int) -> str:
    """An exit status in words: ``signal 9`` or ``exit code 1``."""
    return f"signal {-status}" if status < 0 else f"exit code {status}"


def guard_interpreter() -> str:
    """The interpreter behind virtual environments and version managers' shims: those cost up to 100 ms a start."""
    base: str | None = getattr(sys, "_base_executable", None)
    return base or sys.executable


class Part:
    """A process of one :class:`PartSpec`. ``start`` may be called again once ``wait`` returned."""

    def __init__(self, spec: PartSpec, lifeline: int, tell: Callable[[str], None]) -> None:
        self.spec = spec
        self.pid = 0
        """Of the program itself; 0 while there is none."""
        self.tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self.started_at = 0.0
        self._lifeline = lifeline
        self._tell = tell
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = asyncio.Event()
        self._program_status: int | None = None
        self._gone = False
        self._readers: list[asyncio.Task[None]] = []
        self._pipes: list[asyncio.ReadTransport] = []

    async def start(self) -> None:
        """Start it and return once its pid is known. Raises OSError where it cannot be started."""
        spec = self.spec
        self.started_at = time.monotonic()
        self._program_status, self._gone = None, False
        command = spec.command
        if spec.guarded:
            command = (
                *(guard_interpreter(), "-I", "-S", str(_GUARD)),
                *(str(self._lifeline), str(spec.stop_s), str(spec.lock_fd), "--", *command),
            )
        fds = {self._lifeline, *spec.fds, *([spec.lock_fd] if spec.lock_fd >= 0 else [])}
        process = subprocess.Popen(  # noqa: ASYNC220, S603 - asyncio's own waits for the pipes' end too, see _await_end
            command,
            stdin=PIPE if spec.stdin else DEVNULL,
            stdout=PIPE,
            stderr=PIPE if spec.guarded else STDOUT,
            env=dict(spec.env) if spec.env else None,
            # A Ctrl-C at the terminal reaches `up` alone: it alone decides on the order in which parts end.
            start_new_session=True,
            pass_fds=tuple(sorted(fds)),
        )
        self._process = process
        self.pid = 0 if spec.guarded else process.pid
        self._ended.clear()
        self._await_end(process)
        if process.stdin:
            _feed(process.stdin, spec.stdin)
        output = process.stderr if spec.guarded else process.stdout
        self._readers = [asyncio.create_task(self._pass_on(await self._open(output)))]
        if spec.guarded:
            known = asyncio.Event()
            self._readers.append(asyncio.create_task(self._read_reports(await self._open(process.stdout), known)))
            await known.wait()

    def _await_end(self, process: subprocess.Popen[bytes]) -> None:
        """Set ``_ended`` when ``process`` ended, from a thread.

        Some versions of asyncio report an end only once all pipes are closed, which a grandchild can put off for ever.
        """
        loop, ended = asyncio.get_running_loop(), self._ended

        def wait() -> None:
            process.wait()
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
                loop.call_soon_threadsafe(ended.set)

        threading.Thread(target=wait, name=f"wait for {self.spec.name}", daemon=True).start()

    async def wait(self) -> int:
        """Until it is gone, and for a guarded part all of its program. Returns its status (negative: the signal)."""
        process = self._process
        if process is None:
            raise RuntimeError(f"{self.spec.name} was never started")
        await self._ended.wait()
        if self._readers:
            # A grandchild may hold the pipe open for ever: what it has to say is not waited for.
            _, late = await asyncio.wait(self._readers, timeout=_DRAIN_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*self._readers, return_exceptions=True)
            self._readers = []
        for pipe in self._pipes:
            pipe.close()
        self._pipes = []
        if self.spec.guarded and not self._gone and self.pid:
            # The guard itself was killed. Where the kernel did not end the program with it, we do.
            _signal_group(self.pid, signal.SIGKILL)
        self.pid = 0
        return process.returncode if self._program_status is None else self._program_status

    @property
    def running(self) -> bool:
        """True between a start and the process's end."""
        return self._process is not None and not self._ended.is_set()

    def terminate(self) -> None:
        """Ask it to end."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it now."""
        if self.spec.guarded:
            # The guard kills the program, and sees that nothing of it is left.
            self._signal(signal.SIGINT)
        elif self._process is not None and self.running:
            _signal_group(self._process.pid, signal.SIGKILL)

    async def end(self, hurry: asyncio.Event) -> None:
        """End it: TERM, at most ``stop_s`` (cut short by ``hurry``), KILL, and a bounded wait."""
        if not self.running:
            return
        if not hurry.is_set():
            self.terminate()
            waiters = [asyncio.create_task(self._ended.wait()), asyncio.create_task(hurry.wait())]
            # A guard needs a moment of its own after the program's grace.
            limit_s = self.spec.stop_s + (1.0 if self.spec.guarded else 0.0)
            await asyncio.wait(waiters, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            for waiter in waiters:
                waiter.cancel()
        if self.running:
            self.kill()
            try:
                async with asyncio.timeout(_KILL_WAIT_S):
                    await self._ended.wait()
            except TimeoutError:
                self._tell(f"{self.spec.name} does not end; the kernel holds it")

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self.running:
            self._process.send_signal(number)

    async def _open(self, pipe: IO[bytes] | None) -> asyncio.StreamReader:
        if pipe is None:
            raise RuntimeError(f"{self.spec.name} was started without this pipe")
        reader = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
        self._pipes.append(transport)
        return reader

    async def _read_reports(self, reports: asyncio.StreamReader, known: asyncio.Event) -> None:
        try:
            while line := await reports.readline():
                word, _, number = line.decode("ascii", "replace").strip().partition(" ")
                if word == "pid":
                    self.pid = int(number)
                    known.set()
                elif word == "exit":
                    self._program_status = int(number)
                elif word == "gone":
                    self._gone = True
        finally:
            known.set()

    async def _pass_on(self, output: asyncio.StreamReader) -> None:
        """Every line with the part's name before it; a line without an end is cut, so nothing grows without bound."""
        rest = b""
        while piece := await output.read(65536):
            *lines, rest = (rest + piece).split(b"\n")
            while len(rest) > _LINE_BYTES:
                lines.append(rest[:_LINE_BYTES])
                rest = rest[_LINE_BYTES:]
            for line in lines:
                self._say(line)
        if rest:
            self._say(rest)

    def _say(self, line: bytes) -> None:
        text = line[:_LINE_BYTES].decode("utf-8", "replace").rstrip()
        if text:
            self.tail.append(text)
            # A line of JSON says whose it is, and must stay one.
            self._tell(text if text.startswith("{") else f"{self.spec.name} | {text}")


def _signal_group(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return  # gone already; macOS says "not permitted" of a group of zombies


def _feed(stdin: IO[bytes], data: bytes) -> None:
    try:
        stdin.write(data)  # far less than a pipe holds: this cannot block
        stdin.close()
    except BrokenPipeError:
        return  # it ended at once; `wait` says how
