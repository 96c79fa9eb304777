"""The warden: one a worker process, the parent of its guards. It outlives the worker until nothing is left.

It has one thread, holds no descriptor but its socket, and forks a guard in the time that a fork takes. What a guard
that died leaves behind becomes the warden's child (it is a subreaper), and the warden has no other business with
children than guards: whatever else there is, it kills. Guards do not need it: when it dies, they go on.

Its worker writes records of ``RECORD_BYTES``: a letter, the run's token, a number.

- ``S``: start a guard, with the descriptors that come along; the number is how long it may take to end, in ms.
- ``K``: kill that guard; it did not end in its time.
- ``W``: the run's guard died while no warden lived: find what it left, by its mark or its control group, and end it.

It answers with records: ``G`` nothing of that run is left, ``L`` something does not end, ``F`` there was no room for
a guard (the number is the errno). The end of the socket means that the worker died: guards see that too, each by
itself, and the warden waits for them, killing those that take too long, removes the directories, and ends.
"""

from __future__ import annotations

import array
import gc
import os
import select
import signal
import socket
import time

from . import cgroups, kernel, launch, places, procfs
from .guard import EXIT_GONE, KILL_WAIT_S, run_guard

TOKEN_LETTERS = 24
JOB_LETTERS = 12
"""A token is its job's name, which is that of its directory, and the run's."""

RECORD_BYTES = 1 + TOKEN_LETTERS + 15
_MAX_FDS = 64


def record(letter: str, token: str, number: int = 0) -> bytes:
    """One message, either way."""
    return f"{letter}{token:<{TOKEN_LETTERS}}{number:015d}".encode()


def parse(message: bytes) -> tuple[str, str, int]:
    """The letter, the token and the number of a message."""
    text = message.decode()
    return text[0], text[1 : 1 + TOKEN_LETTERS], int(text[1 + TOKEN_LETTERS :])


class _Warden:
    def __init__(self, link: socket.socket, root: str) -> None:
        self.link = link
        self.root = root
        self.worker = os.getppid()
        self.guards: dict[int, str] = {}
        self.end_s: dict[str, float] = {}
        self.sweeper = 0
        self.clearing: dict[str, float] = {}
        """Tokens of guards that died before their time -> until when to look for what they left."""
        self.worker_lives = True
        self.died_at = 0.0

    def run(self) -> None:
        wake, _ = launch.wake_on(frozenset({signal.SIGCHLD}))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # it ends with the worker, and after its guards
        self.sweeper = launch.fork(lambda: sweep(self.root))
        gc.collect()
        gc.freeze()  # a guard shares these pages, as long as its collector does not write to them
        poll = select.poll()
        poll.register(self.link, select.POLLIN)
        poll.register(wake, select.POLLIN)
        while self.worker_lives or self.guards or self.clearing or self.sweeper:
            for ready, _ in poll.poll(self._timeout_ms()):
                if ready == wake:
                    os.read(wake, 512)
                elif not self._hear():
                    poll.unregister(self.link)
                    self.worker_lives, self.died_at = False, time.monotonic()
            self._reap()
            if self.clearing:
                self._clear()
            if not self.worker_lives:
                self._hurry()
        self._await_worker()
        sweep(self.root)

    def _await_worker(self) -> None:
        """A process that is dying closes its descriptors one by one: this socket, and then the locks on directories."""
        deadline = time.monotonic() + KILL_WAIT_S
        while os.getppid() == self.worker and time.monotonic() < deadline:
            select.select([], [], [], 0.005)

    def _timeout_ms(self) -> int | None:
        if self.clearing:
            return 5
        return None if self.worker_lives else 100

    def _hear(self) -> bool:
        size = socket.CMSG_SPACE(_MAX_FDS * 4)
        try:
            message, ancillary, _, _ = self.link.recvmsg(RECORD_BYTES, size)
        except ConnectionError:
            return False
        if not message:
            return False
        fds = array.array("i")
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        letter, token, number = parse(message)
        if letter == "S":
            self._start(token, list(fds), number / 1000)
        elif letter == "K":
            for pid, known in self.guards.items():
                if known == token:
                    os.kill(pid, signal.SIGKILL)  # our own child, and not reaped: the pid is no other's
        elif letter == "W":
            self.clearing[token] = time.monotonic() + KILL_WAIT_S
        return True

    def _start(self, token: str, fds: list[int], end_s: float) -> None:
        try:
            self.guards[launch.fork(lambda: run_guard(fds))] = token
            self.end_s[token] = end_s
        except OSError as err:
            self._answer("F", token, err.errno or 0)
        finally:
            for fd in fds:
                os.close(fd)

    def _answer(self, letter: str, token: str, number: int = 0) -> None:
        try:
            self.link.sendall(record(letter, token, number))
        except OSError:
            return  # the worker is dead: `_hear` sees it too

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.sweeper:
                self.sweeper = 0
            token = self.guards.pop(pid, None)
            if token is None:
                continue
            self.end_s.pop(token, None)
            if os.waitstatus_to_exitcode(status) == EXIT_GONE:
                self._answer("G", token)
            else:
                self.clearing[token] = time.monotonic() + KILL_WAIT_S

    def _clear(self) -> None:
        """One round against what dead guards left: orphans, which are ours now, and what bears their mark."""
        spare = frozenset({*self.guards, self.sweeper, 0})
        left = False
        if kernel.LINUX:
            me = os.getpid()
            procfs.freeze_and_kill(me, spare)
            self._reap()
            left = any(process[0] not in spare for process in procfs.children(me))
        now = time.monotonic()
        for token, until in list(self.clearing.items()):
            busy = left or (kernel.LINUX and _end_run(token))
            if not busy or now > until:
                del self.clearing[token]
                self._answer("L" if busy else "G", token)

    def _hurry(self) -> None:
        """The worker is dead. A guard that does not end in its time was stopped, or worse."""
        passed_s = time.monotonic() - self.died_at
        for pid, token in self.guards.items():
            if passed_s > self.end_s[token]:
                os.kill(pid, signal.SIGKILL)


def _end_run(token: str) -> bool:
    """Kill what is known to be of a run whose guard died; True as long as there is something."""
    found = procfs.marked(token)
    for process in found:
        procfs.send(process, signal.SIGKILL)
    busy = bool(found)
    for path in cgroups.of_job(token):
        cgroups.kill(path)
        busy = not (cgroups.empty(path) and cgroups.remove(path)) or busy
    return busy


def sweep(root: str) -> None:
    """End and remove what dead workers left under ``root``, bounded. Their guards are dead too: they hold the lock."""
    for name in places.stale(root):
        job = name.lstrip(".")
        deadline = time.monotonic() + KILL_WAIT_S
        while kernel.LINUX and _end_run(job) and time.monotonic() < deadline:
            select.select([], [], [], 0.005)
        places.remove(f"{root}/{name}")
    if kernel.LINUX:
        cgroups.remove_forgotten()


def main(fd: int, root: str) -> None:
    """Be the warden at the socket ``fd``, for the jobs whose directories are below ``root``."""
    launch.close_all_but(frozenset({2, fd}))
    nothing = os.open(os.devnull, os.O_RDWR)  # 0, the lowest free one
    os.dup2(nothing, 1)
    os.chdir("/")
    launch.default_signals()
    if kernel.LINUX:
        kernel.become_subreaper()
    kernel.set_name("pm-warden")
    _Warden(socket.socket(fileno=fd), root).run()
