"""The asynchronous producer. The synchronous one wraps it; nothing is written twice."""

from __future__ import annotations

import asyncio
import builtins
import hashlib
from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from datetime import date, timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, Unpack

from promptmill import keys
from promptmill.backlog import Backlog
from promptmill.batch import BatchClient, BatchResult
from promptmill.batch.library import BatchItems, run_batch
from promptmill.client import dead
from promptmill.client.common import found_settings, raise_for
from promptmill.client.options import BatchOptions, RequestOptions, build_request
from promptmill.client.pages import JobPage, Readiness
from promptmill.client.routes import Routes
from promptmill.contract import (
    Event,
    Job,
    JobRequest,
    JobState,
    Message,
    Restart,
    Token,
    parse_event,
    parse_request,
)
from promptmill.errors import Closed, WaitTimeout
from promptmill.heartbeat import ready_workers
from promptmill.queues import queue_for
from promptmill.reading import Hub
from promptmill.settings import Settings
from promptmill.store import Store, Submission
from promptmill.tracing import submitting
from promptmill.usage.budgets import check_budgets
from promptmill.usage.report import UsageReport, read_usage

if TYPE_CHECKING:
    from promptmill.enqueue import Enqueuer

_SUBMIT_CHUNK: Final = 200
_LIST_SCAN_MAX: Final = 2_000

Messages = Sequence[Message | dict[str, Any]]


class AsyncJob:
    """A submitted job: its id, and what can be done with it."""

    __slots__ = ("_producer", "id")

    def __init__(self, producer: AsyncProducer, job_id: str) -> None:
        self._producer = producer
        self.id = job_id

    def __repr__(self) -> str:
        return f"AsyncJob({self.id!r})"

    async def get(self) -> Job:
        """The job as it stands now."""
        return await self._producer.get(self.id)

    def events(self, after: str | None = None) -> AsyncGenerator[Event, None]:
        """See :meth:`AsyncProducer.events`."""
        return self._producer.events(self.id, after)

    def stream(self) -> AsyncGenerator[Token | Restart, None]:
        """See :meth:`AsyncProducer.stream`."""
        return self._producer.stream(self.id)

    async def result(self, timeout_s: float | None = None) -> Job:
        """See :meth:`AsyncProducer.result`."""
        return await self._producer.result(self.id, timeout_s)

    async def cancel(self, reason: str = "cancelled by the caller") -> Job:
        """See :meth:`AsyncProducer.cancel`."""
        return await self._producer.cancel(self.id, reason)


