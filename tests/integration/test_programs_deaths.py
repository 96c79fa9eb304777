"""``kill -9`` of whatever stands between a program and its job: nothing is left running, and no directory.

The worker is a process of its own (``tests/support/hostile.py``), with one program that a plain kill of its process
group would not reach.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from promptmill_workers.programs import ProgramLimits, open_sandbox, prepare
from promptmill_workers.programs.environment import jobs_root
from promptmill_workers.programs.link import warden
from tests.support.hostile import command
from tests.support.processes import PATIENCE_S, block_until, processes_of, wait_gone, wait_until

LIMITS = ProgramLimits(grace_s=0.2)

ROLES = ("pm-warden", "pm-guard", "pm-init")


@dataclass
class Worker:
    """A worker process in whose job a program runs, and the processes between the two, by their roles."""

    process: subprocess.Popen[bytes]
    root: Path
    pids: dict[str, int]
    tag: str

    def kill(self, *roles: str) -> None:
        """All at once, as far as one process can: stopped first, so that none acts on the death of another."""
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for role in roles:
                with contextlib.suppress(ProcessLookupError):  # the kernel ends an init with its guard
                    os.kill(self.pids[role], number)

    def everything(self) -> set[int]:
        return {*self.pids.values(), *(process.pid for process in processes_of(self.tag))}

    def directories(self) -> list[Path]:
        return [path for base in self.root.iterdir() for path in base.iterdir()]


Start = Callable[..., Worker]


def pids_below(pid: int) -> dict[str, int]:
    """Name -> pid of the descendants of ``pid``."""
    found: dict[str, int] = {}
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # the first of two forks, on its way out
            found[process.name()] = process.pid
    return found


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    workers: list[Worker] = []

    def start(level: str, *what: str) -> Worker:
        tag = f"hostile-{os.urandom(16).hex()}"
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.hostile", "worker", tag, level, *what],
            stdout=subprocess.PIPE,
            env={**os.environ, "TMPDIR": str(tmp_path)},
        )
        assert process.stdout
        worker = Worker(process, tmp_path, {"worker": process.pid}, tag)
        workers.append(worker)
        assert process.stdout.readline() == b"running\n"
        worker.pids |= {role: pid for role, pid in pids_below(process.pid).items() if role in ROLES}
        assert ("pm-init" in worker.pids) == (level == "pidns")
        return worker

    yield start
    for worker in workers:
        worker.process.kill()
        worker.process.wait(PATIENCE_S)
        assert worker.process.stdout
        worker.process.stdout.close()
        for process in processes_of(worker.tag):
            with contextlib.suppress(psutil.NoSuchProcess):  # it was on its way out
                process.kill()


def escape_of(level: str) -> str:
    """What the level promises to end: at ``group``, what stays in the group."""
    return "ignore_term" if level == "group" else "double_fork"


KILLED = [
    ("worker",),
    ("pm-guard",),
    ("pm-init",),
    ("pm-warden", "worker"),
    ("worker", "pm-guard"),
    ("pm-guard", "pm-warden"),
    ("worker", "pm-guard", "pm-init"),
]


@pytest.mark.parametrize("killed", KILLED, ids="+".join)
def test_nothing_is_left_when_they_are_killed(start: Start, level: str, killed: tuple[str, ...]) -> None:
    if "pm-init" in killed and level != "pidns":
        pytest.skip("only a PID namespace has an init")
    if level == "group" and "pm-guard" in killed:
        pytest.skip("the level group does not promise it: nobody else knows the group")
    worker = start(level, escape_of(level))
    everything = worker.everything()
    assert len(everything) >= 4
    worker.kill(*killed)
    if "worker" not in killed:
        # The job learns that its program died, and the worker ends by itself, in order.
        assert worker.process.wait(PATIENCE_S) == 0
    wait_gone(everything)
    assert processes_of(worker.tag) == []
    wait_no_directories(worker)


def wait_no_directories(worker: Worker) -> None:
    block_until(lambda: not worker.directories(), "its directories are gone")


def test_a_program_goes_on_when_its_warden_is_killed_and_the_next_has_another(start: Start, level: str) -> None:
    worker = start(level, "ignore_term")
    program = worker.everything() - {worker.pids["pm-warden"]}
    worker.kill("pm-warden")
    wait_gone([worker.pids["pm-warden"]])
    assert all(psutil.pid_exists(pid) for pid in program)
    worker.kill("worker")
    wait_gone(program)
    wait_no_directories(worker)


def test_all_three_killed_at_once_leave_what_the_level_says_until_the_next_start(start: Start, level: str) -> None:
    if level == "group":
        pytest.skip("the level group does not promise it")
    worker = start(level, "double_fork")
    everything = worker.everything()
    worker.kill("worker", "pm-warden", "pm-guard")
    worker.process.wait(PATIENCE_S)
    if level == "pidns":
        wait_gone(everything)
    # The next worker of the same user ends and removes the rest as it starts.
    follower = start("subreaper", "polite")
    wait_gone(everything)
    assert processes_of(worker.tag) == []
    block_until(lambda: len(worker.directories()) <= 1, "the dead worker's directory is gone")
    assert psutil.pid_exists(follower.process.pid), "the sweep is for the dead alone"
    assert len(processes_of(follower.tag)) == 2


def test_a_guard_that_its_program_stopped_is_killed_by_the_warden_of_a_dead_worker(start: Start) -> None:
    worker = start("subreaper", "stop_guard")
    everything = worker.everything()
    worker.kill("worker")
    wait_gone(everything)
    wait_no_directories(worker)


async def test_a_guard_that_its_program_stopped_is_killed_in_a_bounded_time() -> None:
    tag = f"hostile-{os.urandom(16).hex()}"
    async with open_sandbox("hostile") as box:
        async with box.run(command(tag, "stop_guard"), environment={}, limits=LIMITS, level="subreaper") as program:
            assert await anext(program.lines()) == b"ready"
            started = time.monotonic()
        assert time.monotonic() - started < PATIENCE_S, "not the five minutes for which it sleeps"
    assert processes_of(tag) == []


async def test_sigterm_to_a_guard_ends_its_program_with_its_grace(level: str) -> None:
    tag = f"hostile-{os.urandom(16).hex()}"
    await prepare()
    limits = ProgramLimits(grace_s=PATIENCE_S)
    async with (
        open_sandbox("hostile") as box,
        box.run(command(tag, "polite"), environment={}, limits=limits, level=level) as program,
    ):
        lines = program.lines()
        assert await anext(lines) == b"ready"
        os.kill(pids_below(os.getpid())["pm-guard"], signal.SIGTERM)
        assert [line async for line in lines] == []
        assert program.status == -signal.SIGTERM


async def test_programs_start_again_after_the_warden_was_killed(level: str) -> None:
    first = await kill_warden()
    async with (
        open_sandbox("sh") as box,
        box.run(["/bin/sh", "-c", "echo again"], environment={}, level=level) as program,
    ):
        assert [line async for line in program.lines()] == [b"again"]
    assert warden(jobs_root()).pid not in {0, first}


async def kill_warden() -> int:
    """Kill this process's warden; answers its pid."""
    await prepare()
    link = warden(jobs_root())
    os.kill(link.pid, signal.SIGKILL)
    await wait_until(lambda: link.dead, "the warden's end is seen")
    return link.pid


