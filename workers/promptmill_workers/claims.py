"""Whether what runs in this worker and what the store says runs in it are the same.

In both directions, because the store can take a claim away (a cancel, a watcher that gave this worker up), and can
forget in a failover that a claim had ended.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Final, cast

import orjson
from redis.exceptions import RedisError

from promptmill import keys
from promptmill.errors import StoreUnavailable
from promptmill.store import Store
from promptmill.store.connection import reason, store_errors
from promptmill.watch import Watcher

if TYPE_CHECKING:
    from promptmill_workers.runner import Runner

logger = logging.getLogger(__name__)

_REASON: Final = "the store lost the end of its attempt"


class Claims:
    """Stops here what the store no longer knows, and gives back to the queue what it knows and nobody here serves."""

    def __init__(self, store: Store, worker_id: str, runner: Runner, watcher: Watcher, retry_s: float) -> None:
        self._store = store
        self._worker_id = worker_id
        self._runner = runner
        self._watcher = watcher
        self._retry_s = retry_s
        self._verifying: set[asyncio.Task[None]] = set()
        self._unserved: dict[str, bytes] = {}

    async def follow(self) -> None:
        """Follow the control channel until cancelled, and come back ``retry_s`` after it could not be opened.

        After every (re)subscription all claims are checked: messages may be missing.
        """
        channel = keys.control(self._worker_id).encode()
        while True:
            try:
                link = await self._store.link(self._told)
            except (RedisError, OSError) as err:
                logger.warning("control channel not open: %s", reason(err))
                await asyncio.sleep(self._retry_s)
                continue
            try:
                link.send([(b"SUBSCRIBE", channel)])
                logger.warning("control channel lost: %s", await link.lost)
            finally:
                await link.aclose()

    def _told(self, message: Any) -> None:
        if isinstance(message, list):
            kind, _, data = cast("list[Any]", message)
            if kind == b"message":
                self._runner.taken(data.decode())
                return
        # The subscription's confirmation, or an error: either way something may have been missed until now.
        task = asyncio.ensure_future(self._stop_taken())
        self._verifying.add(task)
        task.add_done_callback(self._verifying.discard)

    async def verify(self) -> None:
        """Compare in both directions. A store that does not answer is asked the next time."""
        await self._stop_taken()
        try:
            await self._give_back_unserved()
        except StoreUnavailable as err:
            logger.warning("claims not verified: %s", err)

    async def _stop_taken(self) -> None:
        """Stop what runs here under a claim that the store no longer knows."""
        jobs = list(self._runner.running.values())
        if not jobs:
            return
        try:
            with store_errors(self._store.address):
                # Who was declared dead and lives may find its set of claims emptied behind its back: fill it again.
                join = ("SADD", keys.claims(self._worker_id), *(job.job_id for job in jobs))
                asked = [("HGET", keys.record(job.job_id), "claim") for job in jobs]
                _, *held = await self._store.ask([join, *asked])
        except StoreUnavailable as err:
            logger.warning("claims not verified: %s", err)
            return
        for job, claim in zip(jobs, held, strict=True):
            # A finish whose reply is on its way also removes the claim; stopping that task then changes nothing.
            if (claim or b"").decode() != job.claim and self._runner.running.get(job.job_id) is job:
                job.stop("taken")

    # -- what nobody here serves --------------------------------------------------------------------------------

    async def _give_back_unserved(self) -> None:
        """Give back what a second look finds under the same claim. Raises StoreUnavailable.

        A store that lost its last moments (power loss, failover) may have forgotten that a job ended, or was handed
        back; while this worker lives no watcher takes it away. At the first look it may be a claim that is being made:
        the store has it and the worker does not know yet.
        """
        seen, self._unserved = self._unserved, {}
        for job_id, claim in (await self._find_unserved()).items():
            if seen.get(job_id) != claim or job_id in self._runner:
                self._unserved[job_id] = claim
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

    async def _find_unserved(self) -> dict[str, bytes]:
        """What is on this worker's set of claims: the claim where the record says that it runs here, else nothing."""
        with store_errors(self._store.address):
            (held,) = await self._store.ask([("SMEMBERS", keys.claims(self._worker_id))])
            idle = [job_id for raw in held if (job_id := raw.decode()) not in self._runner]
            if not idle:
                return {}
            rows = await self._store.ask([("HMGET", keys.record(job_id), "st", "claim") for job_id in idle])
        return {
            job_id: claim if claim and st and orjson.loads(st).get("worker") == self._worker_id else b""
            for job_id, (st, claim) in zip(idle, rows, strict=True)
        }
