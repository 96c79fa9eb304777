"""One run of a program, from the request to its warden until nothing of it is left."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import socket
import sys
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from promptmill.errors import BackendError
from promptmill_workers.programs.guarding.guard import KILL_WAIT_S
from promptmill_workers.programs.guarding.spec import Spec
from promptmill_workers.programs.guarding.warden import JOB_LETTERS, TOKEN_LETTERS
from promptmill_workers.programs.link import Answer, Link, WardenDied, warden
from promptmill_workers.programs.pipes import Feeder, Output, Tail

logger = logging.getLogger(__name__)

T = TypeVar("T")

counted: Final[Counter[str]] = Counter()
"""Programs of this process since its start: ``started``, ``ended`` (nothing of them is left), ``killed`` (by us)."""

STDERR_TAIL_BYTES: Final = 65536
_SLACK_S: Final = 5.0
"""Beyond the grace: how long a guard may take before it is killed, and its warden may take then."""


@dataclass(frozen=True, slots=True)
class Order:
    """What to run, as the worker knows it; the guard gets a :class:`.guarding.spec.Spec`."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    level: str
    root: str
    directory: str
    work: str
    lock_fd: int
    grace_s: float
    run_s: float
    memory_bytes: int | None
    open_files: int


def _plain(text: str) -> str:
    """Without a subclass of str (an enumeration's member), which does not travel."""
    return str.__str__(text)


async def to_the_end(ending: Coroutine[Any, Any, T]) -> T:
    """Run ``ending`` to its end, however often the caller is cancelled meanwhile; then let the cancellation go on.

    To let go earlier would leave a program to itself. ``ending`` must be bounded.
    """
    task = asyncio.ensure_future(ending)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as err:
            if task.cancelled():
                raise
            cancelled = err
    if cancelled is not None:
        raise cancelled
    return task.result()


