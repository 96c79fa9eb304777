"""Programs that do not want to end, and the worker that runs one of them.

``PYTHON -I -S hostile.py TAG WHAT…`` behaves as ``WHAT`` says. ``TAG`` is there to be found in process lists: forks
keep it. Everything here sleeps for minutes at most and forks a bounded number of times, should a test go wrong.

``PYTHON -m tests.support.hostile worker TAG LEVEL WHAT…`` is a worker process that runs such a program by promptmill's
own means until it is killed; it writes ``running`` once the program says ``ready``.
"""

# Of os, not pathlib, which would double the time that a program takes to start.
# ruff: noqa: PTH100, PTH101, PTH102, PTH106, PTH109, PTH120, PTH123, PTH211

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable

LONG_S = 300.0


def say(text: str) -> None:
    os.write(1, text.encode() + b"\n")


def sleep() -> None:
    """As long as it may take, whatever interrupts it."""
    until = time.monotonic() + LONG_S
    while time.monotonic() < until:
        time.sleep(1)


def fork(child: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        child()
        os._exit(0)
    return pid


def deaf() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def ready() -> None:
    say("ready")


def polite() -> None:
    """Ends at TERM, as programs do."""
    ready()
    sleep()


def ignore_term() -> None:
    deaf()
    ready()
    sleep()


def setsid() -> None:
    """A child in a session of its own, deaf."""

    def child() -> None:
        os.setsid()
        deaf()
        ready()
        sleep()

    fork(child)
    sleep()


def _daemon(then: Callable[[], None]) -> None:
    """Forked twice, in a session of its own, not ours any more when this returns."""

    def first() -> None:
        os.setsid()
        fork(then)

    os.waitpid(fork(first), 0)


def double_fork() -> None:
    def child() -> None:
        deaf()
        ready()
        sleep()

    _daemon(child)
    sleep()


def hold_stdout() -> None:
    """The leader ends at once with 3, a daemon holds its standard output."""

    def child() -> None:
        deaf()
        say("the child holds it")
        os.kill(leader, signal.SIGUSR1)
        sleep()

    leader = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    _daemon(child)
    signal.sigwait([signal.SIGUSR1])
    os._exit(3)


def generations(count: str) -> None:
    """A chain: each process forks the next, which makes a session of its own, and exits. Then the last one sleeps."""
    deaf()
    ready()
    for _ in range(int(count)):
        if os.fork():
            os._exit(0)
        os.setsid()
    sleep()


def generations_below(count: str) -> None:
    """The same under a leader that stays."""
    fork(lambda: generations(count))
    sleep()


def bomb(count: str) -> None:
    """At TERM each process forks one more, up to ``count`` in all below each of the four that are there."""
    left = int(count)

    def again(*_: object) -> None:
        nonlocal left
        left -= 1
        if left > 0 and os.fork() == 0:
            os.setsid()
            os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, again)
    for _ in range(2):
        os.fork()
    ready()
    sleep()


def zombie() -> None:
    """Two children that ended and that nobody asks about, one of them in a session of its own."""
    fork(lambda: None)
    fork(os.setsid)
    ready()
    sleep()


def stop() -> None:
    """Stops a child and itself."""

    def child() -> None:
        os.setsid()
        ready()
        os.kill(os.getpid(), signal.SIGSTOP)
        sleep()

    fork(child)
    os.kill(os.getpid(), signal.SIGSTOP)
    sleep()


def flood(size: str) -> None:
    """``size`` bytes without a line end."""
    piece, left = b"x" * 65536, int(size)
    while left > 0:
        left -= os.write(1, piece[:left])
    sleep()


def flood_stderr(size: str) -> None:
    piece, left = b"e" * 65536, int(size)
    while left > 0:
        left -= os.write(2, piece[:left])
    os.write(2, b"the end")


def spoil() -> None:
    """Removes, locks and nests the directories it was given, as deep as no path can say."""
    home, tmp, work = os.environ["HOME"], os.environ["TMPDIR"], os.getcwd()
    for _ in range(3000):
        os.mkdir("d" * 100)
        os.chdir("d" * 100)
    os.symlink("/", "root")
    os.mkdir("closed", 0o700)
    with open("closed/file", "w") as file:
        file.write("x")
    os.chmod("closed", 0)
    os.chdir("/")
    os.rmdir(tmp)
    os.symlink("/etc", tmp)
    os.mkdir(f"{home}/..1")
    for path in (home, work, os.path.dirname(home)):
        os.chmod(path, 0)
    ready()
    sleep()


def memory(size: str) -> None:
    block = bytearray(int(size))
    block[::4096] = b"x" * len(block[::4096])
    say("got it")


def open_files() -> None:
    count = 0
    try:
        while True:
            os.open(os.devnull, os.O_RDONLY)
            count += 1
    except OSError:
        say(str(count))


def half_a_line() -> None:
    os.write(1, b'{"whole":1}\n{"half":')
    os.kill(os.getpid(), signal.SIGKILL)


def not_utf8() -> None:
    os.write(1, b"\xff\xfe\xc3\n\xe2\x80\xa8 and \x0b\x0c\x85 are no line ends\n")


def stop_guard() -> None:
    """Stops its parent, which below ``pidns`` is the guard."""
    deaf()
    os.kill(os.getppid(), signal.SIGSTOP)
    ready()
    sleep()


def worker(tag: str, level: str, *what: str) -> None:
    import asyncio

    from promptmill_workers.programs import ProgramLimits, configure, open_sandbox

    async def run() -> None:
        configure(level)
        async with open_sandbox("hostile") as box:
            box.write("secret.txt", "x")
            async with box.run(command(tag, *what), environment={}, limits=ProgramLimits(grace_s=0.2)) as program:
                async for line in program.lines():
                    if line == b"ready":
                        say("running")

    asyncio.run(run())


def command(tag: str, *what: str) -> list[str]:
    """The command that behaves as ``what`` says."""
    interpreter: str = getattr(sys, "_base_executable", None) or sys.executable
    return [interpreter, "-I", "-S", os.path.abspath(__file__), tag, *what]


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        worker(*sys.argv[2:])
    else:
        globals()[sys.argv[2]](*sys.argv[3:])
