"""Watching processes from outside: which are alive, whose descendants they are, and waiting until they are gone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from inspect import isawaitable

import psutil


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


def wait_gone(pids: Iterable[int], timeout_s: float = 15) -> None:
    """Until none of ``pids`` runs; fails with those that still do."""
    deadline = time.monotonic() + timeout_s
    left = set(pids)
    while left := {pid for pid in left if alive(pid)}:
        if time.monotonic() > deadline:
            names = {pid: " ".join(psutil.Process(pid).cmdline())[:120] for pid in left}
            raise AssertionError(f"still alive after {timeout_s} s: {names}")
        time.sleep(0.02)


async def wait_until(condition: Callable[[], bool | Awaitable[bool]], description: str, timeout_s: float = 15) -> None:
    """Until ``condition()`` holds; fails with ``description``."""
    deadline = time.monotonic() + timeout_s
    while True:
        held = condition()
        if await held if isawaitable(held) else held:
            return
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {description}"
        await asyncio.sleep(0.02)
