"""From a fork to the program: its descriptors, limits and signals, then ``execve``.

Errors go through a pipe that the ``execve`` closes: what it says at its end is the reason why there is no program.
"""

from __future__ import annotations

import fcntl
import os
import resource
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .spec import Spec

NOT_STARTED = 127
_ALL_SIGNALS = frozenset(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}


def close_all_but(keep: frozenset[int]) -> None:
    """A guard that held another's pipe open would keep its reader from ever seeing the end."""
    directory = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"  # noqa: PTH112
    for name in os.listdir(directory):  # noqa: PTH208
        if int(name) not in keep:
            try:
                os.close(int(name))
            except OSError:
                continue  # the listing's own descriptor, closed already


def default_signals() -> None:
    """Nothing ignored, handled or blocked, whatever was inherited."""
    for number in _ALL_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def wake_on(numbers: frozenset[int]) -> tuple[int, int]:
    """Handle the signals ``numbers`` by writing them into a pipe; answers its ends, the one to read from first."""
    wake, wake_end = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(wake_end, False)
    signal.set_wakeup_fd(wake_end, warn_on_full_buffer=False)
    for number in numbers:
        signal.signal(number, _note_only)
    # A report that nobody reads any more must not end who has others to end.
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    return wake, wake_end


def _note_only(*_: object) -> None:
    """The handler's presence makes Python write the signal's number to the wake-up pipe; the loop acts on it."""


def fork(child: Callable[[], None]) -> int:
    """Fork with no signal lost or met by the wrong handler; answers the pid. ``child`` runs in it, and must not return.

    Raises OSError where the system has no room for a process.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ALL_SIGNALS)
    try:
        pid = os.fork()
        if pid == 0:
            try:
                signal.set_wakeup_fd(-1)
                default_signals()
                child()
            finally:
                os._exit(NOT_STARTED)  # never back into the parent's code
        return pid
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(kind, (value, value))


def _place(fds: list[int], targets: list[int], report: int) -> None:
    """Give the program its descriptors at their numbers; all else closes itself."""
    lowest = max(targets) + 1
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, lowest) for fd in fds]
    keep = frozenset({*moved, report})
    close_all_but(keep)
    for fd, target in zip(moved, targets, strict=True):
        os.dup2(fd, target)  # inheritable
        os.close(fd)


def become(spec: Spec, fds: list[int], report: int) -> None:
    """Become the program of ``spec``; where that fails, write why to ``report`` and exit."""
    try:
        # Above all targets, so that none of them lands on it.
        report = fcntl.fcntl(report, fcntl.F_DUPFD_CLOEXEC, max(spec.targets) + 1)
        os.setsid()
        _place(fds, spec.targets, report)
        os.chdir(spec.work)
        os.umask(0o077)
        _limit(resource.RLIMIT_CORE, 0)
        _limit(resource.RLIMIT_NOFILE, spec.open_files)
        if spec.memory_bytes is not None:
            # Not RLIMIT_AS: node and others reserve far more addresses than they use.
            _limit(resource.RLIMIT_DATA, spec.memory_bytes)
        _be_the_first_to_go()
        os.execve(spec.command[0], spec.command, spec.environment)  # noqa: S606 - no shell is the point
    except (OSError, ValueError) as err:
        reason = err.strerror if isinstance(err, OSError) else str(err)
        os.write(report, f"{spec.command[0]}: {reason}".encode())
    finally:
        os._exit(NOT_STARTED)


def _be_the_first_to_go() -> None:
    """If memory runs out, the kernel should take this program before the worker with all its other jobs."""
    try:
        fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
    except OSError:
        return  # another system, or no /proc: a preference only
    try:
        os.write(fd, b"500")
    except OSError:
        return  # the administrator decided otherwise
    finally:
        os.close(fd)
