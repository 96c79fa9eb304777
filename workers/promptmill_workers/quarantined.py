"""``python -m promptmill_workers.quarantined``: a worker that runs one job at a time, each told by its parent.

Started by :mod:`promptmill_workers.quarantine`. Lines on standard output: its worker id, then the id of each job that
it is through with. Lines on standard input: a job's id; ``stop``. The end of its input means that the worker which
started it is dead, and then it dies at once: the watchers give its job back.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Final

import uvloop

from promptmill.errors import PromptmillError
from promptmill.settings import Settings
from promptmill_workers.child import take_output
from promptmill_workers.engine import Engine
from promptmill_workers.entry import read_arguments
from promptmill_workers.process import prepare_process
from promptmill_workers.quarantine import EXIT_BROKEN, STOP
from promptmill_workers.watchdog import Watchdog

_LOOK_S: Final = 1.0
_EXIT_FAILED: Final = 1
_SILENCE: Final = 0.7
"""A part of the time after which a silent worker counts as dead."""


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until told to stop. Never returns."""
    output = take_output()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # The worker decides when this ends: a signal to all of a service's processes must not look like a crash.
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        # Where memory runs out the kernel is to take this process, not a neighbour of the job. Elsewhere than on Linux
        # there is no such file.
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        settings, name, family = read_arguments(argv, "promptmill_workers.quarantined")
        prepare_process(settings)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_to_the_end(settings, name, family, output))
    except PromptmillError as err:
        sys.stderr.write(f"error [{err.code}]: {err.message}\n")
        sys.exit(_EXIT_FAILED)


async def _to_the_end(settings: Settings, name: str, family: str, output: IO[bytes]) -> None:
    code = await _main(settings, name, family, output)
    sys.stderr.flush()
    # From here, before anything joins threads: one that a library left behind must not keep the process.
    os._exit(code)


async def _main(settings: Settings, name: str, family: str, output: IO[bytes]) -> int:
    loop = asyncio.get_running_loop()
    orders: asyncio.Queue[str] = asyncio.Queue()
    threading.Thread(target=_hear, args=(loop, orders), name="orders", daemon=True).start()
    engine = await Engine.start(settings, name, family, alone=True)
    # Before others take its silence for a death that nobody saw: then a job that stalls it would not be convicted.
    watchdog = Watchdog(min(settings.loop_stall_s, settings.dead_after_s * _SILENCE))
    watchdog.start()
    _tell(output, engine.worker_id)
    code = await _serve(engine, orders, output)
    await engine.hand_back()
    await engine.aclose()
    watchdog.stop()
    return code


async def _serve(engine: Engine, orders: asyncio.Queue[str], output: IO[bytes]) -> int:
    """Run job after job until ``stop``, which may come in the middle of one."""
    order = asyncio.create_task(orders.get())
    job: asyncio.Task[None] | None = None
    while True:
        await asyncio.wait({order, *({job} if job else ())}, timeout=_LOOK_S, return_when=asyncio.FIRST_COMPLETED)
        if engine.broken is not None:
            return EXIT_BROKEN
        if job is not None and job.done():
            job.result()
            job = None
            _tell(output, "done")
        if order.done():
            if order.result() == STOP:
                return 0
            job = asyncio.create_task(engine.run_alone(order.result()))
            order = asyncio.create_task(orders.get())


def _hear(loop: asyncio.AbstractEventLoop, orders: asyncio.Queue[str]) -> None:
    with os.fdopen(os.dup(0), "rb") as given:
        for line in given:
            loop.call_soon_threadsafe(orders.put_nowait, line.decode().strip())
    os.kill(os.getpid(), signal.SIGKILL)


def _tell(output: IO[bytes], line: str) -> None:
    output.write(f"{line}\n".encode())


if __name__ == "__main__":
    main()
