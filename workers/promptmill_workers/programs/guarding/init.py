"""The first process of a PID namespace. It ends when its program does, when it is told to, and when nobody could.

The kernel ends everything in the namespace with it, at once, however often that was forked. Nothing inside can send
it a signal that it does not handle.
"""

from __future__ import annotations

import os
import select
import signal
import time

from . import kernel, launch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .spec import Spec

_POLLRDHUP = 0x2000  # select.POLLRDHUP, which some builds lack
_REAP_S = 1.0


def _signal_all(number: int) -> None:
    try:
        os.kill(-1, number)  # all in the namespace but init
    except ProcessLookupError:
        return


def run_init(spec: Spec, control: int, link: int, fds: list[int], report: int) -> None:
    """Start the program and stay until it and all that it started is to end. Never returns.

    ``control`` is looked at for its end alone (the worker died), ``link`` leads to the guard: a byte asks for TERM and,
    after the grace, KILL; its end means that the guard died. The program's status goes there, one line. Raises OSError
    before there is a program.
    """
    kernel.set_name("pm-init")
    os.setsid()
    kernel.unshare(kernel.CLONE_NEWNS)
    kernel.mount_private_proc()
    wake, wake_end = launch.wake_on(frozenset({signal.SIGCHLD}))
    leader = launch.fork(lambda: launch.become(spec, fds, report))
    launch.close_all_but(frozenset({control, link, wake, wake_end}))
    _Init(leader, spec.grace_s, link).watch(control, wake)


class _Init:
    def __init__(self, leader: int, grace_s: float, link: int) -> None:
        self.leader = leader
        self.grace_s = grace_s
        self.link = link
        self.kill_at: float | None = None

    def watch(self, control: int, wake: int) -> None:
        poll = select.poll()
        poll.register(control, _POLLRDHUP)
        poll.register(self.link, select.POLLIN)
        poll.register(wake, select.POLLIN)
        while self.reap():
            if self.kill_at is None:
                left_ms = None
            else:
                left_ms = int((self.kill_at - time.monotonic()) * 1000) + 1
                if left_ms <= 0:
                    break
            for ready, _ in poll.poll(left_ms):
                if ready == wake:
                    os.read(wake, 512)
                elif ready == control:
                    poll.unregister(control)
                    self.terminate()
                elif os.read(self.link, 64):
                    self.terminate()
                else:
                    os._exit(1)  # no guard: nobody waits for more than the end
        self.clear()

    def terminate(self) -> None:
        if self.kill_at is None:
            self.kill_at = time.monotonic() + self.grace_s
            _signal_all(signal.SIGTERM)
            _signal_all(signal.SIGCONT)

    def reap(self) -> bool:
        """Collect what ended. False once nothing but init is left: here every orphan is a child of init."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self.leader:
                self.report(os.waitstatus_to_exitcode(status))

    def report(self, status: int) -> None:
        try:
            os.write(self.link, b"%d\n" % status)
        except OSError:
            os._exit(1)  # no guard
        self.terminate()

    def clear(self) -> None:
        """KILL to all, bounded; so that the program's own status is known. Then the kernel's part."""
        deadline = time.monotonic() + _REAP_S
        _signal_all(signal.SIGKILL)
        while self.reap() and time.monotonic() < deadline:
            select.select([], [], [], 0.002)
        os._exit(0)