class Running:
    """A guarded program. ``start``, then read ``output`` and wait for ``exited``, and ``close`` in any case.

    Making one opens its pipes: raises OSError where there are no descriptors left.
    """

    def __init__(self, order: Order, stdin: bytes, given: Mapping[int, bytes], *, hold_stdin: bool = False) -> None:
        self.order = order
        self.pid = 0
        """The leader's, or that of its namespace's init; 0 before it runs."""
        self.status: int | None = None
        self.exited = asyncio.Event()
        self._targets = sorted(given)
        with ExitStack() as made:  # where descriptors run out, those that were had are given back
            self.output = Output()
            made.callback(self.output.close)
            self.errors = Tail(STDERR_TAIL_BYTES)
            made.callback(self.errors.close)
            self._feeders: list[Feeder] = []
            for data, hold in ((stdin, hold_stdin), *((given[fd], False) for fd in self._targets)):
                self._feeders.append(Feeder(data, hold=hold))
                made.callback(self._feeders[-1].close)
            self._control, self._theirs = socket.socketpair()
            made.pop_all()
        self._token = order.directory.rsplit("/", 1)[1] + secrets.token_hex((TOKEN_LETTERS - JOB_LETTERS) // 2)
        self._loop = asyncio.get_running_loop()
        self._control.setblocking(False)
        self._heard = b""
        self._ordered = False
        self._started: asyncio.Future[None] = self._loop.create_future()
        self._hung_up = asyncio.Event()
        self._gone = False
        self._link: Link | None = None
        self._answer: asyncio.Future[Answer] | None = None

    async def start(self) -> None:
        """Return once the program runs. Raises BackendError (``crashed``) where it does not come to that."""
        self._link = warden(self.order.root)
        feeders = [feeder.pipe for feeder in self._feeders]
        pipes = [feeders[0], self.output.pipe, self.errors.pipe, *feeders[1:]]
        fds = [self._theirs.fileno(), self.order.lock_fd, *(pipe.theirs for pipe in pipes)]
        try:
            self._answer = self._link.start(self._token, self._end_ms(), fds)
        except OSError as err:
            raise self._refused(f"no warden: {err.strerror or err}") from err
        self._answer.add_done_callback(self._answered)
        self._theirs.close()
        for pipe in pipes:
            pipe.passed_on()
        self._loop.add_reader(self._control, self._hear)
        self.errors.start(self._loop)
        try:
            await self._loop.sock_sendall(self._control, self._spec().pack())
            self._ordered = True
        except OSError:
            # It ended before it had read all: what the warden or the guard said of it comes next.
            self._hear()
        await self._started
        for feeder in self._feeders:
            feeder.start(self._loop)

    def _end_ms(self) -> int:
        return int((self.order.grace_s + KILL_WAIT_S + _SLACK_S) * 1000)

    def _spec(self) -> Spec:
        order = self.order
        return Spec(
            run=self._token,
            level=order.level,
            command=[_plain(argument) for argument in order.command],
            environment={_plain(name): _plain(value) for name, value in order.environment.items()}
            | {"PROMPTMILL_GUARD": self._token},
            directory=order.directory,
            work=order.work,
            targets=[0, 1, 2, *self._targets],
            grace_s=order.grace_s,
            run_s=order.run_s,
            memory_bytes=order.memory_bytes,
            open_files=order.open_files,
        )

    def _refused(self, why: str) -> BackendError:
        return BackendError(f"{self.order.name} cannot be started: {why}", code="crashed")

    def _answered(self, answer: asyncio.Future[Answer]) -> None:
        if answer.cancelled() or answer.exception() is not None:
            return
        if answer.result().letter == "F":
            self._fail_start(f"no process for its guard: {os.strerror(answer.result().number)}")

    def _fail_start(self, why: str) -> None:
        if not self._started.done():
            self._started.set_exception(self._refused(why))
            self._started.exception()  # a caller that was cancelled meanwhile does not ask

    def _hear(self) -> None:
        try:
            piece = self._control.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        if not piece:
            self._loop.remove_reader(self._control)
            self._fail_start("its guard died")
            self._exit(-signal.SIGKILL)
            self._hung_up.set()
            return
        *lines, self._heard = (self._heard + piece).split(b"\n")
        for line in lines:
            word, _, rest = line.decode("utf-8", "replace").partition(" ")
            if word == "exec":
                self.pid = int(rest)
                counted["started"] += 1
                if not self._started.done():
                    self._started.set_result(None)
            elif word == "failed":
                self._fail_start(rest)
            elif word == "exit":
                self._exit(int(rest))
            elif word == "gone":
                self._gone = True

    def _exit(self, status: int) -> None:
        if self.status is None:
            self.status = status
            self.errors.finish()
            self.output.end()
            self.exited.set()

    async def close(self) -> None:
        """End it, and return when nothing of it is left, however often this is cancelled meanwhile. Bounded."""
        if self.pid and self.status is None:
            counted["killed"] += 1
        await to_the_end(self._end())

    async def _end(self) -> None:
        try:
            if self._answer is not None and self._link is not None:
                await self._end_guard(self._link, self._answer)
        finally:
            if self.pid:
                counted["ended"] += 1
            self._loop.remove_reader(self._control)
            self._control.close()
            self._theirs.close()
            for feeder in self._feeders:
                feeder.close()
            self.output.close()
            self.errors.close()

    async def _end_guard(self, link: Link, answer: asyncio.Future[Answer]) -> None:
        try:
            if self._ordered:
                self._control.send(b"end\n")
            else:
                self._control.shutdown(socket.SHUT_WR)  # it reads its orders: half of them are none
        except OSError:
            self._hear()  # the guard is gone, or has more to read than it ever will: the warden decides
        if not await self._over(answer, self.order.grace_s + KILL_WAIT_S + _SLACK_S):
            logger.error("the guard of %s does not end: killing it", self.order.name)
            try:
                link.kill(self._token)
            except OSError:
                logger.exception("the warden of the programs cannot be asked")
        if await self._over(answer, KILL_WAIT_S + _SLACK_S) and self._clean(answer):
            return
        if sys.platform != "linux" and self.pid:
            self._signal_group()
        await self._clear()

    async def _over(self, answer: asyncio.Future[Answer], timeout_s: float) -> bool:
        """True when the warden answered; where it died, when the guard hung up, which every end of it makes it do."""
        hung_up = asyncio.ensure_future(self._hung_up.wait())
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.wait({answer})
                if answer.exception() is not None:
                    await hung_up
        except TimeoutError:
            return False
        finally:
            hung_up.cancel()
        return True

    def _clean(self, answer: asyncio.Future[Answer]) -> bool:
        if answer.exception() is not None:
            self._hear_rest()
            return self._gone
        return answer.result().letter in {"G", "F"}

    def _hear_rest(self) -> None:
        while not self._hung_up.is_set():
            before = self._heard
            self._hear()
            if self._heard == before:
                return

    async def _clear(self) -> None:
        """The guard and its warden died, or something does not end: another warden looks for what is left."""
        try:
            async with asyncio.timeout(KILL_WAIT_S + _SLACK_S):
                answer = await warden(self.order.root).clear(self._token)
        except (TimeoutError, WardenDied, OSError):
            logger.exception("what %s left behind is not known", self.order.name)
            return
        if answer.letter != "G":
            logger.error("%s left processes behind that do not end; the kernel holds them", self.order.name)

    def _signal_group(self) -> None:
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return  # gone already; macOS says "not permitted" of a group of zombies
