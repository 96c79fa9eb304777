"""Quarantine: a job that lost its worker twice runs alone, so that the next crash shows whose fault it is.

Its process is a worker without a consumer: it claims, beats and is watched as any other, runs that one job, and ends.
It is forked by a process that has all the code loaded and does nothing else
(:mod:`promptmill_workers.quarantined`), which is told over a pipe which jobs to run, and says over another how each
ended.

Who wins the race:

==============================================  ====================================================================
the process dies, its worker lives and sees it  the job ends as ``poisoned``, at once
the process dies together with its worker,      nobody saw whose fault it was: watchers give the job back to the queue,
or with the process that forked it              and it runs alone again, up to the bound on crashes
the worker stops                                the process hands its job back, then ends
the worker freezes                              the process goes on, under its own heartbeat
==============================================  ====================================================================
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, Self

from promptmill.errors import ConfigError
from promptmill.settings import Settings, addresses_to_hand_on, child_environment
from promptmill_workers.meters import note_alone

logger = logging.getLogger(__name__)

READY: Final = "ready"
RUN: Final = "run"
STOP: Final = "stop"
KILL: Final = "kill"
EXIT_BROKEN: Final = 7
"""The process ended because a part of it did, which no job is to blame for."""

_PROCESSES: Final = 16
"""Where a whole worker was killed twice, all of its jobs come here."""
_IDLE_S: Final = 30.0
_STOP_S: Final = 5.0


class NotStarted(Exception):
    """Nothing was run, for which no job is to blame."""


class _Gone(Exception):
    """The process that forks ended, and all that it forked with it."""


class _Run:
    """One forked process."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.worker_id = ""
        self.status: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        """How it ended: its exit status, ``-9`` for a signal; :class:`_Gone` where nobody was left to see it."""


