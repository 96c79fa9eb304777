"""A job's way through a worker: claim, attempts, end.

Who wins where several act at once is decided in the store: the first script that sets a new epoch. Everything here
only learns of it, by a refusal or by the control channel, and stops.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import orjson

from promptmill import keys
from promptmill.contract import JobRequest, Progress
from promptmill.errors import BackendError, BadRequest, PromptmillError, StoreUnavailable
from promptmill.heartbeat import ready_workers
from promptmill.logs import bound
from promptmill.registry import Registry
from promptmill.routing import Decision, Route, decide
from promptmill.settings import Settings
from promptmill.store import Claimed, ClaimRefusal, Store
from promptmill.store.head import record_ttl_ms
from promptmill.store.tries import CLAIM_CHARS
from promptmill.tracing import Span, job_span, note_wait
from promptmill.traffic import Traffic
from promptmill.usage import Booker
from promptmill.watch import Watcher
from promptmill_workers.attempt import Progressing
from promptmill_workers.caching import AnswerCache
from promptmill_workers.counts import Counts
from promptmill_workers.course import Course, Ended, HandedOn
from promptmill_workers.ends import End, failure, success
from promptmill_workers.joblog import JobLog
from promptmill_workers.meters import note_claim, note_end, note_fenced, note_stop
from promptmill_workers.models import Backends
from promptmill_workers.patience import patiently
from promptmill_workers.pauses import Pauses
from promptmill_workers.running import RunningJob
from promptmill_workers.tally import Tally
from promptmill_workers.writer import Writer

logger = logging.getLogger(__name__)


async def _refused_alone(job_id: str) -> None:
    raise RuntimeError(f"job {job_id} was refused to a process that runs it alone")


class Runner:
    """Runs jobs of one worker process. Use from its event loop."""

    def __init__(
        self, store: Store, writer: Writer, settings: Settings, worker_id: str, family: str, watcher: Watcher
    ) -> None:
        self._store = store
        self._family = family
        self._watcher = watcher
        self._writer = writer
        self._settings = settings
        self._worker_id = worker_id
        self.backends = Backends()
        self.pauses = Pauses(self._tell_operators)
        self.registry = Registry.of(settings)
        """What answers; a new snapshot is put in its place when operators change it."""
        self.renew: Callable[[], Awaitable[None]] | None = None
        """Puts the newest snapshot there. Raises StoreUnavailable."""
        self.traffic = Traffic(store, worker_id)
        self._waiting: Counter[str] = Counter()
        self.booker = Booker(store, lambda: self.registry, settings.ledger_retention_s)
        self.tally = Tally(store)
        self.cache = AnswerCache(store, settings.cache_ttl_s)
        self.counts = Counts()
        self.running: dict[str, RunningJob] = {}
        self.claiming: dict[str, str] = {}
        """Claims whose replies are on their way, which may hold by now: token to job id."""
        self._taken: set[str] = set()
        self._in_line: set[str] = set()
        self.alone = False
        """Whether this process runs one job at a time, of those that lost other workers."""
        self.quarantine: Callable[[str], Awaitable[None]] = _refused_alone
        """Runs such a job in a process of its own."""
        writer.on_fenced = self._on_fenced

    async def aclose(self) -> None:
        """Close the backends' connections, and book what is to be booked."""
        await self.backends.aclose()
        await self.booker.aclose()
        await self.tally.aclose()

    def _tell_operators(self, event: dict[str, Any]) -> None:
        self._store.wire.tell([("PUBLISH", keys.OPERATORS, orjson.dumps(event))])

    @property
    def waiting(self) -> int:
        """How many jobs here wait for a model's limits."""
        return self._waiting.total()

    def _on_fenced(self, log: JobLog) -> None:
        note_fenced()
        job = self.running.get(log.job_id)
        if job is not None and job.log is log:
            job.stop("taken")

    def taken(self, claim: str) -> None:
        """The control channel says that a claim was ended by somebody else."""
        if claim in self.claiming:
            self._taken.add(claim)  # it came before the claim's own reply
            return
        for job in self.running.values():
            if job.claim == claim:
                job.stop("taken")
                return

    # -- claim --------------------------------------------------------------------------------------------------

    async def run(self, job_id: str) -> None:
        """Serve one message: claim the job if it still waits, and run it to its end."""
        with bound(job_id=job_id):
            await self._serve(job_id)

    async def _serve(self, job_id: str) -> None:
        claim = keys.new_token()
        self.claiming[claim] = job_id
        try:
            claimed = await patiently(lambda: self._claim(job_id, claim))
        finally:
            taken = claim in self._taken
            self._taken.discard(claim)
            del self.claiming[claim]
        note_claim(claimed)
        if claimed == "alone":
            await self._in_quarantine(job_id)
        if isinstance(claimed, str):
            return
        record = claimed.record
        note_wait(job_id, record.trace, record.st["queued"], claimed.epoch)
        about = {"promptmill.worker": self._worker_id, "promptmill.claims": record.st["attempts"]}
        with job_span(job_id, record.trace, "promptmill.run", "consumer", about) as span:
            await self._run(job_id, claim, claimed, span, taken=taken)

    async def _run(self, job_id: str, claim: str, claimed: Claimed, span: Span, *, taken: bool) -> None:
        log = self._writer.open(job_id, claim, claimed.epoch)
        job = self.running[job_id] = RunningJob(job_id, claim, log, claimed, span)
        self.counts.began(claimed.record)
        if taken:
            job.stop("taken")
        try:
            await self._attempts(job, claimed)
        except asyncio.CancelledError:
            if job.stop_reason is None:
                raise
            # Ours: the claim was taken from us, or is handed back by who stopped us.
            logger.info("job %s stopped here: %s", job_id, job.stop_reason)
            note_stop(job.stop_reason)
            span.note({"promptmill.stopped": job.stop_reason})
            self.counts.stopped(job_id)
            self._tell_late(job)
        except Exception as err:
            # Whatever it is (a request that only a newer version reads, a bug of ours): a job without an end would stay
            # `running` for as long as this worker lives.
            logger.exception("job %s cannot be run here", job_id)
            error = BackendError(f"the worker failed on this job: {type(err).__name__}", code="crashed")
            now = job.course.current if job.course else None
            if job.course is not None and now is not None:
                # What readers saw, and what it used, stands even so.
                job.course.tries.append(job.course.describe(now.number, now.route, now.started, now.into, error))
                job.course.current = None
            into = now.into if now else Progressing()
            await self._fail(job, error, into, now.route if now else None, job.course)
        finally:
            self._writer.close(log)
            if self.running.get(job_id) is job:
                del self.running[job_id]
        # Taken away and claimed here once more, it is the other claim's: off the set, it would be lost with us.
        if job.stop_reason != "handback" and job_id not in self.running:
            self._store.forget_claim(job_id, self._worker_id)

    async def _in_quarantine(self, job_id: str) -> None:
        """Have it run alone. Until then it stays on this worker's set of claims, which is how it is found if we die."""
        self._in_line.add(job_id)
        try:
            await self.quarantine(job_id)
        finally:
            self._in_line.discard(job_id)
            self._store.forget_claim(job_id, self._worker_id)

    def __contains__(self, job_id: str) -> bool:
        """Whether the job is served here, or waits here for a process of its own."""
        return job_id in self.running or job_id in self._in_line

    async def _claim(self, job_id: str, claim: str) -> Claimed | ClaimRefusal:
        message = "in quarantine: it lost its worker before" if self.alone else None
        event = Progress(phase="started", message=message)
        claimed = await self._store.claim(job_id, claim, self._worker_id, event, alone=self.alone)
        if not isinstance(claimed, str):
            return claimed
        logger.debug("job %s not claimed: %s", job_id, claimed)
        if claimed == "expired":
            await self._store.expire(job_id, keys.new_token())
        if job_id not in self and claimed != "alone":
            self.counts.passed_over(job_id)
            self._store.forget_claim(job_id, self._worker_id)
        return claimed

    # -- attempts -----------------------------------------------------------------------------------------------

    async def _attempts(self, job: RunningJob, claimed: Claimed) -> None:
        course = Course(
            job_id=job.job_id,
            log=job.log,
            request=JobRequest.model_validate_json(claimed.request),
            claimed=claimed,
            family=self._family,
            settings=self._settings,
            backends=self.backends,
            pauses=self.pauses,
            traffic=self.traffic,
            store=self._store,
            claim=job.claim,
            booker=self.booker,
            writer=self._writer,
            hand_on=partial(self._hand_on, job),
            taken=partial(job.stop, "taken"),
            served=self._served,
            waiting=self._waiting,
            tries=list(claimed.tries),
            # Repetitions within a claim count too, so claims alone would use a number twice.
            number=max([int(claimed.record.st["attempts"]), *(t.get("attempt", 0) + 1 for t in claimed.tries)]),
        )
        job.course = course
        try:
            decision = await self._decide(course.request)
        except BadRequest as err:
            await self._fail(job, err, Progressing(), None, course)
            return
        self._outlive(job.job_id, course.request, decision)
        ended = await self._cached(job, course.request, decision) or await course.run(decision)
        if isinstance(ended, HandedOn):
            return
        if ended.error is None:
            await self._succeed(job, ended, course)
        else:
            await self._fail(job, ended.error, ended.into, ended.route, course)

    async def _decide(self, request: JobRequest) -> Decision:
        """What answers. Whoever submitted may know of a change that came here after the last heartbeat, so before a
        job fails for what is not there, the registry is read anew. Raises BadRequest."""
        before = self.registry
        try:
            return decide(before, request)
        except BadRequest:
            if self.renew is None:
                raise
            await patiently(self.renew)
            if self.registry is before:
                raise
        return decide(self.registry, request)

    async def _cached(self, job: RunningJob, request: JobRequest, decision: Decision) -> Ended | None:
        """The answer that is kept for a request which asks for that; None where nothing is kept."""
        if not request.cache:
            return None
        into = await patiently(lambda: self.cache.find(request, decision.first))
        if into is None:
            return None
        job.log.add_text(into.text)
        self._writer.mark(job.log)
        return Ended(None, into, decision.first)

    async def _served(self, family: str) -> bool:
        """Whether a worker of the family can claim; yes where the store does not say, as it then soon may."""
        try:
            return any(beat.family == family for beat in await ready_workers(self._store))
        except StoreUnavailable:
            return True

    async def _hand_on(
        self,
        job: RunningJob,
        queue: str,
        reason: str,
        phase: str,
        *,
        tries: list[dict[str, Any]] | None,
        chain: list[str],
        wait_s: float | None = None,
    ) -> None:
        async def hand_on() -> list[str]:
            await self._writer.settle(job.log)
            return await self._watcher.release(
                [job.job_id],
                claims={job.job_id: job.claim},
                queue=queue,
                reason=reason,
                phase=phase,
                tries=tries,
                chain=chain,
                wait_s=wait_s,
            )

        await patiently(hand_on)
        self.counts.put_back(job.job_id)
        if tries is not None:
            self.booker.soon(job.job_id)

    def _outlive(self, job_id: str, request: JobRequest, decision: Decision) -> None:
        """The producer may not have known these models' timeouts: what is stored must outlive what runs."""
        settings = self._settings
        life = sum(
            record_ttl_ms(settings.timeouts_for(route.config, request.timeouts), settings.max_attempts)
            for route in decision.routes
        )
        stored = (keys.record(job_id), keys.log(job_id))
        self._store.wire.tell([("PEXPIRE", key, life, "GT") for key in stored])

    # -- ends ---------------------------------------------------------------------------------------------------

    async def _succeed(self, job: RunningJob, ended: Ended, course: Course) -> None:
        await self._end(job, success(ended, course), course.tries)
        if course.request.cache and not ended.into.cached:
            self.cache.keep(course.request, ended.route, ended.into)

    async def _fail(
        self, job: RunningJob, error: PromptmillError, into: Progressing, route: Route | None, course: Course | None
    ) -> None:
        await self._end(job, failure(error, into, route, course), course.tries if course else job.tries)

    async def _end(self, job: RunningJob, end: End, tries: list[dict[str, Any]]) -> None:
        """All tokens first, then the end, in one script. Repeated until the store answers."""
        job.ending = True

        async def finish() -> bool:
            await self._writer.settle(job.log)
            try:
                serial = self._writer.serial
                return await self._store.finish(
                    job.job_id, job.claim, end.state, end.event, end.fields, tries, serial=serial
                )
            except StoreUnavailable:
                self._writer.suspect()
                raise

        if await patiently(finish):
            self.counts.ended(job.job_id, end.state, end.fields)
            self.booker.soon(job.job_id)
            if job.batch is not None:
                self.tally.note(job.batch, end.state, end.fields, tries)
            model, backend = end.fields.get("model") or "", end.fields.get("backend") or ""
            note_end(end.state, end.code, model, backend, job.priority, job.age_s)
            job.span.note({"promptmill.job.state": end.state})
            if end.code is not None:
                job.span.fail(end.code)
            return
        self.counts.stopped(job.job_id)
        logger.info("job %s was ended or taken by somebody else", job.job_id)
        self._tell_late(job)

    def _tell_late(self, job: RunningJob) -> None:
        """The claim is gone, and what its attempts used must still be booked: it is what the provider bills."""
        if job.course is None:
            return
        own = [try_ for try_ in job.course.tries if try_.get("claim") == job.claim[:CLAIM_CHARS]]
        running = job.course.interrupted()
        if running is not None:
            own.append(running)
        for try_ in own[:-1]:
            self.booker.keep(job.job_id, try_)
        for try_ in own[-1:]:
            self.booker.lost(job.job_id, try_)
