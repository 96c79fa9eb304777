"""The supervisor with small programs in the place of workers and gateway."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator

import psutil
import pytest

from promptmill.settings import child_environment
from promptmill.up.part import PartDied, PartSpec
from promptmill.up.supervisor import Supervisor, restart_pause_s
from tests.support.processes import PATIENCE_S, alive, wait_gone, wait_until

SLEEP = "import time; time.sleep(600)"
WATCHES = """
import time
from promptmill.lifeline import watch_lifeline
watch_lifeline()
print("watching", flush=True)
time.sleep(600)
"""
DEAF = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("deaf", flush=True)
time.sleep(600)
"""
POLITE = """
import os, signal, sys, time
# Not print: the signal may come while "up" is still being flushed, and a buffer cannot be entered twice.
signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b"bye\\n"), sys.exit()))
print("up", flush=True)
time.sleep(600)
"""


class Said(list[str]):
    def __call__(self, line: str) -> None:
        self.append(line)

    def has(self, text: str) -> bool:
        return any(text in line for line in self)


@pytest.fixture
def said() -> Said:
    return Said()


@pytest.fixture
async def supervisor(said: Said) -> AsyncIterator[Supervisor]:
    async with Supervisor(said) as running:
        yield running
    for part in running.parts.values():
        assert not part.running


def python(name: str, code: str, **more: object) -> PartSpec:
    return PartSpec(name=name, command=(sys.executable, "-c", code), **more)  # type: ignore[arg-type]


async def test_a_part_that_dies_is_restarted_and_the_news_is_told(supervisor: Supervisor, said: Said) -> None:
    await supervisor.start(python("worker-1", SLEEP))
    supervisor.settled()
    first = supervisor.pids()["worker-1"]
    os.kill(first, signal.SIGKILL)
    await wait_until(lambda: supervisor.pids().get("worker-1", first) != first, "a new pid")
    told = f"worker-1 died (signal 9); restarted as pid {supervisor.pids()['worker-1']}"
    await wait_until(lambda: told in said, "it says so")


async def test_a_guarded_part_goes_by_its_programs_pid_and_is_restarted_too(supervisor: Supervisor, said: Said) -> None:
    await supervisor.start(PartSpec("redis", ("/bin/sleep", "600"), guarded=True))
    supervisor.settled()
    first = supervisor.pids()["redis"]
    assert psutil.Process(first).cmdline() == ["/bin/sleep", "600"]
    os.kill(first, signal.SIGKILL)
    await wait_until(lambda: supervisor.pids().get("redis", first) != first, "a new pid")
    await wait_until(lambda: said.has("redis died (signal 9); restarted as pid "), "it says so")


async def test_a_killed_guard_leaves_no_second_program_behind(supervisor: Supervisor) -> None:
    await supervisor.start(PartSpec("redis", ("/bin/sleep", "600"), guarded=True))
    supervisor.settled()
    first = supervisor.pids()["redis"]
    psutil.Process(first).parent().kill()  # type: ignore[union-attr]
    await wait_until(lambda: supervisor.pids().get("redis", first) != first, "a new pid")
    wait_gone([first])


async def test_a_death_before_all_is_ready_is_an_error_with_the_last_words(supervisor: Supervisor) -> None:
    await supervisor.start(python("gateway", "import sys; print('no such thing'); sys.exit(6)"))
    died = await asyncio.wait_for(supervisor.first_death(), PATIENCE_S)
    assert isinstance(died, PartDied)
    assert died.code == "part_died"
    assert died.tail == ["no such thing"]
    assert "gateway" in str(died)
    assert "exit code 6" in str(died)


async def test_a_part_that_cannot_be_started_at_all_is_an_error(supervisor: Supervisor) -> None:
    with pytest.raises(PartDied, match="No such file"):
        await supervisor.start(PartSpec("worker-1", ("/does/not/exist",)))


async def test_stop_ends_parts_in_their_order(said: Said) -> None:
    async with Supervisor(said) as supervisor:
        await supervisor.start(python("gateway", POLITE, stop_order=2))
        await supervisor.start(python("worker-1", POLITE, stop_order=1))
        await wait_until(lambda: {"gateway | up", "worker-1 | up"} <= set(said), "both are up")
    byes = [line for line in said if line.endswith("| bye")]
    assert byes == ["worker-1 | bye", "gateway | bye"]


async def test_a_part_that_ignores_term_is_killed_after_its_time(said: Said) -> None:
    async with Supervisor(said) as supervisor:
        await supervisor.start(python("worker-1", DEAF, stop_s=0.3))
        await wait_until(lambda: "worker-1 | deaf" in said, "it ignores TERM")
        pid = supervisor.pids()["worker-1"]
    assert not alive(pid)


async def test_hurry_kills_all_at_once(said: Said) -> None:
    async with Supervisor(said) as supervisor:
        for order, name in enumerate(("worker-1", "worker-2", "gateway")):
            await supervisor.start(python(name, DEAF, stop_s=600, stop_order=order))
        await wait_until(lambda: sum("deaf" in line for line in said) == 3, "all ignore TERM")
        pids = set(supervisor.pids().values())
        stopping = asyncio.create_task(supervisor.stop())
        await asyncio.sleep(0)
        supervisor.hurry.set()
        await asyncio.wait_for(stopping, PATIENCE_S)
    wait_gone(pids)


async def test_a_part_with_a_lifeline_dies_when_its_supervisor_is_gone(said: Said) -> None:
    supervisor = Supervisor(said)
    env = child_environment({}, lifeline_fd=supervisor.lifeline)
    await supervisor.start(python("worker-1", WATCHES, env=env))
    await wait_until(lambda: "worker-1 | watching" in said, "it watches")
    pid = supervisor.pids()["worker-1"]
    supervisor._close_lifeline()  # pyright: ignore[reportPrivateUsage] - what the kernel does when `up` dies
    wait_gone([pid])
    await supervisor.stop()


async def test_endless_lines_are_cut_and_a_held_pipe_is_not_waited_for(supervisor: Supervisor, said: Said) -> None:
    code = "import subprocess\nprint('x' * 100_000)\nprint('held', subprocess.Popen(['sleep', '600']).pid)"
    await supervisor.start(python("worker-1", code))
    await asyncio.wait_for(supervisor.first_death(), PATIENCE_S)
    assert max(map(len, said)) < 5_000
    (holder,) = [int(line.rpartition(" ")[2]) for line in said if "| held " in line]
    assert alive(holder)
    os.kill(holder, signal.SIGKILL)


def test_the_pause_before_a_restart_doubles_up_to_a_bound() -> None:
    assert [restart_pause_s(n) for n in range(9)] == [0, 0.5, 1, 2, 4, 8, 16, 30, 30]
    assert restart_pause_s(10_000) == 30


async def test_rapid_deaths_are_slowed_down(supervisor: Supervisor, said: Said) -> None:
    supervisor.settled()
    await supervisor.start(python("worker-1", "raise SystemExit(3)"))
    await wait_until(lambda: said.has("next start in 1 s"), "the second pause")
    assert said.has("worker-1 died (exit code 3); next start in 0.5 s")
