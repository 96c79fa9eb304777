"""How many jobs a worker process serves at once, and of which of its queues it may take more."""

from __future__ import annotations

import math
import threading


class Capacity:
    """Counts the messages that are being served. Any thread may call it.

    Batch jobs hold no more than their share of the slots, so an interactive job does not wait for a batch to end.
    """

    def __init__(self, concurrency: int, batch_queue: str, batch_share: float) -> None:
        self.concurrency = concurrency
        self.batch_max = max(1, math.floor(batch_share * concurrency))
        self._batch_queue = batch_queue
        self._lock = threading.Lock()
        self._total = 0
        self._batch = 0

    def take(self, queue: str) -> bool:
        """Count one more message; False where there was no room for it. Each is followed by :meth:`give`."""
        with self._lock:
            had_room = self._has_room(queue)
            self._total += 1
            self._batch += queue == self._batch_queue
            return had_room

    def give(self, queue: str) -> None:
        """A message that was taken is done with."""
        with self._lock:
            self._total -= 1
            self._batch -= queue == self._batch_queue

    def has_room(self, queue: str) -> bool:
        """Whether one more message of ``queue`` may be taken."""
        with self._lock:
            return self._has_room(queue)

    def _has_room(self, queue: str) -> bool:
        return self._total < self.concurrency and (queue != self._batch_queue or self._batch < self.batch_max)

    @property
    def free(self) -> int:
        """How many slots are free."""
        with self._lock:
            return self.concurrency - self._total
