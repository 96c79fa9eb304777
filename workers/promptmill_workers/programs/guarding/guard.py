"""A guard: the parent of one program, which must not outlive its job. Forked by the warden.

It reads what to run from its control socket (so that no argument list shows it), starts it, and ends it, TERM first
and KILL after the grace, when

- the program itself (the leader) ended: what it left behind goes too;
- the worker asks, or the control socket comes to its end: the worker died, however;
- SIGTERM arrives, or the program's time is over.

Reports go to the control socket, one a line: ``exec PID`` once the program runs (PID is the leader's, or its init's),
or ``failed WHY``; ``exit STATUS`` (negative: the signal) when the leader ended; ``gone`` when nothing is left, or
``left`` when something does not end. A guard that ends without one of these two leaves the rest to the warden.
"""

from __future__ import annotations

import os
import select
import signal
import time

from . import kernel, launch, places
from .jails import JAILS, Jail, StartError
from .spec import LENGTH_BYTES, Spec

KILL_WAIT_S = 5.0
"""How long a guard goes on killing before it reports what is left."""

EXIT_GONE, EXIT_LEFT = 0, 1


def run_guard(fds: list[int]) -> None:
    """Be a guard with the descriptors ``fds``: control socket, the directory's lock, the program's. Never returns."""
    os.setsid()
    kernel.set_name("pm-guard")
    launch.close_all_but(frozenset(fds))
    nothing = os.open(os.devnull, os.O_RDWR)  # 0, the lowest free one
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    spec = _receive(fds[0])
    if spec is None:
        os._exit(EXIT_GONE)  # the worker died before there was anything to run; the warden sees to the directory
    guard = _Guard(spec, fds[0])
    try:
        os._exit(guard.run(fds[2:]))
    except BaseException as err:  # noqa: BLE001 - there is nobody to raise it to but the worker
        guard.report(f"failed the guard itself: {type(err).__name__}: {err}")
        os._exit(EXIT_LEFT)


def _receive(control: int) -> Spec | None:
    text = b""
    wanted = LENGTH_BYTES
    while len(text) < wanted:
        piece = os.read(control, min(wanted - len(text), 1 << 20))
        if not piece:
            return None
        text += piece
        if len(text) == LENGTH_BYTES and wanted == LENGTH_BYTES:
            wanted += int.from_bytes(text, "big")
    return Spec.unpack(text[LENGTH_BYTES:])


class _Guard:
    def __init__(self, spec: Spec, control: int) -> None:
        self.spec = spec
        self.control = control
        self.jail: Jail = JAILS[spec.level](spec, control)
        self.worker_lives = True
        self.ending = False
        self.exit_reported = False
        self.run_until = time.monotonic() + spec.run_s
        self.kill_at = 0.0

    def report(self, line: str) -> None:
        try:
            os.write(self.control, line.encode() + b"\n")
        except OSError:
            return  # nobody reads any more: the worker is dead, and ending the program is all that counts

    def run(self, fds: list[int]) -> int:
        """From the start to the end of all; answers the exit code."""
        wake, _ = launch.wake_on(frozenset({signal.SIGTERM, signal.SIGCHLD}))
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            self.jail.start(fds)
        except StartError as err:
            self.report(f"failed {err}")
            self.end()
        else:
            self.report(f"exec {self.jail.pid}")
        for fd in fds:
            os.close(fd)  # else the worker would never see the end of the program's output
        gone = self._watch(wake)
        self.jail.close()
        if not self.worker_lives:
            places.remove(self.spec.directory)
        self.report("gone" if gone else "left")
        return EXIT_GONE if gone else EXIT_LEFT

    def _watch(self, wake: int) -> bool:
        poll = select.poll()
        poll.register(self.control, select.POLLIN)
        poll.register(wake, select.POLLIN)
        while True:
            alive = self.jail.reap()
            if self.jail.status is not None and not self.exit_reported:
                self.exit_reported = True
                self.report(f"exit {self.jail.status}")
                self.end()
                continue
            if not alive:
                return True
            now = time.monotonic()
            if now >= self.run_until:
                self.end()
            if self.ending and now >= self.kill_at + KILL_WAIT_S:
                return False
            for ready, _ in poll.poll(self._timeout_ms(now)):
                if ready == self.control:
                    self._hear(poll)
                elif signal.SIGTERM in os.read(wake, 512):
                    self.end()

    def _timeout_ms(self, now: float) -> int:
        if not self.ending:
            return int(min((self.run_until - now) * 1000, 1e9)) + 1
        if now >= self.kill_at:
            self.jail.kill()
            # Not for ever short: what the kernel holds does not end sooner by being looked at.
            return 2 if now < self.kill_at + 0.5 else 50
        return int((self.kill_at - now) * 1000) + 1

    def _hear(self, poll: select.poll) -> None:
        try:
            word = os.read(self.control, 64)
        except OSError:
            word = b""
        if not word:
            self.worker_lives = False
            poll.unregister(self.control)
        self.end()

    def end(self) -> None:
        """TERM now, KILL after the grace."""
        if not self.ending:
            self.ending = True
            # A namespace's init counts the grace itself, and knows the program's status; it is killed if it does not.
            self.kill_at = time.monotonic() + self.spec.grace_s + self.jail.own_grace_s
            self.jail.terminate()
