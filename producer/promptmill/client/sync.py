"""The synchronous producer: the asynchronous one, run in an event loop of a background thread."""

from __future__ import annotations

import asyncio
import builtins
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable
from concurrent.futures import CancelledError
from datetime import date
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from promptmill.batch import BatchResult
from promptmill.batch.library import BatchItems
from promptmill.client.aio import AsyncProducer, Messages
from promptmill.client.options import BatchOptions, RequestOptions
from promptmill.client.pages import JobPage, Readiness
from promptmill.contract import Event, Job, JobRequest, JobState, Restart, Token
from promptmill.errors import Closed
from promptmill.settings import Settings
from promptmill.usage.report import UsageReport

T = TypeVar("T")


class JobHandle:
    """A submitted job: its id, and what can be done with it."""

    __slots__ = ("_producer", "id")

    def __init__(self, producer: Producer, job_id: str) -> None:
        self._producer = producer
        self.id = job_id

    def __repr__(self) -> str:
        return f"JobHandle({self.id!r})"

    def get(self) -> Job:
        """The job as it stands now."""
        return self._producer.get(self.id)

    def events(self, after: str | None = None) -> Generator[Event, None, None]:
        """See :meth:`AsyncProducer.events`."""
        return self._producer.events(self.id, after)

    def stream(self) -> Generator[Token | Restart, None, None]:
        """See :meth:`AsyncProducer.stream`."""
        return self._producer.stream(self.id)

    def result(self, timeout_s: float | None = None) -> Job:
        """See :meth:`AsyncProducer.result`."""
        return self._producer.result(self.id, timeout_s)

    def cancel(self, reason: str = "cancelled by the caller") -> Job:
        """See :meth:`AsyncProducer.cancel`."""
        return self._producer.cancel(self.id, reason)


class Producer:
    """:class:`~promptmill.client.AsyncProducer` for code without an event loop. May be shared between threads.

    After a fork, make a new one in the child: the thread that drives it stays in the parent.
    """

    def __init__(self, settings: Settings | None = None, *, redis_url: str | None = None) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="promptmill-producer", daemon=True)
        self._producer = AsyncProducer(settings, redis_url=redis_url)
        self._admitting = threading.Lock()
        self._closing = False
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection and end the thread. Safe to repeat."""
        with self._admitting:
            if self._closing:
                return
            self._closing = True
            closed = asyncio.run_coroutine_threadsafe(self._close(), self._loop)
        try:
            closed.result()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def _close(self) -> None:
        await self._producer.aclose()
        # Other threads may wait for calls of theirs: the loop must not stop under them.
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _run(self, call: Callable[[], Awaitable[T]]) -> T:
        async def wait() -> T:
            return await call()

        with self._admitting:
            # Admitted before close() began, so its clean-up finds this call; afterwards nothing would run it.
            if self._closing:
                raise Closed("the producer was closed")
            future = asyncio.run_coroutine_threadsafe(wait(), self._loop)
        try:
            return future.result()
        except CancelledError:
            raise Closed("the producer was closed while this call waited") from None
        except BaseException:
            # Ctrl-C here must not leave the call running there.
            future.cancel()
            raise

    def _iterate(self, generator: AsyncGenerator[T, None]) -> Generator[T, None, None]:
        try:
            while True:
                try:
                    yield self._run(generator.__anext__)
                except StopAsyncIteration:
                    return
        finally:
            if not self._closing:
                self._run(generator.aclose)

    def submit(
        self, prompt: str | None = None, *, messages: Messages | None = None, **options: Unpack[RequestOptions]
    ) -> JobHandle:
        """See :meth:`AsyncProducer.submit`."""
        job = self._run(lambda: self._producer.submit(prompt, messages=messages, **options))
        return JobHandle(self, job.id)

    def submit_request(self, request: JobRequest) -> JobHandle:
        """See :meth:`AsyncProducer.submit_request`."""
        return JobHandle(self, self._run(lambda: self._producer.submit_request(request)).id)

    def submit_many(self, requests: Iterable[JobRequest | dict[str, Any]]) -> list[JobHandle]:
        """See :meth:`AsyncProducer.submit_many`."""
        return [JobHandle(self, job.id) for job in self._run(lambda: self._producer.submit_many(requests))]

    def batch(self, items: BatchItems, **options: Unpack[BatchOptions]) -> Generator[BatchResult, None, None]:
        """See :meth:`AsyncProducer.batch`. The items are taken in another thread."""
        return self._iterate(self._producer.batch(items, **options))

    def get(self, job_id: str) -> Job:
        """See :meth:`AsyncProducer.get`."""
        return self._run(lambda: self._producer.get(job_id))

    def list(
        self, user: str | None = None, state: JobState | None = None, limit: int = 50, cursor: str | None = None
    ) -> JobPage:
        """See :meth:`AsyncProducer.list`."""
        return self._run(lambda: self._producer.list(user, state, limit, cursor))

    def events(self, job_id: str, after: str | None = None) -> Generator[Event, None, None]:
        """See :meth:`AsyncProducer.events`."""
        return self._iterate(self._producer.events(job_id, after))

    def stream(self, job_id: str) -> Generator[Token | Restart, None, None]:
        """See :meth:`AsyncProducer.stream`."""
        return self._iterate(self._producer.stream(job_id))

    def result(self, job_id: str, timeout_s: float | None = None) -> Job:
        """See :meth:`AsyncProducer.result`."""
        return self._run(lambda: self._producer.result(job_id, timeout_s))

    def cancel(self, job_id: str, reason: str = "cancelled by the caller") -> Job:
        """See :meth:`AsyncProducer.cancel`."""
        return self._run(lambda: self._producer.cancel(job_id, reason))

    def dead_jobs(self, user: str | None = None) -> builtins.list[Job]:
        """See :meth:`AsyncProducer.dead_jobs`."""
        return self._run(lambda: self._producer.dead_jobs(user))

    def retry_dead(self, job_id: str) -> JobHandle:
        """See :meth:`AsyncProducer.retry_dead`."""
        return JobHandle(self, self._run(lambda: self._producer.retry_dead(job_id)).id)

    def usage(
        self,
        from_day: date | str | None = None,
        to_day: date | str | None = None,
        by: str | Iterable[str] | None = None,
        user: str | None = None,
    ) -> UsageReport:
        """See :meth:`AsyncProducer.usage`."""
        return self._run(lambda: self._producer.usage(from_day, to_day, by, user))

    def ready(self) -> Readiness:
        """See :meth:`AsyncProducer.ready`."""
        return self._run(self._producer.ready)
