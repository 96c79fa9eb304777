"""What a worker process does for batches beside running jobs: one of all workers feeds them, each takes lines."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from promptmill import keys
from promptmill.batch.feeder import Feeder
from promptmill.enqueue import Enqueuer
from promptmill.errors import StoreUnavailable
from promptmill.queues import queues_of
from promptmill.settings import Settings
from promptmill.store import Store
from promptmill.traffic.channel import follow
from promptmill_workers.pulling import Puller

logger = logging.getLogger(__name__)


class Feeding:
    """A process's feeder and its puller. Use from one event loop."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        worker_id: str,
        family: str,
        serve: Callable[[str, str], Awaitable[None]],
        enqueuer: Enqueuer,
    ) -> None:
        self._store = store
        self.feeder = Feeder(store, settings, worker_id)
        self.puller = Puller(store, queues_of(family)[1], serve, enqueuer.depth, settings.heartbeat_s)

    def start(self) -> list[asyncio.Task[Any]]:
        """Begin; none of the tasks ends by itself."""
        return [
            asyncio.create_task(self.feeder.run(), name="feeder"),
            asyncio.create_task(self.puller.run(), name="puller"),
            asyncio.create_task(follow(self._store, self._heard, self._missed, keys.FEED), name="feed news"),
        ]

    def ready(self) -> None:
        """The worker is ready: it takes lines."""
        self.puller.open = True
        self.puller.wake()

    def _heard(self, news: bytes) -> None:
        # A worker of a newer version may tell of something else.
        if news == b"batch":
            self.feeder.wake()
        elif news == b"ready":
            self.puller.wake()

    def _missed(self) -> None:
        self.feeder.wake()
        self.puller.wake()

    async def stop(self) -> None:
        """The worker drains: take no more lines, and let another one feed, at once."""
        self.puller.open = False
        self.puller.wake()
        self.feeder.stopped = True
        try:
            await self.feeder.release()
        except StoreUnavailable as err:
            logger.warning("the feeder's lease runs out by itself: %s", err)
