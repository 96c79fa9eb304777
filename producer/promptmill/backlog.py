"""The bound on jobs that wait for a worker: past it new ones are refused before anything is stored.

What waits is what stands in the outbox, whichever broker carries the messages. Batch jobs are refused at 80 % of the
bound, so that a flood of them leaves room for people who wait.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from promptmill import keys
from promptmill.contract import JobRequest
from promptmill.errors import Overloaded
from promptmill.settings import Settings
from promptmill.store import Store
from promptmill.store.connection import store_errors

BATCH_SHARE: Final = 0.8
RETRY_AFTER_S: Final = 5.0
_FRESH_S: Final = 1.0


class Backlog:
    """One per producer. Counts at most once a second while there is room, and adds what it let in since.

    Several processes that submit at the same moment can go past the bound by what they submit within that second.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = settings.max_queued
        self._clock = clock
        self._waiting = 0
        self._counted_at: float | None = None

    async def admit(self, requests: Sequence[JobRequest], store: Callable[[], Awaitable[Store]]) -> None:
        """Let some requests in, all or none. A repetition of what is stored already passes: nothing comes to wait.

        Raises
        ------
        Overloaded
            ``backlog_full``; ``limit`` is the one that would be passed.
        StoreUnavailable
            Redis does not answer.
        """
        if not self._limit or not requests:
            return
        limit = self._limit
        if any(request.priority == "batch" for request in requests):
            limit = int(self._limit * BATCH_SHARE)
        fresh = self._counted_at is not None and self._clock() - self._counted_at < _FRESH_S
        if not fresh or self._waiting + len(requests) > limit:
            await self._count(await store())
        new = len(requests)
        if self._waiting + new > limit:
            new = len(await unknown(await store(), requests))
        if new and self._waiting + new > limit:
            raise self._refusal(new, limit)
        self._waiting += new

    async def _count(self, store: Store) -> None:
        with store_errors(store.address):
            self._waiting = int(await store.wire.call("ZCARD", keys.OUTBOX))
        self._counted_at = self._clock()

    def _refusal(self, new: int, limit: int) -> Overloaded:
        whose = "" if limit == self._limit else f", {BATCH_SHARE:.0%} of max_queued, for calls that hold batch jobs"
        if new > limit:
            return Overloaded(
                f"{new} jobs at once are more than may ever wait (the limit is {limit}{whose}): submit fewer at a time",
                field="max_queued",
                limit=limit,
                retryable=False,
            )
        return Overloaded(
            f"{self._waiting} jobs wait for a worker already (the limit is {limit}{whose}): try again later",
            field="max_queued",
            limit=limit,
            retry_after_s=RETRY_AFTER_S,
        )


async def unknown(store: Store, requests: Sequence[JobRequest]) -> list[JobRequest]:
    """Those of some requests that are new: without an idempotency key, or with one that stands for no job yet."""
    keyed = [(r, keys.idempotency(r.user, r.idempotency_key)) for r in requests if r.idempotency_key is not None]
    new = [r for r in requests if r.idempotency_key is None]
    if keyed:
        with store_errors(store.address):
            found = await store.ask([("EXISTS", name) for _, name in keyed])
        new += [r for (r, _), there in zip(keyed, found, strict=True) if not there]
    return new
