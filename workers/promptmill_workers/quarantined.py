"""``python -m promptmill_workers.quarantined``: forks a process for each job that its parent names.

Started by :mod:`promptmill_workers.quarantine`. Everything is imported before the first fork, so that a job's process
begins within a tenth of a second: where many workers die at once, their suspects must not keep the machine from
starting new ones. For the same reason all of them run at a lower priority than the workers.

=====================  ==============================================================================================
line on standard input
---------------------------------------------------------------------------------------------------------------------
``run N JOB``          fork; ``N`` names that process from now on
``stop N``             have it hand its job back
``kill N``
line on standard output
---------------------------------------------------------------------------------------------------------------------
``ready``
``runs N WORKER``      it beats and claims under this worker id; before, no job is to blame for its end
``ended N STATUS``     its exit status, ``-9`` for a signal
=====================  ==============================================================================================

The end of standard input means that the worker which started it is dead. Then it dies at once, and with it every
process that it forked: the watchers give their jobs back.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import selectors
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Final, NoReturn

import uvloop

from promptmill.errors import BackendError, ConfigError, MissingExtra, PromptmillError
from promptmill.settings import Settings
from promptmill.tracing import flush_tracing, start_tracing
from promptmill.usage import warm
from promptmill_workers.child import take_output
from promptmill_workers.engine import Engine
from promptmill_workers.entry import read_arguments
from promptmill_workers.isolated import make_backend
from promptmill_workers.process import prepare_process
from promptmill_workers.quarantine import EXIT_BROKEN, KILL, READY, RUN, STOP
from promptmill_workers.watchdog import Watchdog

logger = logging.getLogger(__name__)

_LOOK_S: Final = 1.0
_EXIT_FAILED: Final = 1
_NICE: Final = 5
_STOP_SIGNAL: Final = signal.SIGUSR1
_SILENCE: Final = 0.7
"""A part of the time after which a silent worker counts as dead."""


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until standard input ends. Never returns."""
    output = take_output()
    os.nice(_NICE)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # The worker decides when this ends: a signal to all of a service's processes must not look like a crash.
        signal.signal(number, signal.SIG_IGN)
    # Until a forked process can act on it: its default would end that process as if its job had.
    signal.pthread_sigmask(signal.SIG_BLOCK, {_STOP_SIGNAL})
    try:
        settings, name, family = read_arguments(argv, "promptmill_workers.quarantined")
        prepare_process(settings)
        asyncio.run(_import_all(settings, family))
        gc.collect()
        gc.freeze()  # what is shared with the forked processes stays shared
        _Nursery(settings, name, family, output).serve()
    except PromptmillError as err:
        sys.stderr.write(f"error [{err.code}]: {err.message}\n")
        sys.exit(_EXIT_FAILED)


async def _import_all(settings: Settings, family: str) -> None:
    models = {name: model for name, model in settings.models.items() if model.worker_family == family}
    for name, model in models.items():
        try:
            backend = make_backend(name, model)
        except (BackendError, ConfigError, MissingExtra) as err:
            logger.debug("model %s is left to its jobs: %s", name, err)
        else:
            await backend.aclose()
    warm(list(models.values()))


def _woken_up(number: int, frame: FrameType | None) -> None:
    """A signal without a handler would not be told to the wakeup descriptor."""
    del number, frame


