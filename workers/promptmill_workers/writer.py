"""The one writer of a process: carries every job's events to the store in shared writes.

One write is one pipeline of one script call a job; the next begins when the last has returned. Idle, nothing waits.
Busy, rounds of writes begin at a distance in proportion to how many jobs the last one carried, up to 25 ms, so there
are fewer and larger ones; a job that no one reads may wait up to 250 ms.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Any, Final

from redis.exceptions import NoScriptError, RedisError, ResponseError

from promptmill.store.cluster_wire import ClusterWire
from promptmill.store.connection import reason
from promptmill.store.link import Command
from promptmill.store.scripts import APPEND, FENCED, GONE
from promptmill.store.wire import Wire
from promptmill_workers.joblog import JobLog

logger = logging.getLogger(__name__)

_PAUSE_PER_JOB_S: Final = 0.0005
_PAUSE_MAX_S: Final = 0.025
_QUIET_PAUSE_S: Final = 0.250
_JOBS_PER_WRITE: Final = 500
_BACKOFF_MAX_S: Final = 1.0

_EVALSHA: Final = b"EVALSHA"
_SHA: Final = APPEND.sha.encode()


class Writer:
    """Writes the logs of all running jobs of a process. Start it once; use from the loop that started it."""

    def __init__(self, wire: Wire | ClusterWire) -> None:
        self._wire = wire
        self._dirty: list[JobLog] = []
        self._quiet: list[JobLog] = []
        self._open: set[JobLog] = set()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._ticker: asyncio.TimerHandle | None = None
        self._verified = asyncio.Event()
        self.pieces = 0
        """How many pieces of text came from backends."""
        self.serial = 0
        """The connection on which the store was asked what it has. Another may lead to a server that lost its tail."""
        self.on_fenced: Any = None
        """Called with the log of a job whose claim turned out to be no longer ours."""
        self.on_written: Callable[[int, float], None] = lambda _events, _lag_s: None
        """Told after each write how many events it had, and for how long the first of them had been due."""
        self._due_since: float | None = None

    def start(self) -> None:
        """Begin to write."""
        self._task = asyncio.create_task(self._run(), name="writer")

    @property
    def tasks(self) -> tuple[asyncio.Task[None], ...]:
        """What must not end by itself."""
        return (self._task,) if self._task is not None else ()

    async def aclose(self) -> None:
        """Stop. What was not written stays unwritten: let jobs settle first."""
        if self._ticker is not None:
            self._ticker.cancel()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def open(self, job_id: str, claim: str, epoch: int) -> JobLog:
        """A log for a claim that was just made."""
        log = JobLog(job_id, claim, epoch)
        self._open.add(log)
        return log

    def close(self, log: JobLog) -> None:
        """Forget a log; what it still holds is dropped."""
        self._open.discard(log)
        log.release()

    def mark(self, log: JobLog) -> None:
        """There is something new in ``log``. Cheap: called for every token."""
        if log.dirty:
            return
        log.dirty = True
        log.idle.clear()
        if log.quiet:
            self._quiet.append(log)
            if self._ticker is None:
                self._ticker = asyncio.get_running_loop().call_later(_QUIET_PAUSE_S, self._quiet_due)
        else:
            self._add_due(log)

    def _add_due(self, log: JobLog) -> None:
        if self._due_since is None:
            self._due_since = asyncio.get_running_loop().time()
        self._dirty.append(log)
        self._wake.set()

    @property
    def unsent_bytes(self) -> int:
        """What all jobs have to tell that the store does not have. May be asked from any thread."""
        return sum(log.unsent_bytes for log in tuple(self._open))

    async def settle(self, log: JobLog) -> None:
        """Return once the store has everything of ``log``, or never will (then ``log.fenced`` or ``log.lost``)."""
        log.urgent = True
        if self._wire.serial != self.serial:
            self.suspect()
        if log in self._quiet:
            self._quiet.remove(log)
            self._add_due(log)
        while True:
            await self._verified.wait()
            if log.settled:
                return
            await log.idle.wait()

    def suspect(self) -> None:
        """The store failed somewhere: it may have restarted and lost its tail. Ask before relying on what it had."""
        self._verified.clear()
        self._wake.set()

    def _quiet_due(self) -> None:
        self._ticker = None
        due, self._quiet = self._quiet, []
        for log in due:
            self._add_due(log)

    # -- the loop -----------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        backoff = 0.05
        clock = asyncio.get_running_loop().time
        while True:
            if not self._dirty and self._verified.is_set():
                self._wake.clear()
                await self._wake.wait()
            try:
                if self._wire.serial != self.serial or not self.serial:
                    self._verified.clear()
                if not self._verified.is_set():
                    await self._rewind_all()
                began = clock()
                carried = await self._write()
                backoff = 0.05
            except (RedisError, OSError, asyncio.IncompleteReadError) as err:
                logger.warning("events wait, the store does not answer: %s", reason(err))
                # What the store has is unknown now, and a restarted one may have lost its tail: ask before writing on.
                self.suspect()
                await asyncio.sleep(backoff * random.uniform(0.5, 1.5))  # noqa: S311 - spreads retries, no secret
                backoff = min(backoff * 2, _BACKOFF_MAX_S)
                continue
            pause = began + min(carried * _PAUSE_PER_JOB_S, _PAUSE_MAX_S) - clock()
            if pause > 0:
                await asyncio.sleep(pause)

    async def _write(self) -> int:
        """Write what is due; answers how many jobs had something. Logs stay dirty where it fails."""
        batch = self._dirty[:_JOBS_PER_WRITE]
        began = asyncio.get_running_loop().time()
        commands: list[Command] = []
        carried: list[tuple[JobLog, int]] = []
        events = 0
        for log in batch:
            if log.fenced or log.lost:
                log.release()
                continue
            log.freeze()
            first, payloads = log.unsent()
            if payloads:
                commands.append(self._append(log, first, payloads))
                carried.append((log, first + len(payloads) - 1))
                events += len(payloads)
        if commands:
            replies = await self._wire.many_on(self.serial, commands)
            if any(isinstance(r, NoScriptError) for r in replies):
                replies = (await self._wire.many_on(self.serial, [(b"SCRIPT", b"LOAD", APPEND.source), *commands]))[1:]
        else:
            replies = []
        if commands:
            lag_s = asyncio.get_running_loop().time() - (self._due_since or began)
            self.on_written(events, lag_s)
        del self._dirty[: len(batch)]
        if len(batch) < _JOBS_PER_WRITE:  # else some found no room in this write
            self._due_since = began if self._dirty else None
        for log in batch:
            log.dirty = False
        refused: ResponseError | None = None
        for (log, last), reply in zip(carried, replies, strict=True):
            if isinstance(reply, ResponseError):
                # Out of memory, read-only, still loading: the store may take it later.
                refused = reply
                self._requeue(log)
            else:
                self._settle_reply(log, last, reply)
        if refused is not None:
            raise refused
        return len(carried)

    @staticmethod
    def _append(log: JobLog, first: int, payloads: list[bytes]) -> Command:
        return (_EVALSHA, _SHA, b"2", log.record_key, log.log_key, log.claim, log.epoch, first, *payloads)

    def _settle_reply(self, log: JobLog, last: int, reply: Any) -> None:
        if reply == FENCED:
            log.fenced = True
            log.release()
            if self.on_fenced is not None:
                self.on_fenced(log)
        elif reply == GONE:
            logger.warning("the log of job %s is gone from the store", log.job_id, extra={"job_id": log.job_id})
            log.lost = True
            log.release()
        else:
            log.quiet = reply == 0 and not log.urgent
            log.acknowledge(last)
            if log.last_n > last or not log.settled:
                self.mark(log)

    def _requeue(self, log: JobLog) -> None:
        if not log.dirty:
            log.dirty = True
            self._add_due(log)

    async def _rewind_all(self) -> None:
        """Ask the store for the last event of every open log, and set back those whose tail it lost."""
        serial = await self._wire.connected()
        logs = [log for log in self._open if not (log.fenced or log.lost)]
        for start in range(0, len(logs), _JOBS_PER_WRITE):
            part = logs[start : start + _JOBS_PER_WRITE]
            asked: list[Command] = [(b"XREVRANGE", log.log_key, b"+", b"-", b"COUNT", b"1") for log in part]
            replies = await self._wire.many_on(serial, asked)
            for log, reply in zip(part, replies, strict=True):
                if isinstance(reply, ResponseError):
                    raise reply
                epoch, _, n = (reply[0][0] if reply else b"0-0").partition(b"-")
                if epoch == log.epoch:
                    log.rewind(int(n))
                if log.acked < log.last_n or not reply:
                    self._requeue(log)
        self.serial = serial
        self._verified.set()
