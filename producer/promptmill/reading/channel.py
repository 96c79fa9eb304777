"""What a hub and its readers know of each other."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Protocol

from promptmill.store import Store


class Listener(Protocol):
    """A reader as its hub sees it. Everything is called from the event loop and must not block."""

    job_id: str
    spoke_at: float

    def offer(self, message: bytes) -> None:
        """A live message, ``<id> <json>`` or ``<id>`` alone."""
        ...

    def reread(self) -> None:
        """Messages may have been missed: look at the log."""
        ...

    def keepalive(self) -> None:
        """Nothing came for long: look at the log, and say that we are alive."""
        ...

    def stop(self) -> None:
        """The hub closes."""
        ...


class Channel:
    """The readers of one job in this process."""

    __slots__ = ("acked", "name", "readers")

    def __init__(self, name: bytes) -> None:
        self.name = name
        self.readers: set[Listener] = set()
        self.acked = asyncio.Event()
        """Set while the server has acknowledged the subscription on the present connection."""


class Subscriptions(Protocol):
    """A hub as its readers see it."""

    store: Store
    counted: Counter[str]
    """What readers did, for operators: ``replays`` (reads of a log), ``gaps``, ``overflows``."""

    def attach(self, reader: Listener) -> Channel:
        """Join the job's channel; ``acked`` says from when on its messages arrive."""
        ...

    def detach(self, reader: Listener, channel: Channel) -> None:
        """Leave it."""
        ...
