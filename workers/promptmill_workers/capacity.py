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
        self._lent = 0
        self._pulled = 0

    def take(self, queue: str) -> None:
        """Count one more message. Each is followed by :meth:`give`."""
        with self._lock:
            self._total += 1
            self._batch += queue == self._batch_queue

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
        if self._total >= self.concurrency:
            return False
        return queue != self._batch_queue or self._batch + max(self._lent, self._pulled) < self.batch_max

    # -- lines of batches, which come without messages ----------------------------------------------------------

    def lend(self, slots: int) -> None:
        """Set aside so many of the batch jobs' slots for lines of batches.

        They are lent as a block and not one by one: with each change another set of queues may have to be consumed.
        One slot of the process, where it has more, is left to messages.
        """
        with self._lock:
            self._lent = min(slots, self.batch_max, max(1, self.concurrency - 1))

    def pull(self, most: int) -> int:
        """Count up to ``most`` more lines, as many as there are slots for. Each is followed by :meth:`pulled_done`."""
        with self._lock:
            free = min(self._lent, self.batch_max - self._batch, self.concurrency - self._total + self._pulled)
            new = max(0, min(most, free - self._pulled))
            self._pulled += new
            self._total += new
            return new

    def pulled_done(self, count: int = 1) -> bool:
        """Lines that were pulled are done with; True where a queue has room now that had none.

        Also of batch jobs where slots are free: of fewer lent slots than before the lines that still run hold more.
        """
        with self._lock:
            before = self._rooms()
            self._pulled -= count
            self._total -= count
            return self._rooms() != before

    def _rooms(self) -> tuple[bool, bool]:
        return self._has_room(""), self._has_room(self._batch_queue)

    @property
    def pulled(self) -> int:
        """How many lines of batches run."""
        with self._lock:
            return self._pulled

    @property
    def free(self) -> int:
        """How many slots are free."""
        with self._lock:
            return self.concurrency - self._total
