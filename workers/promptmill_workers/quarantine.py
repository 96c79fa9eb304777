"""Quarantine: a job that lost its worker twice runs alone, so that the next crash shows whose fault it is.

Its process is a worker without a consumer (:mod:`promptmill_workers.quarantined`): it claims, beats and is watched as
any other. It is told over a pipe which job to run, and says over another when it is through with it; one runs a job at
a time, and several after each other while none of them kills it.

Who wins the race:

==============================================  ====================================================================
the process dies, its worker lives and sees it  the job ends as ``poisoned``, at once
the process dies together with its worker       nobody saw whose fault it was: watchers give the job back to the queue,
                                                and it runs alone again, up to the bound on crashes
the worker stops                                the process hands its job back, then ends
the worker freezes                              the process goes on, under its own heartbeat
==============================================  ====================================================================
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable
from typing import Final, Self

from promptmill.settings import Settings, child_environment

logger = logging.getLogger(__name__)

STOP: Final = "stop"
EXIT_BROKEN: Final = 7
"""The process ended because a part of it did, which no job is to blame for."""

_PROCESSES: Final = 4
"""Each takes about 80 MB. Where a whole worker was killed twice, all of its jobs come here."""
_IDLE_S: Final = 30.0
_STOP_S: Final = 5.0


class Died(Exception):
    """The process ended while a job was in it; ``status`` as :class:`subprocess.Popen` tells it."""

    def __init__(self, status: int) -> None:
        super().__init__(f"signal {-status}" if status < 0 else f"exit status {status}")
        self.status = status


class NotStarted(Exception):
    """The process ended before it could run anything."""


class _Process:
    """One process; runs one job at a time."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.worker_id = ""
        self.retiring: asyncio.TimerHandle | None = None

    @classmethod
    async def start(cls, settings: Settings, name: str, family: str) -> Self:
        """Raises NotStarted."""
        config = ("--config", str(settings.config_file)) if settings.config_file else ()
        shared = {"redis_url": settings.redis_url, "broker_url": settings.broker_url, "log_level": settings.log_level}
        made = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "promptmill_workers.quarantined", "--name", name, "--family", family, *config),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=child_environment(shared),
            # What is sent to the worker's group is the worker's to act on.
            start_new_session=True,
        )
        process = cls(made)
        try:
            process.worker_id = await process._line()
        except Died as err:
            raise NotStarted(str(err)) from err
        except BaseException:
            await process.stop()
            raise
        return process

    @property
    def alive(self) -> bool:
        """False once it ended."""
        return self._process.returncode is None

    async def run(self, job_id: str) -> None:
        """Have it run a job to its end. Raises Died."""
        assert self._process.stdin is not None  # noqa: S101 - for the type checker
        self._process.stdin.write(f"{job_id}\n".encode())
        await self._line()

    async def _line(self) -> str:
        assert self._process.stdout is not None  # noqa: S101 - for the type checker
        line = await self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise Died(await self._process.wait())
        return line.decode().strip()

    async def stop(self) -> None:
        """Let it hand its job back and end; kill it where that takes too long."""
        if self.retiring is not None:
            self.retiring.cancel()
        assert self._process.stdin is not None  # noqa: S101 - for the type checker
        self._process.stdin.write(f"{STOP}\n".encode())
        try:
            async with asyncio.timeout(_STOP_S):
                await self._process.wait()
        except TimeoutError:
            logger.warning("the quarantine process %s does not end: killed", self.worker_id)
            self._process.kill()
            await self._process.wait()


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
        self._idle: list[_Process] = []
        self._ending: set[asyncio.Task[None]] = set()

    async def run(self, job_id: str) -> None:
        """Run a job that only a process of its own may claim; returns when it is through with it. Cancelled, the
        process hands the job back."""
        async with self._places:
            try:
                process = await self._free()
            except NotStarted as err:
                # The job stays in the queue, and the sweep sends its message again.
                logger.error("no quarantine process for job %s: %s", job_id, err)  # noqa: TRY400 - it says all there is
                return
            logger.info("job %s runs alone in %s", job_id, process.worker_id)
            try:
                await process.run(job_id)
            except Died as err:
                await self._died(process, job_id, err)
            except BaseException:
                await asyncio.shield(self._end(process))
                raise
            else:
                process.retiring = asyncio.get_running_loop().call_later(_IDLE_S, self._retire, process)
                self._idle.append(process)

    async def _free(self) -> _Process:
        """One that waits for a job, or a new one. Raises NotStarted."""
        while self._idle:
            process = self._idle.pop()
            if process.retiring is not None:
                process.retiring.cancel()
            if process.alive:
                return process
        return await _Process.start(self._settings, self._name, self._family)

    async def _died(self, process: _Process, job_id: str, err: Died) -> None:
        if err.status == EXIT_BROKEN:
            logger.error("quarantine process %s broke: job %s is left to the watchers", process.worker_id, job_id)
            return
        logger.error("quarantine process %s died of job %s: %s", process.worker_id, job_id, err)
        await self._convict(process.worker_id)

    def _retire(self, process: _Process) -> None:
        if process in self._idle:
            self._idle.remove(process)
            self._end(process)

    def _end(self, process: _Process) -> asyncio.Task[None]:
        task = asyncio.create_task(process.stop(), name="quarantine")
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        return task

    async def aclose(self) -> None:
        """End every process. Jobs that still run in one are handed back."""
        while self._idle:
            self._retire(self._idle[0])
        if self._ending:
            await asyncio.wait(set(self._ending))