class _Nursery:
    """The process that forks. It is started for the first job, and ended some time after the last one."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._numbers = itertools.count(1)
        self._runs: dict[int, _Run] = {}
        self._listening: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, settings: Settings, name: str, family: str) -> Self:
        """Raises NotStarted."""
        config = ("--config", str(settings.config_file)) if settings.config_file else ()
        try:
            addresses = addresses_to_hand_on(settings.config_file, settings.redis_url, settings.broker_url)
        except ConfigError as err:  # the file was changed, or a secret taken away, since the worker started
            raise NotStarted(err.message) from None
        shared = {**addresses, "log_level": settings.log_level}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "promptmill_workers.quarantined", "--name", name, "--family", family, *config),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=child_environment(shared),
            # What is sent to the worker's group is the worker's to act on.
            start_new_session=True,
        )
        nursery = cls(process)
        assert process.stdout is not None  # noqa: S101 - for the type checker
        try:
            said = await process.stdout.readline()
        except BaseException:
            await nursery.stop()
            raise
        if said.decode().strip() != READY:
            raise NotStarted(f"exit status {await process.wait()}")
        nursery._listening = asyncio.create_task(nursery._listen(process.stdout), name="quarantine")
        return nursery

    @property
    def alive(self) -> bool:
        """False once it ended."""
        return self._process.returncode is None

    @property
    def busy(self) -> bool:
        """Whether anything that it forked still runs."""
        return bool(self._runs)

    def run(self, job_id: str) -> _Run:
        """Fork a process for a job."""
        run = _Run(next(self._numbers))
        self._runs[run.number] = run
        self._say(f"{RUN} {run.number} {job_id}")
        return run

    async def hand_back(self, run: _Run) -> None:
        """Have a process give its job back and end; kill it where that takes too long."""
        self._say(f"{STOP} {run.number}")
        ended, _ = await asyncio.wait({run.status}, timeout=_STOP_S)
        if not ended:
            logger.warning("the quarantine process %s does not end: killed", run.worker_id)
            self._say(f"{KILL} {run.number}")
            await asyncio.wait({run.status})

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None  # noqa: S101 - for the type checker
        self._process.stdin.write(f"{line}\n".encode())

    async def _listen(self, stdout: asyncio.StreamReader) -> None:
        while (line := await stdout.readline()).endswith(b"\n"):
            word, number, what = line.decode().split()
            run = self._runs[int(number)]
            if word == "runs":
                run.worker_id = what
            else:
                del self._runs[run.number]
                run.status.set_result(int(what))
        status = await self._process.wait()
        for run in self._runs.values():
            run.status.set_exception(_Gone(f"exit status {status}"))
            run.status.exception()  # whoever waited may have been cancelled
        self._runs.clear()

    async def stop(self) -> None:
        """End it; what it forked dies with it."""
        assert self._process.stdin is not None  # noqa: S101 - for the type checker
        self._process.stdin.close()
        await self._process.wait()
        if self._listening is not None:
            await self._listening


class Quarantine:
    """The quarantine processes of one worker. Use from its event loop.

    ``convict`` is called with the worker id of a process that was seen to die with a job in it.
    """

    def __init__(self, settings: Settings, name: str, family: str, convict: Callable[[str], Awaitable[None]]) -> None:
        self._settings = settings
        self._name = f"{name}-alone"
        self._family = family
        self._convict = convict
        self._places = asyncio.Semaphore(_PROCESSES)
        self._starting = asyncio.Lock()
        self._nursery: _Nursery | None = None
        self._retiring: asyncio.TimerHandle | None = None
        self._ending: set[asyncio.Task[None]] = set()

    async def run(self, job_id: str) -> None:
        """Run a job that only a process of its own may claim; returns when it is through with it. Cancelled, the
        process hands the job back."""
        async with self._places:
            try:
                nursery = await self._ready()
            except NotStarted as err:
                # The job stays in the queue, and the sweep sends its message again.
                logger.error("no quarantine process for job %s: %s", job_id, err, extra={"job_id": job_id})  # noqa: TRY400 - it says all there is
                note_alone("not_started")
                return
            run = nursery.run(job_id)
            try:
                status = await asyncio.shield(run.status)
            except _Gone as err:
                logger.warning(
                    "job %s is left to the watchers, all quarantine processes ended: %s",
                    job_id,
                    err,
                    extra={"job_id": job_id},
                )
                note_alone("broke")
            except asyncio.CancelledError:
                await asyncio.shield(self._keep(nursery.hand_back(run)))
                raise
            else:
                await self._judge(run, job_id, status)
            finally:
                self._rest(nursery)

    async def _ready(self) -> _Nursery:
        """The process that forks. Raises NotStarted."""
        async with self._starting:
            if self._retiring is not None:
                self._retiring.cancel()
            if self._nursery is None or not self._nursery.alive:
                self._nursery = await _Nursery.start(self._settings, self._name, self._family)
            return self._nursery

    async def _judge(self, run: _Run, job_id: str, status: int) -> None:
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        if status == 0:
            note_alone("ended")
            logger.info("job %s ran alone in %s", job_id, run.worker_id, extra={"job_id": job_id})
        elif not run.worker_id:
            note_alone("not_started")
            logger.error("no quarantine process for job %s: %s", job_id, how, extra={"job_id": job_id})
        elif status == EXIT_BROKEN:
            note_alone("broke")
            logger.error(
                "quarantine process %s broke: job %s is left to the watchers",
                run.worker_id,
                job_id,
                extra={"job_id": job_id},
            )
        else:
            note_alone("died")
            logger.error(
                "quarantine process %s died of job %s: %s", run.worker_id, job_id, how, extra={"job_id": job_id}
            )
            await self._convict(run.worker_id)

    def _rest(self, nursery: _Nursery) -> None:
        """Let it end after a while without a job."""
        if nursery is self._nursery and not nursery.busy:
            if self._retiring is not None:
                self._retiring.cancel()
            self._retiring = asyncio.get_running_loop().call_later(_IDLE_S, self._retire, nursery)

    def _retire(self, nursery: _Nursery) -> None:
        if nursery is self._nursery and not nursery.busy and not self._starting.locked():
            self._nursery = None
            self._keep(nursery.stop())

    def _keep(self, act: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(act, name="quarantine")
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        return task

    async def aclose(self) -> None:
        """End every process. Jobs that still run in one were handed back before."""
        if self._retiring is not None:
            self._retiring.cancel()
        while self._ending:
            await asyncio.wait(set(self._ending))
        if self._nursery is not None:
            await self._nursery.stop()
            self._nursery = None