class AsyncProducer:
    """Submits jobs and follows them. Use from one event loop; share it between tasks.

    ::

        async with AsyncProducer() as producer:
            job = await producer.submit("Say hello.", model="sonnet")
            async for piece in job.stream():
                ...

    Without arguments the configuration is read as the command line reads it; where it names no store, that of the
    ``promptmill up`` that runs on this machine is used. Connections open at first use.
    Where ``settings`` has no models (a web application without the workers' configuration), only models that operators
    added live are known here; other names are not checked, and a job that names an unknown one fails as
    ``unknown_model``.
    """

    def __init__(
        self, settings: Settings | None = None, *, redis_url: str | None = None, store: Store | None = None
    ) -> None:
        self.settings = settings or found_settings()
        if redis_url is not None:
            self.settings = self.settings.model_copy(update={"redis_url": redis_url})
        self._routes = Routes(self.settings)
        self._backlog = Backlog(self.settings)
        self.live = self._routes.live
        """What answers, as far as it is known here; see :mod:`promptmill.live`."""
        self.batches = BatchClient(self.store, self.settings, self._routes)
        self._store = store
        self._owns_store = store is None
        self._enqueuer: Enqueuer | None = None
        self._hub: Hub | None = None
        self._opening = asyncio.Lock()
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close every connection. Whoever still reads gets :class:`~promptmill.errors.Closed`."""
        self._closed = True
        if self._hub is not None:
            await self._hub.aclose()
        if self._enqueuer is not None:
            await self._enqueuer.aclose()
        if self._store is not None and self._owns_store:
            await self._store.aclose()

    async def store(self) -> Store:
        """The store, connected. Raises :class:`~promptmill.errors.StoreUnavailable`."""
        if self._closed:
            raise Closed("the producer was closed")
        if self._store is None:
            async with self._opening:
                if self._store is None:
                    self._store = await Store.connect(self.settings.store_url)
        return self._store

    async def hub(self) -> Hub:
        """This process's readers' connection."""
        store = await self.store()
        if self._hub is None:
            self._hub = Hub(store, keepalive_s=self.settings.keepalive_s)
        return self._hub

    # -- submitting ---------------------------------------------------------------------------------------------

    async def submit(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        **options: Unpack[RequestOptions],
    ) -> AsyncJob:
        """Enqueue one job; give ``prompt`` or ``messages``.

        When it returns, the job exists and will run or end with an error: losing its message only delays it.
        With an ``idempotency_key``, repeating is safe and answers the same job.

        Raises
        ------
        BadRequest
            ``bad_request``, ``unknown_model``, ``unknown_role`` or ``too_large``; nothing was stored.
        IdempotencyConflict
            The key was used by this user for another request.
        Overloaded
            ``backlog_full``: too many jobs wait already; nothing was stored.
            ``budget_exceeded``: the user's budget of the day is used up.
        StoreUnavailable
            Whether the job exists is unknown; repeat with the same idempotency key.
        """
        return await self.submit_request(build_request(prompt, messages, options, self.settings.limits))

    async def submit_request(self, request: JobRequest) -> AsyncJob:
        """Like :meth:`submit`, with a request that was built by hand."""
        return (await self.submit_many([request]))[0]

    async def submit_many(self, requests: Iterable[JobRequest | dict[str, Any]]) -> list[AsyncJob]:
        """Enqueue many jobs, in order; all are checked before the first is stored.

        Raises what :meth:`submit` raises. Where the store fails midway, earlier jobs exist: give each request an
        idempotency key and repeat the whole call.
        """
        checked = [parse_request(r, self.settings.limits) for r in requests]
        await self._routes.check(checked, self.store)
        await self._backlog.admit(checked, self.store)
        warnings = await check_budgets(await self.store(), self.settings, checked)
        jobs: list[AsyncJob] = []
        for start in range(0, len(checked), _SUBMIT_CHUNK):
            jobs += await self._submit(checked[start : start + _SUBMIT_CHUNK], warnings)
        return jobs

    async def _submit(self, requests: list[JobRequest], warnings: Mapping[str, str]) -> list[AsyncJob]:
        store = await self.store()
        since = await store.durable.check(self.settings.durability)
        submissions = [replace(await self._submission(store, r), note=warnings.get(r.user)) for r in requests]
        with submitting([s.job_id for s in submissions]) as traces:
            submissions = [replace(s, trace=trace) for s, trace in zip(submissions, traces, strict=True)]
            waiting = await store.submit(submissions)
            await self._sender().send([(s.job_id, s.queue) for s, w in zip(submissions, waiting, strict=True) if w])
            await store.durable.confirm(self.settings.durability, since)
        return [AsyncJob(self, s.job_id) for s in submissions]

    def _sender(self) -> Enqueuer:
        if self._enqueuer is None:
            # Celery takes a quarter of a second to import; readers never need it.
            from promptmill.enqueue import Enqueuer  # noqa: PLC0415

            self._enqueuer = Enqueuer(self.settings.queue_url)
        return self._enqueuer

    async def _submission(self, store: Store, request: JobRequest) -> Submission:
        timeouts = self._routes.timeouts(request)
        submission = Submission(
            job_id=keys.new_job_id(),
            request=request,
            queue=queue_for(request.priority, self._routes.family(request)),
            timeouts=timeouts,
            max_attempts=self.settings.max_attempts,
            retention=timedelta(seconds=self.settings.retention_s),
        )
        if request.idempotency_key is None:
            return submission
        digest = hashlib.sha256(request.to_json()).hexdigest()
        ttl = timedelta(milliseconds=submission.life_ms + submission.retention_ms)
        job_id = await store.reserve(request.user, request.idempotency_key, submission.job_id, digest, ttl)
        return Submission(job_id, request, submission.queue, timeouts, submission.max_attempts, submission.retention)

    def batch(self, items: BatchItems, **options: Unpack[BatchOptions]) -> AsyncGenerator[BatchResult, None]:
        """Run many requests as one batch; each one's result as it ends. See :mod:`promptmill.batch.library`."""
        return run_batch(self.batches, self.settings.limits, items, options)

    # -- reading ------------------------------------------------------------------------------------------------

    async def get(self, job_id: str) -> Job:
        """The job as it stands now. Raises :class:`~promptmill.errors.NotFound`."""
        return await (await self.store()).get(job_id)

    async def list(
        self,
        user: str | None = None,
        state: JobState | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> JobPage:
        """Jobs, newest first, of one user or of all. Go on with the page's ``next_cursor``.

        A page may hold fewer than ``limit`` jobs, even none, and still have a ``next_cursor``: at most 2,000 jobs are
        looked at in one call.
        """
        store = await self.store()
        jobs: list[Job] = []
        scanned = 0
        while scanned < _LIST_SCAN_MAX:
            rows = await store.list_ids(user, cursor, max(limit, 50))
            if not rows:
                return JobPage(jobs, None)
            records = await store.find_many(job_id for job_id, _ in rows)
            for (job_id, score), record in zip(rows, records, strict=True):
                cursor = f"{score}.{job_id}"
                if record is not None and (state is None or record.state == state):
                    jobs.append(record.job())
                    if len(jobs) == limit:
                        return JobPage(jobs, cursor)
            scanned += len(rows)
        return JobPage(jobs, cursor)

    async def events(self, job_id: str, after: str | None = None) -> AsyncGenerator[Event, None]:
        """Every event of a job behind ``after`` (an event's ``id``), then live, through its end event.

        Each comes once and in order, however late the reader is; lost connections are made again by themselves.
        While Redis is away nothing comes. Close the generator (``contextlib.aclosing``) where you leave it early.

        Raises
        ------
        NotFound
            There is no such job.
        Closed
            The producer was closed before the job's end.
        """
        reader = await (await self.hub()).open(job_id, after)
        try:
            async for batch in reader:
                for frame in batch:
                    yield parse_event(frame.data, frame.id.decode() if frame.id else None)
            if not reader.over:
                # Ending here in silence would pass a truncated answer off as a whole one.
                raise Closed(f"the producer was closed while it followed job {job_id}; the job goes on")
        finally:
            await reader.aclose()

    async def stream(self, job_id: str) -> AsyncGenerator[Token | Restart, None]:
        """The job's tokens as they come; a ``Restart`` says that those before it are void.

        Returns when the job succeeded.

        Raises
        ------
        JobFailed, JobCancelled
            As :meth:`result` does.
        """
        async with aclosing(self.events(job_id)) as events:
            async for event in events:
                if isinstance(event, Token | Restart):
                    yield event
                elif event.ends:
                    raise_for(await self.get(job_id))

    async def result(self, job_id: str, timeout_s: float | None = None) -> Job:
        """Wait for the end and answer the job, which succeeded.

        Raises
        ------
        JobFailed
            It failed or expired; carries the job's error code.
        JobCancelled
            It was cancelled.
        WaitTimeout
            ``timeout_s`` ran out; the job goes on.
        """
        try:
            async with asyncio.timeout(timeout_s), aclosing(self.events(job_id)) as events:
                async for _ in events:
                    pass
        except TimeoutError as err:
            raise WaitTimeout(f"job {job_id} did not end within {timeout_s} s; it goes on") from err
        job = await self.get(job_id)
        raise_for(job)
        return job

    async def cancel(self, job_id: str, reason: str = "cancelled by the caller") -> Job:
        """End a job, wherever it is; one that has ended stays as it is. Answers the job.

        The job is over when this returns: no token comes after it, and its worker closes the provider's connection.
        """
        store = await self.store()
        await store.cancel(keys.check_job_id(job_id), reason[:500], keys.new_token())
        return await store.get(job_id)

    async def dead_jobs(self, user: str | None = None) -> builtins.list[Job]:
        """The jobs that were given up because their workers died and are still kept, the latest first."""
        return await dead.dead_jobs(await self.store(), user)

    async def retry_dead(self, job_id: str) -> AsyncJob:
        """Submit the request of such a job as a new one, and take it off the list. Repeated, it answers the same job.

        The new one names the old one in its metadata as ``retry_of``. Raises :class:`~promptmill.errors.NotFound`, and
        :class:`~promptmill.errors.BadRequest` for a job that was not given up.
        """
        store = await self.store()
        job = await self.submit_request(await dead.again(store, job_id))
        await dead.dealt_with(store, job_id)
        return job

    async def usage(
        self,
        from_day: date | str | None = None,
        to_day: date | str | None = None,
        by: str | Iterable[str] | None = None,
        user: str | None = None,
    ) -> UsageReport:
        """What was used from one UTC day through another (today where neither is given), of one user or of all.

        ``by`` groups it: any of ``user``, ``model``, ``backend``, ``role``, ``day``. Raises
        :class:`~promptmill.errors.BadRequest`.
        """
        return await read_usage(await self.store(), from_day, to_day, by, user)

    async def ready(self) -> Readiness:
        """Whether a job submitted now can be claimed: Redis takes writes and a worker's heartbeat is fresh.

        Raises :class:`~promptmill.errors.StoreUnavailable`, within seconds.
        """
        store = await self.store()
        await store.check_answers(writes=True)
        beats = await ready_workers(store)
        return Readiness(
            bool(beats),
            "ready" if beats else "no worker is ready to claim a job",
            len(beats),
            dict(Counter(b.family for b in beats)),
            sorted({model for b in beats for model in b.paused}),
            {
                f: sorted({b.level for b in beats if b.family == f and b.level})
                for f in {b.family for b in beats if b.level}
            },
        )
