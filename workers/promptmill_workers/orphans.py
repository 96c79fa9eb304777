"""Claims that stand in the store under this worker's name and that nobody here serves.

A store that lost its last moments (power loss, failover) may have forgotten that a job ended, or was handed back. Its
record then says that it runs here, and while this worker lives no watcher takes it away.
"""

from __future__ import annotations

import logging
from collections.abc import Container
from typing import Final

import orjson

from promptmill import keys
from promptmill.store import Store
from promptmill.store.connection import store_errors
from promptmill.watch import Watcher

logger = logging.getLogger(__name__)

_REASON: Final = "the store lost the end of its attempt"


class Orphans:
    """Looks for them, and gives them back to the queue at the second look that finds the same claim.

    At the first it may be one that is being made: the store has it and the worker does not know yet. ``running`` are
    the jobs that are served here.
    """

    def __init__(self, store: Store, worker_id: str, running: Container[str], watcher: Watcher) -> None:
        self._store = store
        self._worker_id = worker_id
        self._running = running
        self._watcher = watcher
        self._seen: dict[str, bytes] = {}

    async def look(self) -> None:
        """Look once. Raises StoreUnavailable."""
        seen, self._seen = self._seen, {}
        for job_id, claim in (await self._unserved()).items():
            if seen.get(job_id) != claim or job_id in self._running:
                self._seen[job_id] = claim
            elif not claim:
                # The hint that takes it off went astray.
                self._store.forget_claim(job_id, self._worker_id)
            else:
                logger.warning(
                    "job %s runs here by its record, and does not: it goes back to the queue",
                    job_id,
                    extra={"job_id": job_id},
                )
                await self._watcher.release([job_id], claims={job_id: claim.decode()}, reason=_REASON)
                self._store.forget_claim(job_id, self._worker_id)

    async def _unserved(self) -> dict[str, bytes]:
        """What is on this worker's set of claims: the claim where the record says that it runs here, else nothing."""
        with store_errors(self._store.address):
            (held,) = await self._store.ask([("SMEMBERS", keys.claims(self._worker_id))])
            idle = [job_id for raw in held if (job_id := raw.decode()) not in self._running]
            if not idle:
                return {}
            rows = await self._store.ask([("HMGET", keys.record(job_id), "st", "claim") for job_id in idle])
        return {
            job_id: claim if claim and st and orjson.loads(st).get("worker") == self._worker_id else b""
            for job_id, (st, claim) in zip(idle, rows, strict=True)
        }
