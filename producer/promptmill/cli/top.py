"""``promptmill top``: what the whole deployment does, live."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import termios
import tty
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.live import Live

from promptmill.enqueue import Enqueuer
from promptmill.errors import StoreUnavailable
from promptmill.fleet import Fleet, Lookout
from promptmill.settings import Settings
from promptmill.up.signals import StopRequest, stop_on_signals

from .common import ConfigOption, DataDirOption, client_settings, open_producer, unless_asked
from .output import out_json
from .top_view import Picture

_ANSWER_S: Final = 5.0
_WIDE: Final = 160


def top(
    *,
    interval: Annotated[float, typer.Option(min=0.2, max=3600, metavar="SECONDS", help="Between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, write it, and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Look once and write one JSON object.")] = False,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Show queues, workers, streams, rates, failures, batches and today's cost, live. q or Ctrl-C leaves.

    Where standard output is no terminal it looks once.
    """
    settings = client_settings(config, data_dir)
    # What the store's and the broker's clients say would be written into the picture; it says the same itself.
    logging.getLogger().addHandler(logging.NullHandler())
    if as_json or once or not sys.stdout.isatty():
        fleet = asyncio.run(_once(settings))
        if as_json:
            out_json(fleet.to_dict())
        else:
            _console().print(Picture(fleet))
        return
    asyncio.run(_live(settings, interval))


def _console() -> Console:
    # Into a file or a pipe nothing is cut, whatever the terminal's width.
    width = None if sys.stdout.isatty() else _WIDE
    return Console(width=width, highlight=False, markup=False, emoji=False)


@asynccontextmanager
async def _lookout(settings: Settings) -> AsyncGenerator[Lookout]:
    async with open_producer(settings) as producer:
        enqueuer = Enqueuer(settings.queue_url)
        try:
            yield Lookout(await producer.store(), settings, enqueuer)
        finally:
            await enqueuer.aclose()


async def _once(settings: Settings) -> Fleet:
    async with _lookout(settings) as lookout:
        return await lookout.look()


async def _live(settings: Settings, interval_s: float) -> None:
    """Until q, Ctrl-C or TERM. What fails at the first look is an error; later it is told in the picture."""
    with stop_on_signals() as stop:
        await unless_asked(stop, _watch(settings, interval_s, stop))


async def _watch(settings: Settings, interval_s: float, stop: StopRequest) -> None:
    hint = f"   every {interval_s:g} s, q leaves"
    async with _lookout(settings) as lookout:
        fleet = await lookout.look()
        live = Live(console=_console(), screen=True, auto_refresh=False, vertical_overflow="crop")
        with live, _keys(stop.asked.set):
            trouble: str | None = None
            while True:
                live.update(Picture(fleet, trouble=trouble, hint=hint, fits=True), refresh=True)
                await asyncio.sleep(interval_s)
                try:
                    async with asyncio.timeout(max(interval_s, _ANSWER_S)):
                        fleet = await lookout.look()
                    trouble = None
                except StoreUnavailable as err:
                    trouble = err.message
                except TimeoutError:
                    trouble = f"Redis at {fleet.store} does not answer"


@contextmanager
def _keys(leave: Callable[[], None]) -> Generator[None]:
    """Calls ``leave`` when q is pressed; the terminal is then as it was before the block."""
    if not sys.stdin.isatty():
        yield
        return
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    loop = asyncio.get_running_loop()

    def pressed() -> None:
        typed = os.read(fd, 64)
        if not typed:
            loop.remove_reader(fd)  # the terminal is gone
        elif b"q" in typed.lower():
            leave()

    tty.setcbreak(fd)
    loop.add_reader(fd, pressed)
    try:
        yield
    finally:
        loop.remove_reader(fd)
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
