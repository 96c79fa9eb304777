"""A worker process: who owns the signals, and in which order things stop.

First SIGTERM or SIGINT: no more claims, running jobs finish up to ``drain_s``, the rest are handed back. Second:
running jobs are handed back at once. Celery's own handlers are not installed: its warm stop waits without limit and
ignores a second TERM.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from typing import Final, NoReturn

import uvloop

from promptmill.lifeline import watch_lifeline
from promptmill.metrics import follow_store, loop_lag, metrics_port
from promptmill.settings import Settings
from promptmill.tracing import flush_tracing, start_tracing
from promptmill.tuning import raise_file_limit, tune_interpreter
from promptmill_workers.consumer import Consumer
from promptmill_workers.engine import Engine
from promptmill_workers.meters import measured
from promptmill_workers.watchdog import Watchdog

logger = logging.getLogger(__name__)

EXIT_OK: Final = 0
EXIT_BROKEN: Final = 7
"""A part of the process ended by itself: the supervisor starts a new one."""

_WATCH_S: Final = 1.0
_CONSUMER_STOP_S: Final = 3.0
_END_S: Final = 20.0
"""After the drain limit, or the second signal, the process is gone within that time, whatever does not answer."""
_ONE_WISH_S: Final = 0.2


def run_worker(settings: Settings, name: str, family: str) -> int:
    """Run a worker of ``family`` until it is told to stop; answers the exit code.

    Raises
    ------
    StoreUnavailable
        Redis is not there or not usable at the start.
    """
    watch_lifeline()
    prepare_process(settings)
    start_tracing(settings, "worker")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_to_the_end(settings, name, family))


def prepare_process(settings: Settings) -> None:
    """What holds for a whole process that runs jobs: what its logs may show, and how many files it may open."""
    # At debug the SDK writes whole requests, prompts and all, and no level of ours may show a prompt.
    logging.getLogger("anthropic").setLevel(logging.INFO)
    raise_file_limit()
    if settings.log_level != "debug":
        # Two lines a job would cost more than carrying its tokens.
        for noisy in ("celery.worker.strategy", "celery.app.trace"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        for handler in logging.getLogger().handlers:
            handler.addFilter(_without_foreign_traces)


async def _to_the_end(settings: Settings, name: str, family: str) -> int:
    _exit(await _main(settings, name, family))


def _without_foreign_traces(record: logging.LogRecord) -> bool:
    """Celery and kombu show the whole stack of every lost connection; its message says what an operator needs."""
    if record.name.startswith(("celery", "kombu")) and record.exc_info:
        error = record.exc_info[1]
        record.msg, record.args = f"{record.getMessage().strip()} ({type(error).__name__}: {error})", None
        record.exc_info = record.exc_text = None
    return True


async def _main(settings: Settings, name: str, family: str) -> int:
    loop = asyncio.get_running_loop()
    terms: asyncio.Queue[int] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, terms.put_nowait, number)
    engine = await Engine.start(settings, name, family)
    with metrics_port(settings), measured(engine), loop_lag():
        follow_store(engine.store)
        return await _work(engine, settings, terms)


async def _work(engine: Engine, settings: Settings, terms: asyncio.Queue[int]) -> int:
    loop = asyncio.get_running_loop()
    watchdog = Watchdog(settings.loop_stall_s)
    watchdog.start()
    consumer = Consumer(engine, settings, lambda: _call_soon(loop, engine))
    tune_interpreter()
    consumer.start()
    logger.info("worker %s started, family %s, concurrency %d", engine.worker_id, engine.family, settings.concurrency)
    code = await _until_stopped(engine, consumer, terms)
    consumer.pause()
    end = loop.call_later(settings.drain_s + _END_S, _give_up, code)
    drain = asyncio.create_task(engine.drain(settings.drain_s))
    again = asyncio.create_task(_second(terms))
    await asyncio.wait({drain, again}, return_when=asyncio.FIRST_COMPLETED)
    if not drain.done():
        logger.info("second signal: handing running jobs back")
        end.cancel()
        end = loop.call_later(_END_S, _give_up, code)
        drain.cancel()
        await asyncio.gather(drain, return_exceptions=True)
        await engine.hand_back()
    again.cancel()
    # Bounded: Celery waits for its threads without limit, and nothing runs in them any more.
    await asyncio.wait({asyncio.ensure_future(asyncio.to_thread(consumer.stop))}, timeout=_CONSUMER_STOP_S)
    await engine.aclose()
    await asyncio.to_thread(flush_tracing)
    watchdog.stop()
    end.cancel()
    logger.info("worker %s ended", engine.worker_id)
    return code


def _give_up(code: int) -> None:
    logger.warning("the end takes too long: what was not handed back is left to other processes' watchers")
    _exit(code)


def _exit(code: int) -> NoReturn:
    # Before anything joins threads: one of Celery's that does not end must not keep the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


async def _second(terms: asyncio.Queue[int]) -> None:
    # timeout(1) and some supervisors signal the process and then its group: that is one wish, not two.
    await asyncio.sleep(_ONE_WISH_S)
    while not terms.empty():
        terms.get_nowait()
    await terms.get()


def _call_soon(loop: asyncio.AbstractEventLoop, engine: Engine) -> None:
    asyncio.run_coroutine_threadsafe(engine.ready(), loop)


async def _until_stopped(engine: Engine, consumer: Consumer, terms: asyncio.Queue[int]) -> int:
    while True:
        try:
            async with asyncio.timeout(_WATCH_S):
                number = await terms.get()
        except TimeoutError:
            if not consumer.alive:
                logger.critical("Celery's consumer ended by itself")
                return EXIT_BROKEN
            if engine.broken is not None:
                logger.critical("the %s ended by itself", engine.broken)
                return EXIT_BROKEN
            continue
        logger.info("%s: draining", signal.Signals(number).name)
        return EXIT_OK