async def test_a_process_with_a_thousand_threads_starts_programs_without_stopping_its_loop() -> None:
    tag = f"hostile-{os.urandom(16).hex()}"
    release, gaps, last = threading.Event(), [0.0], time.monotonic()
    threads = [threading.Thread(target=release.wait) for _ in range(1000)]

    async def watch() -> None:
        nonlocal last
        while True:
            await asyncio.sleep(0.005)
            gaps.append(time.monotonic() - last)
            last = time.monotonic()

    try:
        for thread in threads:
            thread.start()
        last = time.monotonic()
        watching = asyncio.create_task(watch())
        await kill_warden()  # so that one is started here
        for _ in range(3):
            async with (
                open_sandbox("hostile") as box,
                box.run(command(tag, "polite"), environment={}, limits=LIMITS) as program,
            ):
                assert await anext(program.lines()) == b"ready"
                # No thread a program, and of the pool a few for the directories.
                assert threading.active_count() < 1000 + 20
        watching.cancel()
    finally:
        release.set()
        for thread in threads:
            thread.join()
    # A loop that waits for a start stands still for as long as that takes; a busy machine alone, for much less.
    assert max(gaps) < 5


def test_a_fork_of_the_worker_neither_keeps_its_warden_nor_uses_it(level: str) -> None:
    """A process that inherited the socket would keep the warden from seeing the worker's end."""
    code = f"""
import asyncio, os, sys
from promptmill_workers.programs import configure, open_sandbox, prepare
from promptmill_workers.programs.environment import jobs_root
from promptmill_workers.programs.link import warden
async def run():
    async with open_sandbox("sh") as box, box.run(["/bin/sh", "-c", "echo child"], environment={{}}) as program:
        print([line async for line in program.lines()], flush=True)
configure({level!r})
asyncio.run(prepare())
print(warden(jobs_root()).pid, flush=True)
if os.fork() == 0:
    asyncio.run(run())
    sys.stdin.read()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE)
    assert process.stdout
    assert process.stdin
    with process.stdout, process.stdin:
        first = int(process.stdout.readline())
        assert process.stdout.readline() == b"[b'child']\n"
        assert process.wait(PATIENCE_S) == 0
        # The fork still runs.
        wait_gone([first])
        process.stdin.close()
        assert process.stdout.read() == b""
