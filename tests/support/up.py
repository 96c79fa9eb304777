"""The real `promptmill up`, as a process; and the command line, as a process."""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from promptmill.cli.app import run
from tests.support.processes import tree, wait_gone

PROMPTMILL = (sys.executable, "-m", "promptmill.cli.app")
READY_S = 90.0
ENDED_S = 90.0
"""How long one command may take on a machine that starts several at once."""


def environment(home: Path, **variables: str) -> dict[str, str]:
    """This process's environment with a home of its own and no configuration."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PROMPTMILL_")}
    return {**env, "HOME": str(home), "XDG_DATA_HOME": str(home / "share"), **variables}


def promptmill(
    *arguments: str, home: Path, stdin: str | bytes = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    """One command, to its end."""
    given = stdin.encode() if isinstance(stdin, str) else stdin
    done = subprocess.run(
        [*PROMPTMILL, *arguments],
        cwd=home,
        env=environment(home, **variables),
        input=given,
        capture_output=True,
        timeout=ENDED_S,
        check=False,
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def promptmill_here(*arguments: str, home: Path, stdin: str | bytes = "") -> subprocess.CompletedProcess[str]:
    """One command, to its end, as :func:`promptmill`, but in this process: starting Python would take most of its time.

    For what commands answer; how they start, end and take signals is seen from outside only.
    """
    given = io.TextIOWrapper(io.BytesIO(stdin.encode() if isinstance(stdin, str) else stdin), encoding="utf-8")
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    with (
        mock.patch.dict(os.environ, environment(home), clear=True),
        contextlib.chdir(home),
        mock.patch.object(sys, "stdin", given),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = run(list(arguments))
    said, complained = (stream.detach().getvalue().decode() for stream in (out, err))
    return subprocess.CompletedProcess(list(arguments), code, said, complained)


@dataclass
class Up:
    """A `promptmill up --json`. Always `close` it: it then has left no process behind, or the test fails."""

    home: Path
    arguments: Sequence[str] = ()
    prefix: Sequence[str] = ()
    variables: dict[str, str] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.data_dir = self.home / "data"
        self.err_path = self.home / f"up-{time.monotonic_ns()}.err"
        with self.err_path.open("wb") as err:
            self.process = subprocess.Popen(
                [
                    *(*self.prefix, *PROMPTMILL, "up", "--json", "--port", "0"),
                    *("--data-dir", str(self.data_dir), *self.arguments),
                ],
                cwd=self.home,
                env=environment(self.home, **self.variables),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=err,
                start_new_session=True,
            )

    def wait_ready(self) -> Up:
        """Until it says that it is ready."""
        assert self.process.stdout
        ready, _, _ = select.select([self.process.stdout], [], [], READY_S)
        assert ready, f"nothing within {READY_S} s\n{self.err}"
        line = self.process.stdout.readline()
        assert line, f"ended with {self.process.wait(ENDED_S)}\n{self.err}"
        self.about = json.loads(line)
        self.look()
        return self

    def look(self) -> None:
        """Remember every process that belongs to it now."""
        self.seen |= tree(self.process.pid) | set(self.about["pids"].values())

    @property
    def err(self) -> str:
        """All that it said on standard error."""
        return self.err_path.read_text()

    def pids(self) -> dict[str, int]:
        """The pids of the parts as `up.json` has them now; empty while it is not ready."""
        try:
            return json.loads((self.data_dir / "up.json").read_text())["pids"]
        except FileNotFoundError:
            return {}

    def run(self, *arguments: str, stdin: str | bytes = "") -> subprocess.CompletedProcess[str]:
        """A client command that finds this `up` by its data directory."""
        return promptmill(*arguments, "--data-dir", str(self.data_dir), home=self.home, stdin=stdin)

    def ask(self, *arguments: str, stdin: str | bytes = "") -> subprocess.CompletedProcess[str]:
        """As :meth:`run`, in this process."""
        return promptmill_here(*arguments, "--data-dir", str(self.data_dir), home=self.home, stdin=stdin)

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = ENDED_S) -> int:
        """Send a signal and wait for the end. Returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout_s)

    def close(self) -> None:
        """Whatever happened: end it, and see that nothing is left."""
        if self.process.poll() is None:
            if self.about:
                self.look()
            self.process.kill()
            self.process.wait(ENDED_S)
        assert self.process.stdout
        self.process.stdout.close()
        wait_gone(self.seen)
