"""Signals as events: the handlers only set them, the loop acts."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Generator
from contextlib import contextmanager


class StopRequest:
    """What the user asked for: ``asked`` after the first SIGINT, SIGTERM or SIGHUP, ``hurry`` after the second.

    ``by`` is the first signal.
    """

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.hurry = asyncio.Event()
        self.by: signal.Signals | None = None

    def take(self, number: signal.Signals) -> None:
        """One more signal came."""
        if self.by is None:
            self.by = number
            self.asked.set()
        else:
            self.hurry.set()


@contextmanager
def stop_on_signals() -> Generator[StopRequest]:
    """Signals set the :class:`StopRequest` until the block is left; only an entry point may use it."""
    request = StopRequest()
    loop = asyncio.get_running_loop()
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)  # under nohup it stays ignored
    for number in numbers:
        loop.add_signal_handler(number, request.take, number)
    try:
        yield request
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
