"""Watching processes from outside: which are alive, whose descendants they are, and waiting until they are gone."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable
from inspect import isawaitable
from typing import Final, TypeVar

import psutil

PATIENCE_S: Final = 60.0
"""How long a test waits for what must come: a machine that does other things may stop us for seconds."""
_PAUSE_S: Final = 0.02

T = TypeVar("T")


def alive(pid: int) -> bool:
    """True for a process that runs; a zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def tree(pid: int) -> set[int]:
    """``pid`` and all of its descendants."""
    process = psutil.Process(pid)
    return {pid, *(child.pid for child in process.children(recursive=True))}


def processes_of(tag: str) -> list[psutil.Process]:
    """Everything that runs with ``tag`` in its arguments: a program of the test and what it forked."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess):  # zombies too
            found += [process] if tag in process.cmdline() else []
    return found


def wait_gone(pids: Iterable[int], timeout_s: float = PATIENCE_S) -> None:
    """Until none of ``pids`` runs; fails with those that still do."""
    deadline = time.monotonic() + timeout_s
    left = set(pids)
    while left := {pid for pid in left if alive(pid)}:
        assert time.monotonic() < deadline, f"still alive after {timeout_s} s: {_command_lines(left)}"
        time.sleep(_PAUSE_S)


def _command_lines(pids: set[int]) -> dict[int, str]:
    found: dict[int, str] = {}
    for pid in pids:
        with contextlib.suppress(psutil.Error):  # it ended after all
            found[pid] = " ".join(psutil.Process(pid).cmdline())[:120]
    return found


def block_until(condition: Callable[[], T], description: str, timeout_s: float = PATIENCE_S) -> T:
    """What ``condition()`` answers as soon as that is true; fails with ``description``. For synchronous tests."""
    deadline = time.monotonic() + timeout_s
    while not (held := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {description}"
        time.sleep(_PAUSE_S)
    return held


async def wait_until(
    condition: Callable[[], bool | Awaitable[bool]], description: str, timeout_s: float = PATIENCE_S
) -> None:
    """Until ``condition()`` holds; fails with ``description``."""
    deadline = time.monotonic() + timeout_s
    while True:
        held = condition()
        if await held if isawaitable(held) else held:
            return
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {description}"
        await asyncio.sleep(_PAUSE_S)