class _Nursery:
    """The process without an event loop, which only forks, and says how those that it forked ended."""

    def __init__(self, settings: Settings, name: str, family: str, output: IO[bytes]) -> None:
        self._settings = settings
        self._name = name
        self._family = family
        self._output = output
        self._pids: dict[str, int] = {}
        self._lifeline, self._held = os.pipe()
        """The kernel closes the held end when this process dies, however it does."""
        self._wakes, self._woken = os.pipe()

    def serve(self) -> None:
        """Until standard input ends."""
        os.set_blocking(self._woken, False)
        os.set_blocking(self._wakes, False)
        signal.set_wakeup_fd(self._woken)
        signal.signal(signal.SIGCHLD, _woken_up)
        self._tell(READY)
        rest = b""
        with selectors.DefaultSelector() as selector:
            selector.register(0, selectors.EVENT_READ)
            selector.register(self._wakes, selectors.EVENT_READ)
            while True:
                ready = {key.fd for key, _ in selector.select()}
                if self._wakes in ready:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._wakes, 4096)
                    self._reap()
                if 0 in ready:
                    given = os.read(0, 65536)
                    if not given:
                        return
                    *lines, rest = (rest + given).split(b"\n")
                    for line in lines:
                        self._obey(*line.decode().split())

    def _obey(self, word: str, number: str, job_id: str = "") -> None:
        pid = self._pids.get(number)
        if word == RUN:
            try:
                pid = os.fork()
            except OSError as err:
                logger.error("no process can be forked: %s", err.strerror)  # noqa: TRY400 - it says all there is
                self._tell(f"ended {number} {_EXIT_FAILED}")
                return
            if pid == 0:
                self._become(number, job_id)
            self._pids[number] = pid
        elif pid is not None:  # it may have ended meanwhile
            os.kill(pid, {STOP: _STOP_SIGNAL, KILL: signal.SIGKILL}[word])

    def _reap(self) -> None:
        for number, pid in list(self._pids.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del self._pids[number]
                self._tell(f"ended {number} {os.waitstatus_to_exitcode(status)}")

    def _tell(self, line: str) -> None:
        self._output.write(f"{line}\n".encode())

    # -- in the forked process ----------------------------------------------------------------------------------

    def _become(self, number: str, job_id: str) -> NoReturn:
        """Run the job, and end."""
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.close(self._held)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            with contextlib.suppress(OSError):
                # Where memory runs out the kernel is to take this process, not a neighbour of the job. Elsewhere than
                # on Linux there is no such file.
                Path("/proc/self/oom_score_adj").write_text("1000")
            threading.Thread(target=self._die_with_parent, name="lifeline", daemon=True).start()
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._to_the_end(number, job_id))
        except BaseException as err:  # noqa: BLE001 - never back into the loop of the process that forked
            sys.stderr.write(f"quarantine process {os.getpid()} failed: {err!r}\n")
        os._exit(_EXIT_FAILED)

    def _die_with_parent(self) -> None:
        os.read(self._lifeline, 1)
        os.kill(os.getpid(), signal.SIGKILL)

    async def _to_the_end(self, number: str, job_id: str) -> None:
        code = await self._run(number, job_id)
        sys.stderr.flush()
        # From here, before anything joins threads: one that a library left behind must not keep the process.
        os._exit(code)

    async def _run(self, number: str, job_id: str) -> int:
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(_STOP_SIGNAL, stop.set)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {_STOP_SIGNAL})
        settings = self._settings
        start_tracing(settings, "quarantine")  # here, for its threads would not survive the fork
        engine = await Engine.start(settings, self._name, self._family, alone=True)
        # Before others take its silence for a death that nobody saw: then a job that stalls it would not be convicted.
        watchdog = Watchdog(min(settings.loop_stall_s, settings.dead_after_s * _SILENCE))
        watchdog.start()
        self._tell(f"runs {number} {engine.worker_id}")
        code = await self._serve(engine, job_id, stop)
        await engine.hand_back()
        await engine.aclose()
        await asyncio.to_thread(flush_tracing)
        watchdog.stop()
        return code

    @staticmethod
    async def _serve(engine: Engine, job_id: str, stop: asyncio.Event) -> int:
        """Run the job until it ends, or is to be handed back."""
        job = asyncio.create_task(engine.run_alone(job_id))
        asked = asyncio.create_task(stop.wait())
        while not asked.done():
            await asyncio.wait({asked, job}, timeout=_LOOK_S, return_when=asyncio.FIRST_COMPLETED)
            if engine.broken is not None:
                return EXIT_BROKEN
            if job.done():
                job.result()
                break
        asked.cancel()
        return 0


if __name__ == "__main__":
    main()
