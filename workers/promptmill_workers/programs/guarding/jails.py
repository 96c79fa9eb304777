"""How a program and all that it starts is held together and ended: one class a level, with the same shape.

``start`` forks, ``terminate`` asks all to end, ``kill`` is one round against whatever is left, ``reap`` collects what
ended and says whether anything is left. ``status`` is the program's own (negative: the signal) once it ended.
"""

from __future__ import annotations

import os
import signal

from . import cgroups, kernel, launch, procfs
from .init import run_init

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .spec import Spec


class StartError(Exception):
    """The program, or its jail, could not be started; says why."""


class Jail:
    """Not Linux: the program's process group, which whoever makes a session of its own leaves."""

    own_grace_s = 0.0
    """Time beyond the grace before ``kill``, for a jail that kills by itself."""

    def __init__(self, spec: Spec, control: int) -> None:
        self.spec = spec
        self.control = control
        self.pid = 0
        self.status: int | None = None

    def prepare(self) -> None:
        """What has to be there before the fork. Raises OSError."""

    def enter(self) -> None:
        """In the child, before it becomes the program. Raises OSError."""

    def start(self, fds: list[int]) -> None:
        """Run the program with the descriptors ``fds``. Raises StartError."""
        guard = os.getpid()
        report, report_end = os.pipe()

        def child() -> None:
            try:
                if kernel.LINUX:
                    kernel.die_with_parent(signal.SIGKILL)
                    if os.getppid() not in {guard, 0}:  # 0: out of a namespace's sight, whose init watches `link`
                        os._exit(launch.NOT_STARTED)  # the guard died before the line above took effect
                self.enter()
                self.inside(fds, report_end)
            except BaseException as err:  # noqa: BLE001 - nobody above could tell; the guard passes it on
                reason = err.strerror if isinstance(err, OSError) else f"{type(err).__name__}: {err}"
                os.write(report_end, f"{self.spec.level}: {reason}".encode())
                os._exit(launch.NOT_STARTED)

        try:
            self.prepare()
            self.pid = launch.fork(child)
        except OSError as err:
            os.close(report_end)
            os.close(report)
            raise StartError(f"{self.spec.level}: {err.strerror}") from err
        os.close(report_end)
        reason = b""
        while piece := os.read(report, 4096):
            reason += piece
        os.close(report)
        if reason:
            raise StartError(reason.decode("utf-8", "replace"))

    def inside(self, fds: list[int], report: int) -> None:
        """In the child: become the program."""
        launch.become(self.spec, fds, report)

    def collect(self) -> bool:
        """Reap every child that ended. False once there is none left, running or not."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self.pid:
                self.status = os.waitstatus_to_exitcode(status)

    def _group(self, number: int) -> bool:
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True  # macOS answers so for a group of zombies
        return True

    def terminate(self) -> None:
        """TERM to all, and CONT, without which what is stopped could not act on it."""
        self._group(signal.SIGTERM)
        self._group(signal.SIGCONT)

    def kill(self) -> None:
        """One round of KILL."""
        self._group(signal.SIGKILL)

    def reap(self) -> bool:
        """Collect what ended; False once nothing is left."""
        return self.collect() or self._group(0)

    def close(self) -> None:
        """Give back what ``prepare`` took."""


class TreeJail(Jail):
    """Linux: the guard is a subreaper, so that orphans become its own children and no child left is the proof."""

    def prepare(self) -> None:
        """Orphans come to the guard."""
        kernel.become_subreaper()

    def terminate(self) -> None:
        """To each by itself: those with a session of their own too."""
        for process in procfs.descendants(os.getpid()):
            procfs.send(process, signal.SIGTERM)
            procfs.send(process, signal.SIGCONT)

    def kill(self) -> None:
        """Stop all, then kill all."""
        procfs.freeze_and_kill(os.getpid())

    def reap(self) -> bool:
        """Collect what ended; False once nothing is left."""
        return self.collect()


class CgroupJail(TreeJail):
    """A control group of its own: the kernel ends all in it in one act, and the next warden can too."""

    path = ""

    def prepare(self) -> None:
        """Make it."""
        kernel.become_subreaper()
        self.path = cgroups.make(self.spec.run, self.spec.memory_bytes)

    def enter(self) -> None:
        """The child goes in, its children are born in it."""
        cgroups.enter(self.path)

    def terminate(self) -> None:
        """To each in it."""
        cgroups.terminate(self.path)

    def kill(self) -> None:
        """All at once."""
        cgroups.kill(self.path)

    def reap(self) -> bool:
        """Collect what ended; False once it is empty too."""
        return self.collect() or not cgroups.empty(self.path)

    def close(self) -> None:
        """Remove it."""
        if self.path:
            cgroups.remove(self.path)


class NamespaceJail(Jail):
    """A PID namespace: its init, our child, ends with its parent, and the kernel ends all in it with its init."""

    own_grace_s = 2.0

    def __init__(self, spec: Spec, control: int) -> None:
        super().__init__(spec, control)
        self.link = -1
        self._said = b""

    def prepare(self) -> None:
        """The next child is to be the init of a PID namespace."""
        try:
            kernel.unshare(kernel.CLONE_NEWPID)
        except PermissionError:
            # A user namespace of our own makes us its root; each user and group keeps its number.
            user, group = os.geteuid(), os.getegid()
            kernel.unshare(kernel.CLONE_NEWUSER | kernel.CLONE_NEWPID)
            for name, text in (
                ("setgroups", "deny"),
                ("uid_map", f"{user} {user} 1"),
                ("gid_map", f"{group} {group} 1"),
            ):
                with open(f"/proc/self/{name}", "w", encoding="ascii") as file:  # noqa: PTH123
                    file.write(text)

    def start(self, fds: list[int]) -> None:
        """Start init, which starts the program."""
        ours, theirs = _socketpair()
        self.link, self._theirs = ours, theirs
        try:
            super().start(fds)
        finally:
            os.close(theirs)

    def inside(self, fds: list[int], report: int) -> None:
        """In the child: be init."""
        os.close(self.link)
        run_init(self.spec, self.control, self._theirs, fds, report)

    def _tell(self, word: bytes) -> None:
        try:
            os.write(self.link, word)
        except OSError:
            return  # it ended meanwhile, and all with it

    def terminate(self) -> None:
        """Init sends TERM to all."""
        self._tell(b"T")

    def kill(self) -> None:
        """Without init there is nothing."""
        if self.collect():
            os.kill(self.pid, signal.SIGKILL)  # our own child, and not reaped: the pid is no other's

    def collect(self) -> bool:
        """The program's status comes from init, which is killed with it where it cannot say."""
        alive = super().collect()
        self._hear()  # after it: what an init that was just reaped had said is there
        word, end, _ = self._said.partition(b"\n")
        if end:
            self.status = int(word)
        return alive

    def _hear(self) -> None:
        while self.link >= 0:
            try:
                piece = os.read(self.link, 64)
            except BlockingIOError:
                return
            except OSError:
                piece = b""
            self._said += piece
            if not piece:
                os.close(self.link)
                self.link = -1

    def reap(self) -> bool:
        """Collect what ended; the kernel lets init be reaped only when all others are gone."""
        return self.collect()


def _socketpair() -> tuple[int, int]:
    import socket  # noqa: PLC0415 - the warden has it already

    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    return ours.detach(), theirs.detach()


JAILS: dict[str, type[Jail]] = {
    "group": Jail,
    "subreaper": TreeJail,
    "cgroup": CgroupJail,
    "pidns": NamespaceJail,
}
"""Those but ``group`` raise StartError on other systems than Linux."""
