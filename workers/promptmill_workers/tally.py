"""A worker tells at once that a line of a batch ended: behind the jobs, in the background, many at a time.

It is a hint: what cannot be told is found by the feeder.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Any, Final

from promptmill.batch.ends import ended_line
from promptmill.batch.store import count
from promptmill.errors import StoreUnavailable
from promptmill.store import Store
from promptmill.store.tries import Try

logger = logging.getLogger(__name__)

_WAITING_MAX: Final = 10_000
_TOGETHER_S: Final = 0.02
"""Lines that end within so little time are told together."""


class Tally:
    """Counts lines. Never raises. Use from one event loop."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._waiting: dict[str, list[bytes]] = {}
        self._many = 0
        self._task: asyncio.Task[None] | None = None

    def note(self, batch: tuple[str, int, str], state: str, end: dict[str, Any], tries: Iterable[Try]) -> None:
        """The job of a line ended."""
        if self._many >= _WAITING_MAX:
            return
        self._waiting.setdefault(batch[0], []).append(ended_line(batch[1], state, end, tries))
        self._many += 1
        if self._task is None:
            self._task = asyncio.create_task(self._drain(), name="tally")

    async def _drain(self) -> None:
        try:
            while self._waiting:
                waiting, self._waiting, self._many = self._waiting, {}, 0
                for batch_id, lines in waiting.items():
                    await count(self._store, batch_id, lines)
                await asyncio.sleep(_TOGETHER_S)
        except StoreUnavailable as err:
            self._waiting.clear()
            self._many = 0
            logger.info("ended lines are left to the feeder: %s", err)
        finally:
            self._task = None

    async def aclose(self, timeout_s: float = 5.0) -> None:
        """Wait until all is told, but no longer than that."""
        if self._task is not None:
            await asyncio.wait([self._task], timeout=timeout_s)
        if self._task is not None:
            self._task.cancel()
