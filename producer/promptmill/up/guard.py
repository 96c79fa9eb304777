"""A guard: the parent of one program that must not outlive ``promptmill up``. Standard library only.

Started as ``PYTHON -I -S guard.py LIFELINE_FD GRACE_S LOCK_FD -- PROGRAM ARGUMENT…``; it imports nothing of ours, so
that it is up in about 40 ms and small. The program runs in a session of its own, with the guard's standard input (a
configuration with a password in it then stands in no argument list) and with its output going to the guard's standard
error.

It ends the program, TERM first and KILL after the grace, when

- the lifeline, a pipe whose only write end ``up`` holds, comes to its end: ``up`` died, however;
- SIGTERM arrives. SIGINT skips the grace.

LOCK_FD (-1: none) is held open by guard and program: the lock on the program's data is then free only when both are
gone, and a new ``up`` cannot start a second program on the data of one that is still writing.

The guard's own kill -9 is covered on Linux by PR_SET_PDEATHSIG. That alone could not be the guarantee: it is bound to
the thread that forked and is cleared by a fork, and other systems lack it. The guard has one thread and forks once.

Reports go to standard output, one a line: ``pid N`` once the program was started, ``exit STATUS`` (negative: the
signal) when it ended, ``gone`` when nothing of its group is left. A missing ``gone`` tells ``up`` to look for itself.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time

TYPE_CHECKING = False  # importing typing would cost as much as all the rest
if TYPE_CHECKING:
    from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_KILL_WAIT_S = 5.0
_NOT_STARTED = 127


def _prctl_function() -> Callable[..., int] | None:
    """``prctl``, looked up before the fork: after it, the child does as little as it can. None where there is none."""
    if not sys.platform.startswith("linux"):
        return None
    import ctypes  # noqa: PLC0415 - 4 ms that other systems need not pay

    return ctypes.CDLL(None).prctl


def _report(line: str) -> None:
    try:
        os.write(1, line.encode() + b"\n")
    except OSError:
        # Nobody reads any more: `up` is dead, and ending the program is all that counts.
        return


def _close_all_but(keep: set[int]) -> None:
    """A guard that held another's pipe open would keep that guard from ever seeing its end."""
    directory = "/proc/self/fd" if sys.platform.startswith("linux") else "/dev/fd"
    for name in os.listdir(directory):  # noqa: PTH208 - pathlib would double the start time
        if int(name) not in keep:
            try:
                os.close(int(name))
            except OSError:
                continue  # the listing's own descriptor, closed already


def _run_program(command: list[str], lifeline: int, prctl: Callable[..., int] | None) -> None:
    """In the child: become ``command``. Never returns."""
    guard = os.getppid()
    try:
        os.setsid()
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != guard:
                os._exit(_NOT_STARTED)  # the guard died before the line above took effect
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(2, 1)
        os.close(lifeline)
        os.execv(command[0], command)  # noqa: S606 - no shell is the point
    except OSError as err:
        os.write(2, f"cannot start {command[0]}: {err.strerror}\n".encode())
    finally:
        os._exit(_NOT_STARTED)


def _signal_group(group: int, number: int) -> bool:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # macOS answers so for a group of zombies
    return True


def _note_only(*_: object) -> None:
    """The handler's presence makes Python write the signal's number to the wake-up pipe; the loop acts on it."""


class _Watch:
    """The program, its exit status once it ended, and what was asked of it."""

    def __init__(self, pid: int, grace_s: float) -> None:
        self.pid = pid
        self.status: int | None = None
        self._grace_s = grace_s
        self._kill_at: float | None = None

    def reap(self) -> bool:
        """Collect everything that ended. False once no child is left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self.pid:
                self.status = os.waitstatus_to_exitcode(status)

    def end(self) -> None:
        if self._kill_at is None:
            self._kill_at = time.monotonic() + self._grace_s
            _signal_group(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        self._kill_at = time.monotonic()

    def timeout_ms(self) -> int | None:
        """How long to wait for news; kills the group when its time is up."""
        if self._kill_at is None:
            return None
        left_s = self._kill_at - time.monotonic()
        if left_s > 0:
            return int(left_s * 1000) + 1
        _signal_group(self.pid, signal.SIGKILL)
        return 100


def _watch(watch: _Watch, lifeline: int, wake: int) -> None:
    """Until the program ended: wait for the lifeline's end, for signals, and for the grace to run out."""
    poll = select.poll()
    poll.register(lifeline, select.POLLIN)
    poll.register(wake, select.POLLIN)
    while watch.reap() and watch.status is None:
        for ready, _ in poll.poll(watch.timeout_ms()):
            if ready == lifeline:
                if not os.read(lifeline, 64):
                    poll.unregister(lifeline)
                    watch.end()
                continue
            numbers = os.read(wake, 64)
            if signal.SIGINT in numbers:
                watch.kill()
            elif signal.SIGTERM in numbers:
                watch.end()


def _clear(watch: _Watch) -> bool:
    """Kill what the program left in its group and wait, bounded, until it is gone."""
    deadline = time.monotonic() + _KILL_WAIT_S
    while True:
        alive = _signal_group(watch.pid, signal.SIGKILL)
        if not watch.reap() and not alive:
            return True
        if time.monotonic() > deadline:
            return False
        select.select([], [], [], 0.01)


def main(arguments: list[str]) -> int:
    """Run the program and see to its end. Returns its exit code, or 128 and the signal's number."""
    lifeline, grace_s, lock, command = int(arguments[1]), float(arguments[2]), int(arguments[3]), arguments[5:]
    _close_all_but({0, 1, 2, lifeline, lock})
    wake, wake_end = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(wake_end, False)
    signal.set_wakeup_fd(wake_end, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, _note_only)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    prctl = _prctl_function()
    if prctl is not None:
        # What the program leaves behind becomes ours to collect, so "gone" is seen and not guessed.
        prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    running, running_end = os.pipe()  # close-on-exec: its end means that the program runs
    pid = os.fork()
    if pid == 0:
        _run_program(command, lifeline, prctl)
    os.close(running_end)
    # Before it, a TERM would meet our own handler in the child and be lost.
    os.read(running, 1)
    os.close(running)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    _report(f"pid {pid}")
    watch = _Watch(pid, grace_s)
    _watch(watch, lifeline, wake)
    status = watch.status if watch.status is not None else _NOT_STARTED
    _report(f"exit {status}")
    if _clear(watch):
        _report("gone")
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv))
