"""Control groups, version 2: one below our own for each program.

Where we may make them, and the kernel has ``cgroup.kill`` (Linux 5.14).
"""

from __future__ import annotations

import errno
import os
import signal
import time

from . import procfs

_PREFIX = "promptmill-"
_OLD_S = 60.0
"""A guard that just made one has not put its program into it yet."""


def _mounts() -> list[tuple[str, str]]:
    """(root within the hierarchy, mount point) of every mounted cgroup v2."""
    found: list[tuple[str, str]] = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:  # noqa: PTH123
        for line in lines:
            before, _, after = line.partition(" - ")
            if after.split(" ", 1)[0] == "cgroup2":
                fields = before.split(" ")
                # mountinfo writes space, tab, newline and backslash in octal
                found.append((_unescaped(fields[3]), _unescaped(fields[4])))
    return found


def _unescaped(text: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text


def own() -> str:
    """The directory of the control group of this process. Raises OSError where there is no version 2."""
    with open("/proc/self/cgroup", encoding="utf-8", errors="surrogateescape") as lines:  # noqa: PTH123
        path = next((line[3:].rstrip("\n") for line in lines if line.startswith("0::")), None)
    if path is None:
        raise OSError(errno.ENOENT, "no control group of version 2")
    for root, point in _mounts():
        if path == root or path.startswith(root.rstrip("/") + "/"):
            directory = point.rstrip("/") + path[len(root.rstrip("/")) :]
            if os.path.isdir(directory):  # noqa: PTH112
                return directory.rstrip("/")
    raise OSError(errno.ENOENT, "the control groups of version 2 are not mounted")


def path_of(token: str) -> str:
    """The directory for the run ``token``, made or not. Raises OSError as :func:`own` does."""
    return f"{own()}/{_PREFIX}{token}"


def make(token: str, memory_bytes: int | None) -> str:
    """Make one; answers its directory. Raises OSError where that, or to kill by it, is not permitted."""
    path = path_of(token)
    os.mkdir(path)  # noqa: PTH102
    try:
        _set_up(path, memory_bytes)
    except OSError:
        os.rmdir(path)  # noqa: PTH106
        raise
    return path


def _set_up(path: str, memory_bytes: int | None) -> None:
    if not os.access(f"{path}/cgroup.kill", os.W_OK):
        raise OSError(errno.ENOSYS, "this kernel has no cgroup.kill (Linux 5.14)")
    if memory_bytes is not None and os.path.exists(f"{path}/memory.max"):  # noqa: PTH110
        _write(f"{path}/memory.max", str(memory_bytes))


def enter(path: str) -> None:
    """Move this process there; what it forks is born there. Raises OSError."""
    _write(f"{path}/cgroup.procs", "0")


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def terminate(path: str) -> None:
    """TERM to everything in it, one after the other."""
    for directory, _, _ in os.walk(path):
        try:
            with open(f"{directory}/cgroup.procs", encoding="ascii") as lines:  # noqa: PTH123
                pids = [int(line) for line in lines]
        except OSError:
            continue  # removed meanwhile
        for pid in pids:
            started = procfs.start_time(pid)
            if started is not None:
                procfs.send((pid, started), signal.SIGTERM)
                procfs.send((pid, started), signal.SIGCONT)


def kill(path: str) -> None:
    """End everything in it and below it in one act of the kernel's: nothing can fork away."""
    try:
        _write(f"{path}/cgroup.kill", "1")
    except FileNotFoundError:
        return  # removed already


def empty(path: str) -> bool:
    """True once nothing is left in it or below it."""
    try:
        with open(f"{path}/cgroup.events", encoding="ascii") as lines:  # noqa: PTH123
            return "populated 0\n" in lines
    except OSError:
        return True


def remove(path: str) -> bool:
    """Remove it with those that the program made below it. False: it is still there, because something is in it."""
    for directory, _, _ in os.walk(path, topdown=False):
        try:
            os.rmdir(directory)  # noqa: PTH106
        except OSError:
            continue
    return not os.path.exists(path)  # noqa: PTH110


def remove_forgotten() -> None:
    """Remove the old ones with nothing in them, whose guards and wardens were killed before they could."""
    for path in of_job(""):
        try:
            if time.time() - os.stat(path).st_mtime > _OLD_S:  # noqa: PTH116
                os.rmdir(path)  # noqa: PTH106
        except OSError:
            continue  # in use, or removed meanwhile


def of_job(job: str) -> list[str]:
    """The directories of all runs of a job."""
    try:
        base = own()
        names = os.listdir(base)  # noqa: PTH208
    except OSError:
        return []
    return [f"{base}/{name}" for name in names if name.startswith(_PREFIX + job)]
