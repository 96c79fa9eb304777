"""The guard as a process: whatever dies, whichever way, its program does not stay."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from promptmill.up import guard as guard_module
from promptmill.up.part import guard_interpreter
from tests.support.processes import PATIENCE_S, alive, wait_gone, wait_until

DEAF = """
import signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.stderr.write("deaf\\n")
time.sleep(600)
"""


@dataclass
class Guarded:
    process: subprocess.Popen[bytes]
    lifeline_end: int
    program: int = 0

    def report(self, timeout_s: float = PATIENCE_S) -> str:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], timeout_s)
        assert ready, "the guard reports nothing"
        return self.process.stdout.readline().decode().strip()

    def heard(self, timeout_s: float = PATIENCE_S) -> str:
        assert self.process.stderr is not None
        ready, _, _ = select.select([self.process.stderr], [], [], timeout_s)
        assert ready, "the program says nothing"
        return self.process.stderr.readline().decode().strip()

    def cut_lifeline(self) -> None:
        os.close(self.lifeline_end)
        self.lifeline_end = -1


class Starter:
    def __init__(self) -> None:
        self.started: list[Guarded] = []

    def __call__(self, *command: str, grace_s: float = PATIENCE_S, stdin: bytes = b"", lock_fd: int = -1) -> Guarded:
        lifeline, end = os.pipe()
        process = subprocess.Popen(
            [
                *(guard_interpreter(), "-I", "-S", guard_module.__file__),
                *(str(lifeline), str(grace_s), str(lock_fd), "--", *command),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
            pass_fds=[lifeline, *([lock_fd] if lock_fd >= 0 else [])],
        )
        os.close(lifeline)
        assert process.stdin
        process.stdin.write(stdin)
        process.stdin.close()
        guarded = Guarded(process, end)
        self.started.append(guarded)
        word, _, number = guarded.report().partition(" ")
        assert word == "pid"
        guarded.program = int(number)
        return guarded

    def close(self) -> None:
        for guarded in self.started:
            if guarded.lifeline_end >= 0:
                guarded.cut_lifeline()
            if guarded.process.poll() is None:
                guarded.process.send_signal(signal.SIGINT)
            guarded.process.wait(PATIENCE_S)
            for pipe in (guarded.process.stdout, guarded.process.stderr):
                assert pipe
                pipe.close()
            wait_gone([guarded.program])


@pytest.fixture
def guard() -> Iterator[Starter]:
    starter = Starter()
    yield starter
    starter.close()


def test_the_program_is_ended_when_the_lifeline_ends(guard: Starter) -> None:
    guarded = guard("/bin/sleep", "600")
    guarded.cut_lifeline()
    assert guarded.report() == f"exit {-signal.SIGTERM}"
    assert guarded.report() == "gone"
    assert not alive(guarded.program)
    assert guarded.process.wait(PATIENCE_S) == 128 + signal.SIGTERM


def test_a_program_that_ignores_term_is_killed_after_the_grace(guard: Starter) -> None:
    guarded = guard(sys.executable, "-c", DEAF, grace_s=0.3)
    assert guarded.heard() == "deaf"
    started = time.monotonic()
    guarded.process.terminate()
    assert guarded.report() == f"exit {-signal.SIGKILL}"
    assert time.monotonic() - started > 0.25, "it had its grace"


def test_an_interrupt_kills_without_the_grace(guard: Starter) -> None:
    guarded = guard(sys.executable, "-c", DEAF, grace_s=600)
    assert guarded.heard() == "deaf"
    guarded.process.terminate()
    guarded.process.send_signal(signal.SIGINT)
    assert guarded.report() == f"exit {-signal.SIGKILL}"


def test_the_programs_own_end_is_reported_with_its_status(guard: Starter) -> None:
    guarded = guard("/bin/sh", "-c", "exit 7")
    assert guarded.report() == "exit 7"
    assert guarded.report() == "gone"
    assert guarded.process.wait(PATIENCE_S) == 7


def test_children_that_the_program_leaves_in_its_group_are_killed(guard: Starter) -> None:
    guarded = guard("/bin/sh", "-c", "sleep 600 >/dev/null 2>&1 & echo $!")
    child = int(guarded.heard())
    assert guarded.report() == "exit 0"
    assert guarded.report() == "gone"
    assert not alive(child)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG is Linux's")
def test_the_program_dies_with_a_guard_that_is_killed(guard: Starter) -> None:
    guarded = guard("/bin/sleep", "600")
    guarded.process.kill()
    wait_gone([guarded.program])


def test_the_program_reads_the_guards_standard_input(guard: Starter) -> None:
    assert guard("/bin/cat", stdin=b"requirepass secret\n").heard() == "requirepass secret"


def test_a_program_that_cannot_be_started_is_said_with_its_reason(guard: Starter) -> None:
    guarded = guard("/does/not/exist")
    assert guarded.heard() == "cannot start /does/not/exist: No such file or directory"
    assert guarded.report() == "exit 127"


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="reads /proc")
async def test_the_program_inherits_nothing_but_its_streams_and_the_lock(guard: Starter, tmp_path: Path) -> None:
    lock = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    stray = os.open(os.devnull, os.O_RDONLY)
    os.set_inheritable(stray, True)
    try:
        held = Path(f"/proc/{guard('/bin/sleep', '600', lock_fd=lock).program}/fd")
        # While it starts, the dynamic linker has its libraries open.
        await wait_until(lambda: {int(fd.name) for fd in held.iterdir()} == {0, 1, 2, lock}, "it has no other files")
    finally:
        os.close(lock)
        os.close(stray)


def test_a_guard_is_small_and_quick(guard: Starter) -> None:
    used_s: list[float] = []
    for _ in range(5):
        process = psutil.Process(guard("/bin/sleep", "600").process.pid)
        assert process.memory_info().rss < 15 * 1024 * 1024
        # Processor time: it does not grow with what else runs here. About 20 ms.
        used_s.append(process.cpu_times().user + process.cpu_times().system)
    assert min(used_s) < 0.1
