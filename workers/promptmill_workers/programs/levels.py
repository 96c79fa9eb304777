"""How firmly programs are held: the levels, which of them this machine permits, and which one is used.

At every level on Linux nothing is left when a program is ended, and when worker, warden or guard is killed with
SIGKILL, or worker and guard, or warden and guard. What differs is the rest:

=============  ===================================================================================================
``pidns``      Linux, where PID namespaces may be made (root, or unprivileged user namespaces) and a ``/proc`` mounted
               in them. The kernel ends all with the namespace's init, and that with its guard. Worker, warden and
               guard can be killed at once.
``cgroup``     Linux 5.14, a writable control group of version 2. The kernel ends all in one act, asked by the guard
               or, if that was killed, by its warden. Killed all three at once: the leader ends with its guard, the
               rest when the next worker of this user starts. ``memory_bytes`` bounds all processes together, where
               the memory controller is enabled for the group.
``subreaper``  Linux. The guard stops and kills what it finds until it has no child left; if it was killed, its warden
               does. Killed all three at once: the leader ends with its guard, the rest as far as it has kept its
               environment when the next worker starts. A program that forks faster than it is found, for ever, is
               killed as often as it can be in 5 s.
``group``      Elsewhere (macOS). The program's process group is killed. What makes a session or a group of its own
               is not found, nor is anything when worker and guard are killed at once.
=============  ===================================================================================================

None is a wall against a program that attacks: it runs as the worker's user. Below ``pidns`` it can signal its guard,
its warden and its worker.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Final
from weakref import WeakKeyDictionary

from promptmill.errors import BackendError, ConfigError
from promptmill.up.part import guard_interpreter
from promptmill_workers.programs.environment import jobs_root
from promptmill_workers.programs.guarding import places
from promptmill_workers.programs.guarding.warden import JOB_LETTERS
from promptmill_workers.programs.link import warden
from promptmill_workers.programs.running import Order, Running

LEVELS: Final = ("pidns", "cgroup", "subreaper", "group")
"""Best first."""

_PROBE_RUN_S: Final = 10.0
_SHELL: Final = ("/bin/sh", "-c", ":")


class _Choice:
    """The process's: ``forced`` by its configuration, ``best`` once it was tried out."""

    def __init__(self) -> None:
        self.forced: str | None = None
        self.best: str | None = None
        self.probes: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Task[str]] = WeakKeyDictionary()


_choice = _Choice()


def configure(level: str) -> None:
    """Use ``level`` for all programs of this process from now on; ``auto`` is the best that the machine permits.

    Raises
    ------
    ConfigError
        There is no such level.
    """
    if level not in {"auto", *LEVELS}:
        raise ConfigError(f"level: {level!r} is none of auto, {', '.join(LEVELS)}", field="level")
    _choice.forced = None if level == "auto" else level


async def prepare() -> str:
    """Start the warden and settle on the level, so that the first job need not wait for it; answers the level.

    Also ends and removes what workers of this user that were killed have left behind.

    Raises
    ------
    ConfigError
        The configured level is not permitted here (the message says why), or there is no place for directories.
    """
    warden(jobs_root())
    level = await current_level()
    if _choice.forced is not None and (reason := await probe(level)) != "ok":
        raise ConfigError(f"level: {level!r} is not permitted here: {reason}", field="level")
    return level


async def current_level() -> str:
    """The configured level, else the best one."""
    return _choice.forced or await best_level()


async def best_level() -> str:
    """The best level that the machine permits, tried out once a process.

    Raises
    ------
    BackendError
        ``crashed``: not even the lowest works, so no program can be started.
    """
    if _choice.best is None:
        loop = asyncio.get_running_loop()
        if loop not in _choice.probes:
            _choice.probes[loop] = loop.create_task(_first_permitted())
            # It holds the loop, which would else never go; and what failed once is tried again.
            _choice.probes[loop].add_done_callback(lambda _: _choice.probes.pop(loop, None))
        best = await asyncio.shield(_choice.probes[loop])
        _choice.best = best
        return best
    return _choice.best


async def _first_permitted() -> str:
    tried: dict[str, str] = {}
    for level in LEVELS:
        tried[level] = await probe(level)
        if tried[level] == "ok":
            return level
    raise BackendError(f"no program can be started: {tried}", code="crashed")


async def probe_all() -> dict[str, str]:
    """For each level ``ok``, or why it is not permitted here."""
    return {level: await probe(level) for level in LEVELS}


async def probe(level: str) -> str:
    """Run a trivial program at ``level``; answers ``ok``, or why that is not permitted here."""
    if level != "group" and not sys.platform.startswith("linux"):
        return "needs Linux"
    root, job = jobs_root(), os.urandom(JOB_LETTERS // 2).hex()
    lock_fd = places.make(root, job)
    try:
        return await _run_nothing(level, root, f"{root}/{job}", lock_fd)
    finally:
        places.remove(f"{root}/{job}")
        os.close(lock_fd)


async def _run_nothing(level: str, root: str, directory: str, lock_fd: int) -> str:
    order = Order(
        name="a probe",
        # Some containers have no shell; the interpreter takes ten times as long, but is there.
        command=_SHELL if os.access(_SHELL[0], os.X_OK) else (guard_interpreter(), "-I", "-S", "-c", "pass"),
        environment={},
        level=level,
        root=root,
        directory=directory,
        work=directory,
        lock_fd=lock_fd,
        grace_s=0.0,
        run_s=_PROBE_RUN_S,
        memory_bytes=None,
        open_files=64,
    )
    running = Running(order, b"", {})
    try:
        await running.start()
        await running.exited.wait()
    except BackendError as err:
        return err.message.partition(": ")[2].removeprefix(f"{level}: ")
    finally:
        await running.close()
    return "ok" if running.status == 0 else f"a program ended with {running.status} at once"
