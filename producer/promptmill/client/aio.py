"""The asynchronous producer. The synchronous one wraps it; nothing is written twice."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, Unpack

from promptmill import keys
from promptmill.client.options import RequestOptions, build_request
from promptmill.client.pages import JobPage, Readiness
from promptmill.contract import (
    Event,
    Job,
    JobRequest,
    JobState,
    Message,
    Restart,
    Timeouts,
    Token,
    parse_event,
    parse_request,
)
from promptmill.errors import Closed, JobCancelled, JobFailed, NotFound, WaitTimeout
from promptmill.heartbeat import ready_workers
from promptmill.queues import API_FAMILY, queue_for
from promptmill.reading import Hub
from promptmill.routing import resolve
from promptmill.settings import DEFAULT_TIMEOUTS, Settings, default_data_dir, load_settings
from promptmill.store import Store, Submission
from promptmill.up.datadir import find_running_up

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
    Where ``settings`` has no models (a web application without the workers' configuration), names of models are not
    checked here, and a job that names an unknown one fails as ``unknown_model``.
    """

    def __init__(
        self, settings: Settings | None = None, *, redis_url: str | None = None, store: Store | None = None
    ) -> None:
        self.settings = settings or _found_settings()
        if redis_url is not None:
            self.settings = self.settings.model_copy(update={"redis_url": redis_url})
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
        for request in checked:
            self._check_route(request)
        jobs: list[AsyncJob] = []
        for start in range(0, len(checked), _SUBMIT_CHUNK):
            jobs += await self._submit(checked[start : start + _SUBMIT_CHUNK])
        return jobs

    def _knows(self, request: JobRequest) -> bool:
        """Whether the configuration here can tell what answers; without models only ``echo`` is known."""
        return bool(self.settings.models) or (request.role is None and request.model in {None, "echo"})

    def _check_route(self, request: JobRequest) -> None:
        if self._knows(request):
            resolve(self.settings, request)

    async def _submit(self, requests: list[JobRequest]) -> list[AsyncJob]:
        store = await self.store()
        submissions = [await self._submission(store, r) for r in requests]
        waiting = await store.submit(submissions)
        await self._sender().send([(s.job_id, s.queue) for s, w in zip(submissions, waiting, strict=True) if w])
        return [AsyncJob(self, s.job_id) for s in submissions]

    def _timeouts(self, request: JobRequest) -> Timeouts:
        """What bounds the job's life in the store: its model's own timeouts too, where the model is known here."""
        if self._knows(request):
            return self.settings.timeouts_for(resolve(self.settings, request).config, request.timeouts)
        return request.timeouts.over(self.settings.timeouts.over(DEFAULT_TIMEOUTS))

    def _family(self, request: JobRequest) -> str:
        """Whose queue it goes to. Where the model is not known here the API workers hand it to the right ones."""
        return resolve(self.settings, request).config.worker_family if self._knows(request) else API_FAMILY

    def _sender(self) -> Enqueuer:
        if self._enqueuer is None:
            # Celery takes a quarter of a second to import; readers never need it.
            from promptmill.enqueue import Enqueuer  # noqa: PLC0415

            self._enqueuer = Enqueuer(self.settings.queue_url)
        return self._enqueuer

    async def _submission(self, store: Store, request: JobRequest) -> Submission:
        timeouts = self._timeouts(request)
        submission = Submission(
            job_id=keys.new_job_id(),
            request=request,
            queue=queue_for(request.priority, self._family(request)),
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
                    _raise_for(await self.get(job_id))

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
        _raise_for(job)
        return job

    async def cancel(self, job_id: str, reason: str = "cancelled by the caller") -> Job:
        """End a job, wherever it is; one that has ended stays as it is. Answers the job.

        The job is over when this returns: no token comes after it, and its worker closes the provider's connection.
        """
        store = await self.store()
        await store.cancel(keys.check_job_id(job_id), reason[:500], keys.new_token())
        return await store.get(job_id)

    async def ready(self) -> Readiness:
        """Whether a job submitted now can be claimed: Redis answers and a worker's heartbeat is fresh."""
        beats = await ready_workers(await self.store())
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


def _found_settings() -> Settings:
    settings = load_settings()
    if settings.redis_url is None and (running := find_running_up(settings.data_dir or default_data_dir())):
        return settings.model_copy(update={"redis_url": running.redis_url})
    return settings


def _raise_for(job: Job) -> None:
    if job.state == "cancelled":
        raise JobCancelled(f"job {job.id} was cancelled", job_id=job.id)
    if job.state in {"failed", "expired"}:
        error = job.error
        if error is None:
            raise JobFailed(f"job {job.id} {job.state}", job_id=job.id)
        raise JobFailed(
            error.message,
            job_id=job.id,
            code=error.code,
            retryable=error.retryable,
            retry_after_s=error.retry_after_s,
        )
    if not job.ended:
        raise NotFound(f"job {job.id} is no longer stored", field="id")
