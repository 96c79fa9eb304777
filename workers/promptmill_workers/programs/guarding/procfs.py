"""What runs: processes found in ``/proc``, and signals that reach the process that was meant.

A process is a pair (pid, start time in ticks): a pid alone may belong to another process by the time it is used.
Every listing here is out of date when it returns, since processes fork while it is made. Callers repeat, and trust
only the kernel's own word that no child is left.
"""

from __future__ import annotations

import os
import signal

MARK = b"PROMPTMILL_GUARD="
"""The environment variable, with its ``=``, that names the run a process belongs to."""

_STATE, _PARENT, _START = 0, 1, 19


def _fields(pid: int) -> list[bytes] | None:
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY)
        try:
            text = os.read(fd, 1024)
        finally:
            os.close(fd)
    except OSError:
        return None  # it ended meanwhile
    # The name in parentheses may itself hold spaces and parentheses: count after the last one.
    return text[text.rfind(b")") + 2 :].split()


def start_time(pid: int) -> int | None:
    """When ``pid`` started, in ticks since boot. None: there is no such process (any more)."""
    fields = _fields(pid)
    return int(fields[_START]) if fields else None


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208 - pathlib is slow to import


def children_of_all() -> dict[int, list[tuple[int, int]]]:
    """Parent's pid -> (pid, start time) of its children, over all processes of the machine. Zombies are left out."""
    found: dict[int, list[tuple[int, int]]] = {}
    for pid in _pids():
        fields = _fields(pid)
        if fields and fields[_STATE] not in {b"Z", b"X"}:
            found.setdefault(int(fields[_PARENT]), []).append((pid, int(fields[_START])))
    return found


def _children(pid: int) -> list[tuple[int, int]] | None:
    """By the kernel's own list, in a hundredth of the time. None where it is not compiled in, or the process ended."""
    found: list[tuple[int, int]] = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208
            fd = os.open(f"/proc/{pid}/task/{task}/children", os.O_RDONLY)
            try:
                while text := os.read(fd, 65536):
                    found += [(int(child), 0) for child in text.split()]
            finally:
                os.close(fd)
    except OSError:
        return None
    return found


def children(pid: int) -> list[tuple[int, int]]:
    """The children of ``pid`` without zombies."""
    quick = _children(pid)
    if quick is None:
        return children_of_all().get(pid, [])
    found: list[tuple[int, int]] = []
    for child, _ in quick:
        fields = _fields(child)
        if fields and fields[_STATE] not in {b"Z", b"X"}:
            found.append((child, int(fields[_START])))
    return found


def descendants(root: int) -> list[tuple[int, int]]:
    """All below ``root``, parents before their children, without zombies (whose children are somebody else's)."""
    quick = os.path.exists(f"/proc/{root}/task/{root}/children")  # noqa: PTH110
    table = None if quick else children_of_all()
    found, seen = [(root, 0)], {root}
    for pid, _ in found:
        for child in children(pid) if table is None else table.get(pid, []):
            if child[0] not in seen:
                seen.add(child[0])
                found.append(child)
    return found[1:]


def send(process: tuple[int, int], number: int) -> bool:
    """Send signal ``number`` to ``process`` and to no later one of the same pid. False: it is gone, or not ours."""
    pid, started = process
    if not _PIDFD:
        return start_time(pid) == started and _send_by_pid(pid, number)
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        # From here the descriptor stands for one process: if its start time is right, it is the one that was meant.
        if start_time(pid) != started:
            return False
        signal.pidfd_send_signal(fd, number)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _pidfd_works() -> bool:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False  # before Linux 5.3, or in a sandbox that does not know it
    return True


_PIDFD = _pidfd_works()


def _send_by_pid(pid: int, number: int) -> bool:
    # A pid would have to be used again within microseconds: as good as it gets there.
    try:
        os.kill(pid, number)
    except OSError:
        return False
    return True


def freeze_and_kill(root: int, spare: frozenset[int] = frozenset()) -> None:
    """One round against all below ``root`` but ``spare`` (pids of children of ``root``) and what is below those.

    Everything is stopped before anything is killed, for as long as new processes turn up: a process that forks
    in a loop would else always have one child more than the listing.
    """
    stopped: set[tuple[int, int]] = set()
    for _ in range(32):
        found = [process for child in children(root) if child[0] not in spare for process in (child, *below(child))]
        new = [process for process in found if process not in stopped]
        if not new:
            break
        for process in new:
            send(process, signal.SIGSTOP)
        stopped.update(new)
    for process in stopped:
        send(process, signal.SIGKILL)


def below(process: tuple[int, int]) -> list[tuple[int, int]]:
    """The descendants of ``process``."""
    return descendants(process[0])


def marked(prefix: str) -> list[tuple[int, int]]:
    """The processes whose environment, as it was when their program started, has the mark of a run ``prefix…``.

    A program can start another without it: this finds what is not out to hide.
    """
    wanted = b"\0" + MARK + prefix.encode()
    found: list[tuple[int, int]] = []
    for pid in _pids():
        started = start_time(pid)
        try:
            fd = os.open(f"/proc/{pid}/environ", os.O_RDONLY)
            try:
                text = b"\0"
                while piece := os.read(fd, 262144):
                    text += piece
            finally:
                os.close(fd)
        except OSError:
            continue  # another user's, or gone
        if wanted in text and started is not None:
            found.append((pid, started))
    return found
