"""One step of feeding: the next lines of a batch become jobs that wait for a worker.

Lines are reserved first, then submitted, then noted as sent. Whoever feeds next begins with those that are reserved and
not noted; a line's job has the same id each time, so submitting it again does nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from datetime import timedelta
from typing import Final

from pydantic import ValidationError

from promptmill import keys
from promptmill.batch import scripts
from promptmill.batch.ends import cancelled_line, ended_as, gone_line
from promptmill.batch.models import BatchLine
from promptmill.batch.store import CHUNKS_AT_ONCE, count, read_chunks, run, tell
from promptmill.batch.view import Known, View
from promptmill.client.routes import Routes
from promptmill.contract import JobRequest
from promptmill.queues import queue_for
from promptmill.settings import Settings
from promptmill.store import Store, Submission
from promptmill.store import scripts as job_scripts
from promptmill.store.connection import store_errors
from promptmill.store.link import Command

logger = logging.getLogger(__name__)

STEP: Final = 500
"""How many lines one step reserves: on a busy event loop the steps take turns with everything else."""
_SLICE: Final = 100
"""So many lines are prepared before others get the event loop: about four milliseconds."""
_TTL_MS: Final = int(keys.INDEX_TTL.total_seconds() * 1000)


class Steps:
    """Feeds lines. ``token`` is the lease's: a batch that another feeder has taken since refuses."""

    def __init__(self, store: Store, settings: Settings, routes: Routes, token: str) -> None:
        self._store = store
        self._settings = settings
        self._routes = routes
        self._token = token

    async def feed(self, known: Known, view: View, most: int) -> int:
        """Give up to ``most`` of the next lines to the queue; answers how many, 0 where the batch changed meanwhile."""
        first = view.fed
        stop = min(first + min(most, STEP), view.lines)
        # Before they are reserved: a chunk that cannot be read must not leave lines without a job.
        lines = await self._lines(known, first, stop)
        stop = first + len(lines)
        if not await run(self._store, scripts.RESERVE, known.batch_id, self._token, first, stop):
            return 0
        await self._send(known, first, lines, view.deadline_ms, push=True)
        return stop - first

    async def feed_again(self, known: Known, view: View, *, push: bool) -> bool:
        """Submit the lines that were reserved, by whomever, and perhaps not submitted. True where that is done.

        Without ``push`` they are not given to the workers: they are to be cancelled, which needs their records.
        """
        first = view.sent
        while first < view.fed:
            lines = await self._lines(known, first, min(first + STEP, view.fed))
            if not await self._send(known, first, lines, view.deadline_ms, push=push):
                return False
            first += len(lines)
        return True

    async def _send(
        self, known: Known, first: int, lines: Sequence[BatchLine], deadline_ms: int, *, push: bool
    ) -> bool:
        """Make jobs of lines that are reserved; False where some must wait for equal ones, or the batch was taken."""
        own = [(index, line) for index, line in enumerate(lines, first) if line.same is None]
        jobs, broken = await self._submit(known, own, deadline_ms)
        if broken:
            await count(self._store, known.batch_id, [gone_line(index, "bad_request") for index in broken])
        if push and jobs:
            await self._push(jobs)
        equal = [(index, line.same) for index, line in enumerate(lines, first) if line.same is not None]
        if equal and not await self._link(known, equal, cancelling=not push):
            return False
        return bool(await run(self._store, scripts.SENT, known.batch_id, self._token, first + len(lines)))

    async def _lines(self, known: Known, first: int, stop: int) -> list[BatchLine]:
        """Lines from ``first`` on: up to ``stop``, or to the end of the chunks that are read at once.

        Raises :class:`LookupError` where the chunk of the first one is not there.
        """
        size = known.stored.head.chunk_lines
        numbers = [*range(first // size, (stop - 1) // size + 1)][:CHUNKS_AT_ONCE]
        if numbers != [known.chunk[0]] or len(known.chunk[1]) < stop - numbers[0] * size:
            chunks = await read_chunks(self._store, known.batch_id, numbers)
            known.chunk = (numbers[-1], chunks[-1])
        else:
            chunks = [known.chunk[1]]
        lines: list[BatchLine] = []
        for chunk in chunks:
            lines += chunk
            if len(chunk) < size:
                break  # the last one; behind a gap a line would get another one's index
        found = lines[first - numbers[0] * size : stop - numbers[0] * size]
        if not found:
            raise LookupError(f"chunk {numbers[0]} of batch {known.batch_id} is not in the store")
        return found

    async def _submit(
        self, known: Known, lines: Sequence[tuple[int, BatchLine]], deadline_ms: int
    ) -> tuple[list[Submission], list[int]]:
        """Make the jobs of some lines; answers them, and the lines of which none can be made."""
        jobs: list[Submission] = []
        broken: list[int] = []
        asked: list[asyncio.Task[None]] = []
        try:
            for start in range(0, len(lines), _SLICE):
                part, bad = self._jobs(known, lines[start : start + _SLICE], deadline_ms)
                jobs += part
                broken += bad
                if part:
                    asked.append(asyncio.create_task(self._store_jobs(part)))
                await asyncio.sleep(0)
        finally:
            outcomes = await asyncio.gather(*asked, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return jobs, broken

    def _jobs(
        self, known: Known, lines: Sequence[tuple[int, BatchLine]], deadline_ms: int
    ) -> tuple[list[Submission], list[int]]:
        head = known.stored.head
        left_s = max(1.0, deadline_ms / 1000 - time.time())
        # Until the batch is over and as long as it is kept; let go of earlier where it ends before its deadline.
        retention = timedelta(seconds=left_s + (head.retention_s or self._settings.retention_s))
        jobs: list[Submission] = []
        broken: list[int] = []
        for index, line in lines:
            try:
                request = JobRequest.model_validate({**line.request, "user": head.user, "priority": "batch"})
            except ValidationError as err:
                logger.warning("line %d of batch %s is no request: %s", index, known.batch_id, err)
                broken.append(index)
                continue
            known.family = self._routes.family(request)
            timeouts = self._routes.timeouts(request)
            if request.timeouts.queue_s is None:
                # It waits as long as its batch does, for the limits of its model too.
                timeouts = timeouts.model_copy(update={"queue_s": left_s})
            jobs.append(
                Submission(
                    job_id=known.stored.job_id(index),
                    request=request,
                    queue=queue_for("batch", known.family),
                    timeouts=timeouts,
                    max_attempts=self._settings.max_attempts,
                    retention=retention,
                    batch=(known.batch_id, index, line.id),
                )
            )
        return jobs, broken

    async def _store_jobs(self, jobs: Sequence[Submission]) -> None:
        """Outbox first, then the records: the sweep finds what is lost behind them."""
        entries = [part for job in jobs for part in (0, job.job_id)]
        commands: list[Command] = [
            ("ZADD", keys.OUTBOX, "NX", *entries),
            ("PEXPIRE", keys.OUTBOX, _TTL_MS),
            *(job.command() for job in jobs),
        ]
        with store_errors(self._store.address):
            await self._store.ask_scripted(job_scripts.SUBMIT, commands, first=2)

    async def _push(self, jobs: Sequence[Submission]) -> None:
        """Tell the workers of jobs that exist."""
        queues: dict[str, list[str]] = defaultdict(list)
        for job in jobs:
            queues[job.queue].append(job.job_id)
        commands: list[Command] = []
        for queue, ids in queues.items():
            commands += [("RPUSH", keys.ready(queue), *ids), ("PEXPIRE", keys.ready(queue), _TTL_MS)]
        with store_errors(self._store.address):
            # Told behind it: who hears of it must find it.
            await self._store.ask([*commands, tell(b"ready")], first=len(commands))

    async def _link(self, known: Known, equal: Sequence[tuple[int, int]], *, cancelling: bool) -> bool:
        """Lines that have an earlier one's answer end with it, or at once where it has ended already."""
        args = [str(part) for index, first in equal for part in (first, index)]
        outcomes: list[int] = await run(self._store, scripts.LINK, known.batch_id, self._token, *args)
        ended = [pair for pair, outcome in zip(equal, outcomes, strict=True) if outcome == scripts.COUNT_NOW]
        if ended:
            records = await self._store.find_many(known.stored.job_id(first) for _, first in ended)
            lines = [ended_as(index, first, record) for (index, first), record in zip(ended, records, strict=True)]
            await count(self._store, known.batch_id, lines)
        full = [pair for pair, outcome in zip(equal, outcomes, strict=True) if outcome == scripts.LINKS_FULL]
        if cancelling and full:
            # Nothing is stopped before all is sent: they must not wait for what is to be stopped.
            await count(self._store, known.batch_id, [cancelled_line(index, first) for index, first in full])
            return scripts.NOT_YOURS not in outcomes
        return all(outcome in {scripts.LINKED, scripts.COUNT_NOW} for outcome in outcomes)
