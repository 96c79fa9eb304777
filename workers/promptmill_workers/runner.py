"""A job's way through a worker: claim, attempts, end.

Who wins where several act at once is decided in the store: the first script that sets a new epoch. Everything here
only learns of it, by a refusal or by the control channel, and stops.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, Final, Literal, TypeVar

import orjson

from promptmill import keys
from promptmill.contract import Done, Error, ErrorInfo, JobRequest, Progress
from promptmill.errors import BackendError, BadRequest, PromptmillError, StoreUnavailable
from promptmill.queues import queue_for
from promptmill.routing import Route, resolve
from promptmill.settings import Settings
from promptmill.store import Claimed, Store
from promptmill.store.head import record_ttl_ms
from promptmill.watch import Watcher
from promptmill_workers.attempt import Progressing, estimated_usage, stream
from promptmill_workers.backends.base import Call
from promptmill_workers.joblog import JobLog
from promptmill_workers.models import Backends
from promptmill_workers.pauses import Pauses
from promptmill_workers.writer import Writer

logger = logging.getLogger(__name__)

T = TypeVar("T")
StopReason = Literal["taken", "handback"]

_RETRY_HERE: Final = frozenset({"rate_limited", "overloaded", "unreachable"})
"""Failures of the moment, tried again here as long as no token went out."""
_RETRY_BASE_S: Final = 0.5
_RETRY_MAX_S: Final = 30.0
_MESSAGE_MAX_CHARS: Final = 2_000
_STORE_BACKOFF_MAX_S: Final = 2.0


class RunningJob:
    """A claim that this process holds, and the task that serves it."""

    __slots__ = ("claim", "job_id", "log", "stop_reason", "task")

    def __init__(self, job_id: str, claim: str, log: JobLog) -> None:
        self.job_id = job_id
        self.claim = claim
        self.log = log
        self.task = asyncio.current_task()
        self.stop_reason: StopReason | None = None

    def stop(self, reason: StopReason) -> None:
        """End it from outside; the task closes its backend before it returns."""
        if self.stop_reason is None:
            self.stop_reason = reason
            if self.task is not None:
                self.task.cancel()


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
        self.running: dict[str, RunningJob] = {}
        writer.on_fenced = self._on_fenced

    async def aclose(self) -> None:
        """Close the backends' connections."""
        await self.backends.aclose()

    def _tell_operators(self, event: dict[str, Any]) -> None:
        self._store.wire.tell([("PUBLISH", keys.OPERATORS, orjson.dumps(event))])

    def _on_fenced(self, log: JobLog) -> None:
        job = self.running.get(log.job_id)
        if job is not None and job.log is log:
            job.stop("taken")

    def taken(self, claim: str) -> None:
        """The control channel says that a claim was ended by somebody else."""
        for job in self.running.values():
            if job.claim == claim:
                job.stop("taken")
                return

    # -- claim --------------------------------------------------------------------------------------------------

    async def run(self, job_id: str) -> None:
        """Serve one message: claim the job if it still waits, and run it to its end."""
        claim = keys.new_token()
        claimed = await self._patiently(lambda: self._claim(job_id, claim))
        if claimed is None:
            return
        log = self._writer.open(job_id, claim, claimed.epoch)
        job = self.running[job_id] = RunningJob(job_id, claim, log)
        try:
            await self._attempts(job, claimed)
        except asyncio.CancelledError:
            if job.stop_reason is None:
                raise
            # Ours: the claim was taken from us, or is handed back by who stopped us.
            logger.info("job %s stopped here: %s", job_id, job.stop_reason)
        except Exception as err:
            # Whatever it is (a request that only a newer version reads, a bug of ours): a job without an end would stay
            # `running` for as long as this worker lives.
            logger.exception("job %s cannot be run here", job_id)
            error = BackendError(f"the worker failed on this job: {type(err).__name__}", code="crashed")
            await self._fail(job, error, Progressing(), None, list(claimed.tries), claimed.record.st["attempts"])
        finally:
            self._writer.close(log)
            if self.running.get(job_id) is job:
                del self.running[job_id]
        if job.stop_reason != "handback":
            self._store.forget_claim(job_id, self._worker_id)

    async def _claim(self, job_id: str, claim: str) -> Claimed | None:
        claimed = await self._store.claim(job_id, claim, self._worker_id, Progress(phase="started"))
        if not isinstance(claimed, str):
            return claimed
        logger.debug("job %s not claimed: %s", job_id, claimed)
        if claimed == "expired":
            await self._store.expire(job_id, keys.new_token())
        if job_id not in self.running:
            self._store.forget_claim(job_id, self._worker_id)
        return None

    async def _patiently(self, act: Callable[[], Awaitable[T]]) -> T:
        """Repeat an idempotent act until the store answers: a job is not given up because Redis is away."""
        backoff = 0.05
        while True:
            try:
                return await act()
            except StoreUnavailable as err:
                logger.warning("waiting for the store: %s", err)
                await asyncio.sleep(backoff * random.uniform(0.5, 1.5))  # noqa: S311 - spreads retries, no secret
                backoff = min(backoff * 2, _STORE_BACKOFF_MAX_S)

    # -- attempts -----------------------------------------------------------------------------------------------

    async def _attempts(self, job: RunningJob, claimed: Claimed) -> None:
        tries = list(claimed.tries)
        number = int(claimed.record.st["attempts"])
        request = JobRequest.model_validate_json(claimed.request)
        try:
            route = resolve(self._settings, request)
        except BadRequest as err:
            await self._fail(job, err, Progressing(), None, tries, number)
            return
        if await self._belongs_elsewhere(job, route, claimed):
            return
        self._outlive(job.job_id, request, route)
        while True:
            into, started = Progressing(), datetime.now(UTC)
            error = await self._attempt(job, request, route, number, into)
            if into.usage is None and into.parts:
                into.usage = estimated_usage(request, into.text)
            tries.append(_try(number, route, started, into, error))
            if error is None:
                await self._succeed(job, into, route, tries, number)
                return
            if not self._may_retry(error, into, number):
                await self._fail(job, error, into, route, tries, number)
                return
            number += 1
            await self._retry_later(job, error, number)

    async def _attempt(
        self, job: RunningJob, request: JobRequest, route: Route, number: int, into: Progressing
    ) -> BackendError | None:
        """One attempt; answers why it failed, or None."""
        try:
            backend = self.backends.get(route)
            login = self.pauses.check(route, backend)
            timeouts = self._settings.timeouts_for(route.config, request.timeouts)
            try:
                await stream(backend, Call(job.job_id, number, request, timeouts), job.log, self._writer, into)
            except BackendError as err:
                if err.code == "auth_expired":
                    self.pauses.expired(route, backend, login, err)
                raise
            self.pauses.answered(route)
        except BackendError as err:
            return err
        except Exception as err:
            # A backend's own bug must end its job, not leave it hanging until its time to live.
            logger.exception("backend of model %r crashed", route.name)
            return BackendError(f"the backend crashed: {type(err).__name__}", code="crashed")
        return None

    async def _belongs_elsewhere(self, job: RunningJob, route: Route, claimed: Claimed) -> bool:
        """Hand a job of another family to its workers; True where that was done.

        Its producer did not know the model's family. Only once: two workers whose configurations differ must not pass a
        job to and fro, so one that was handed on is run where it arrives.
        """
        family = route.config.worker_family
        if family == self._family or "queue" in claimed.record.st:
            return False
        queue = queue_for(claimed.record.head["priority"], family)
        reason = f"handed to the {family} workers"

        async def hand_on() -> list[str]:
            return await self._watcher.release([job.job_id], claims={job.job_id: job.claim}, queue=queue, reason=reason)

        await self._patiently(hand_on)
        return True

    def _outlive(self, job_id: str, request: JobRequest, route: Route) -> None:
        """The producer may not have known this model's timeouts: what is stored must outlive what runs."""
        life = record_ttl_ms(self._settings.timeouts_for(route.config, request.timeouts), self._settings.max_attempts)
        stored = (keys.record(job_id), keys.log(job_id))
        self._store.wire.tell([("PEXPIRE", key, life, "GT") for key in stored])

    def _may_retry(self, error: BackendError, into: Progressing, number: int) -> bool:
        return error.retryable and error.code in _RETRY_HERE and not into.parts and number < self._settings.max_attempts

    async def _retry_later(self, job: RunningJob, error: BackendError, number: int) -> None:
        # Full jitter, so that jobs that failed together do not come back together.
        wait_s = random.uniform(0, min(_RETRY_BASE_S * 2 ** (number - 1), _RETRY_MAX_S))  # noqa: S311 - no secret
        if error.retry_after_s is not None:
            wait_s = min(max(wait_s, error.retry_after_s), _RETRY_MAX_S)
        message = f"{error.code}: {error.message}"[:_MESSAGE_MAX_CHARS]
        job.log.add_event(Progress(phase="retrying", message=message, attempt=number).to_json())
        self._writer.mark(job.log)
        await asyncio.sleep(wait_s)

    # -- ends ---------------------------------------------------------------------------------------------------

    async def _succeed(
        self, job: RunningJob, into: Progressing, route: Route, tries: list[dict[str, Any]], number: int
    ) -> None:
        done = Done(
            text=into.text,
            usage=into.usage,
            cost_usd=into.cost_usd,
            backend=route.config.type,
            model=route.name,
            finish_reason=into.finished.reason if into.finished else None,
            attempt=number,
        )
        end = done.model_dump(mode="json", exclude={"type"}, exclude_none=True)
        await self._end(job, "succeeded", done.to_json(), end, tries)

    async def _fail(
        self,
        job: RunningJob,
        error: PromptmillError,
        into: Progressing,
        route: Route | None,
        tries: list[dict[str, Any]],
        number: int,
    ) -> None:
        info = ErrorInfo.model_validate({**error.to_dict(), "message": error.message[:_MESSAGE_MAX_CHARS]})
        event = Error(code=info.code, message=info.message, retryable=info.retryable)
        end: dict[str, Any] = {
            "error": info.model_dump(exclude_none=True),
            "attempt": number,
            # What readers saw stays readable: tokens joined equal the stored text for failures too.
            "text": into.text or None,
            "usage": into.usage.model_dump() if into.usage else None,
            "cost_usd": into.cost_usd,
        }
        if route is not None:
            end |= {"model": route.name, "backend": route.config.type}
        await self._end(job, "failed", event.to_json(), end, tries)

    async def _end(
        self, job: RunningJob, state: str, event: bytes, end: dict[str, Any], tries: list[dict[str, Any]]
    ) -> None:
        """All tokens first, then the end, in one script. Repeated until the store answers."""

        async def finish() -> bool:
            await self._writer.settle(job.log)
            try:
                return await self._store.finish(job.job_id, job.claim, state, event, end, tries)
            except StoreUnavailable:
                self._writer.suspect()
                raise

        if not await self._patiently(finish):
            logger.info("job %s was ended or taken by somebody else", job.job_id)


def _try(number: int, route: Route, started: datetime, into: Progressing, error: BackendError | None) -> dict[str, Any]:
    """What :class:`~promptmill.contract.Attempt` reads; built by hand because this runs for every job."""
    request_id = error.provider_request_id if error else into.finished and into.finished.provider_request_id
    fields = {
        "attempt": number,
        "model": route.name,
        "backend": route.config.type,
        "outcome": error.code if error else "succeeded",
        "message": error.message[:_MESSAGE_MAX_CHARS] if error else None,
        "started_at": started.isoformat(),
        "finished_at": datetime.now(UTC).isoformat(),
        "usage": into.usage.model_dump() if into.usage else None,
        "provider_request_id": request_id,
    }
    return {name: value for name, value in fields.items() if value is not None}
