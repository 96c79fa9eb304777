"""The chaos suite as it runs everywhere: a bounded run with a fixed seed, in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from ops.chaos.run import EXIT_BROKEN, LEDGER

from tests.support.processes import wait_gone, wait_until

REPOSITORY = Path(__file__).resolve().parents[2]
SEED = 1
RUN_S = 420.0
"""On a machine of its own it takes less than a minute; others may take most of this one."""
STOP_S = 90.0


@contextmanager
def chaos(directory: Path, *arguments: str) -> Generator[subprocess.Popen[str]]:
    """A run in a session of its own, which ends with the block, whatever happened."""
    command = [sys.executable, "-m", "ops.chaos", "--directory", str(directory), *arguments]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        left = members(process.pid)
        process.terminate()
        try:
            process.communicate(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        wait_gone(left)


def members(session: int) -> set[int]:
    """The processes of a session; a worker's own children may have one of theirs."""
    found: set[int] = set()
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == session:
                found |= {process.pid, *(child.pid for child in process.children(recursive=True))}
    return found


@pytest.mark.timeout(RUN_S + STOP_S + 30)
def test_kills_freezes_restarts_and_cuts_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    told = tmp_path / "figures.json"
    with chaos(tmp_path / "run", "--preset", "short", "--seed", str(SEED), "--json", str(told)) as process:
        said, _ = process.communicate(timeout=RUN_S)
    assert process.returncode == 0, said
    figures = json.loads(told.read_text())["figures"]
    # The run met what it was to meet, or it shows nothing.
    assert (figures["jobs"], figures["losses"], figures["doubles"]) == (150, 0, 0)
    assert figures["kills"] > 0
    assert figures["store kills"] == figures["relay restarts and kills"] == 1
    assert figures["network faults"] == 4
    assert figures["jobs run more than once"] > 0


@pytest.mark.timeout(STOP_S * 3)
async def test_a_run_that_is_told_to_stop_leaves_nothing_behind(tmp_path: Path) -> None:
    ledger = tmp_path / "run" / LEDGER
    with chaos(tmp_path / "run", "--preset", "short", "--seconds", "60") as process:
        await wait_until(
            lambda: ledger.exists() and b'"kind":"log"' in ledger.read_bytes(),
            "a job has ended",
            timeout_s=STOP_S,
        )
        running = members(process.pid)
        assert len(running) > 5
        process.terminate()
        said, _ = process.communicate(timeout=STOP_S)
        assert process.returncode == EXIT_BROKEN, said
        assert "interrupted" in said
        wait_gone(running)
