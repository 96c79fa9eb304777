"""``GET /v1/jobs/{id}/stream``: a job's events as Server-Sent Events, as a bare ASGI endpoint.

Who wins the race:

=================================  ====================================================================================
an event and the reader leaving    the reader: nothing more is written, and everything of it is freed at once
an event and our shutdown          the shutdown: the stream ends between two events; the reader resumes elsewhere
the end event and our shutdown     whichever comes first; after a shutdown the reader gets the end elsewhere
a reader too many and one leaving  the order of arrival in this process
a reader leaving and our shutdown  the shutdown: who is sent away has not left
=================================  ====================================================================================

A reader that does not read blocks its own ``send``; the hub bounds what it queues for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Final, Protocol
from urllib.parse import parse_qsl

from promptmill.errors import BadRequest, NotFound, Overloaded, PromptmillError, StoreUnavailable
from promptmill.keys import check_job_id
from promptmill.logs import bound
from promptmill.reading.frame import END_TYPES
from promptmill.settings import Settings
from promptmill.tracing import Kind, Span, job_span
from promptmill_relay import sse
from promptmill_relay.auth import Access
from promptmill_relay.meters import note_stream
from promptmill_relay.problem import NO_SNIFFING, Headers, Receive, Scope, Send, respond, send_problem

logger = logging.getLogger(__name__)

_PREFIX: Final = "/v1/jobs/"
_SUFFIX: Final = "/stream"
_BODY: Final = "http.response.body"
_RETRY_WHEN_FULL_S: Final = 5.0
_HEADERS: Final[Headers] = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    # no-transform: a proxy that compresses holds events back until its block is full.
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),
    NO_SNIFFING,
]


class EventReader(Protocol):
    """One reader of one job: see :mod:`promptmill.reading`."""

    @property
    def user(self) -> str | None: ...

    @property
    def trace(self) -> str | None: ...

    @property
    def finished(self) -> bool: ...

    def __aiter__(self) -> AsyncIterator[Sequence[sse.EventFrame]]: ...

    async def aclose(self) -> None: ...


class EventHub(Protocol):
    """Where readers are opened: see :mod:`promptmill.reading`."""

    async def open(self, job_id: str, after: str | None) -> EventReader: ...


def stream_job(path: str) -> str | None:
    """The job whose stream ``path`` names, as it stands there, or None where it is another path."""
    if path.startswith(_PREFIX) and path.endswith(_SUFFIX):
        return path[len(_PREFIX) : -len(_SUFFIX)] or None
    return None


class _Stream:
    """One open answer, and the way to end it from outside."""

    __slots__ = ("_scope", "ended", "gone")

    def __init__(self) -> None:
        self.ended = False
        self.gone = False
        self._scope: asyncio.Timeout | None = None

    @asynccontextmanager
    async def scope(self) -> AsyncGenerator[None]:
        """Runs the block until :meth:`end` is called; then ``ended`` is True and the block was cancelled."""
        try:
            # A timeout without a deadline is a scope that others can end.
            async with asyncio.timeout(None) as scope:
                self._scope = scope
                try:
                    yield
                finally:
                    self._scope = None
        except TimeoutError:
            if not self.ended:
                raise

    def end(self) -> None:
        """Leave the scope now; does nothing the second time, because a scope that is being left cannot be told to."""
        scope, self._scope = self._scope, None
        if scope is not None:
            self.ended = True
            scope.reschedule(asyncio.get_running_loop().time())

    async def end_when_gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            continue
        self.gone = True
        self.end()


class StreamEndpoint:
    """Answers requests for streams. One per process and event loop.

    Errors before the first byte are problem+json; afterwards an error ends the body, and the reader reconnects.
    ``on_left`` is told the job of each reader that left before the end, once it is unsubscribed; not of those that we
    sent away ourselves. It must not block.
    """

    def __init__(
        self, settings: Settings, hub: EventHub, access: Access, on_left: Callable[[str], None] | None = None
    ) -> None:
        self._hub = hub
        self._access = access
        self._on_left = on_left
        self._max_readers = settings.max_readers
        self._max_readers_per_user = settings.max_readers_per_user
        self._readers_of: Counter[str] = Counter()
        self._greeting = sse.retry(settings.retry_ms)
        self._streams: set[_Stream] = set()
        self._stopping = False
        self.events_sent = 0
        """To all readers, since this process began."""

    @property
    def open_streams(self) -> int:
        """How many readers there are now."""
        return len(self._streams)

    def facts(self) -> tuple[int, int]:
        """How many readers there are now, and how many events were sent."""
        return len(self._streams), self.events_sent

    def stop(self) -> None:
        """End every stream between two events, and admit no more. Returns at once; the answers end on their own."""
        self._stopping = True
        for stream in self._streams:
            stream.end()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] not in {"GET", "HEAD"}:
            allow = (b"allow", b"GET, HEAD, OPTIONS")
            if scope["method"] == "OPTIONS":
                await respond(send, 204, [allow])
            else:
                error = BadRequest(f"a stream is read with GET, not {scope['method']}")
                await send_problem(send, error, status=405, headers=[allow])
            return
        if len(self._streams) >= self._max_readers:
            note_stream("refused")
            error = Overloaded("too many readers here", limit=self._max_readers, retry_after_s=_RETRY_WHEN_FULL_S)
            await send_problem(send, error, status=503)
            return
        stream = _Stream()
        self._streams.add(stream)
        try:
            with bound(**_about(scope["path"])):
                await self._answer(stream, scope, receive, send)
        finally:
            self._streams.discard(stream)

    async def _answer(self, stream: _Stream, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            user, reader = await self._open(scope)
        except StoreUnavailable as err:
            # EventSource gives up for good on any other status, but after the end of a 200 it comes back.
            logger.warning("a reader is sent away to come again: %s", err)
            note_stream("come_again")
            await self._come_again(send, "the store cannot be reached")
            return
        except PromptmillError as err:
            note_stream("denied")
            await send_problem(send, err)
            return
        left = False
        try:
            if reader.finished:
                note_stream("empty")
                await respond(send, 204, [(b"cache-control", b"no-store")])
            elif scope["method"] == "HEAD":
                await respond(send, 200, _HEADERS)
            else:
                with self._counted(reader.user or user), job_span(*_traced(scope, reader)) as span:
                    left = await self._pass_on(stream, user, reader, receive, send, span)
        except Overloaded as err:
            note_stream("refused")
            await send_problem(send, err)
        finally:
            await reader.aclose()
        if left and self._on_left is not None:
            self._on_left(_job_id(scope["path"]))

    @contextmanager
    def _counted(self, owner: str | None) -> Generator[None]:
        """One reader more of a user's jobs while the block runs. Without API keys users are only names."""
        if owner is None or self._access.is_open:
            yield
            return
        if self._readers_of[owner] >= self._max_readers_per_user:
            raise Overloaded(
                "too many readers of this user's jobs here",
                field="user",
                limit=self._max_readers_per_user,
                retry_after_s=_RETRY_WHEN_FULL_S,
            )
        self._readers_of[owner] += 1
        try:
            yield
        finally:
            self._readers_of[owner] -= 1
            if not self._readers_of[owner]:
                del self._readers_of[owner]

    async def _open(self, scope: Scope) -> tuple[str | None, EventReader]:
        query = _query(scope["query_string"])
        job_id = _job_id(scope["path"])
        user = await self._access.reader(scope["headers"], query, job_id)
        after = _last_event_id(scope["headers"]) or query.get("last_event_id") or None
        reader = await self._hub.open(job_id, after)
        if user is not None and reader.user not in {None, user}:
            await reader.aclose()
            raise NotFound(f"there is no job {job_id}", field="id")
        return user, reader

    async def _pass_on(
        self, stream: _Stream, user: str | None, reader: EventReader, receive: Receive, send: Send, span: Span
    ) -> bool:
        """Until the end, or until somebody goes. True where that was the reader, of a job that it may read."""
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        await send({"type": _BODY, "body": self._greeting, "more_body": True})
        watch = asyncio.create_task(stream.end_when_gone(receive))
        farewell, outcome = b"", ""
        checked = user is None or reader.user == user
        try:
            async with stream.scope():
                if self._stopping:
                    stream.end()
                async for frames in reader if checked else _own(reader, user):
                    over = bool(frames) and frames[-1][1] in END_TYPES
                    await send({"type": _BODY, "body": sse.encode(frames) or sse.KEEPALIVE, "more_body": not over})
                    self.events_sent += len(frames)
                    if over:
                        outcome = "ended"
                        return False
        except PromptmillError as err:
            logger.warning("a stream ends early: %s", err)
            outcome = "interrupted"
            farewell = sse.comment("interrupted: reconnect")
        finally:
            watch.cancel()
            outcome = outcome or ("stopped" if self._stopping else "left")
            note_stream(outcome)
            span.note({"promptmill.stream.outcome": outcome})
        if stream.ended:
            farewell = sse.comment("this server is going away: reconnect")
        if not stream.gone:
            await send({"type": _BODY, "body": farewell, "more_body": False})
        return stream.gone and not self._stopping and (user is None or reader.user == user)

    async def _come_again(self, send: Send, why: str) -> None:
        await respond(send, 200, _HEADERS, self._greeting + sse.comment(why))


def _traced(scope: Scope, reader: EventReader) -> tuple[str, str | None, str, Kind]:
    return _job_id(scope["path"]), reader.trace, "promptmill.stream", "server"


async def _own(reader: EventReader, user: str | None) -> AsyncIterator[Sequence[sse.EventFrame]]:
    """The reader's events, but none of a foreign job: with Redis away nobody could say whose it is."""
    checked = False
    async for frames in reader:
        if frames and not checked:
            if reader.user != user:
                return
            checked = True
        yield frames


def _job_id(path: str) -> str:
    job_id = stream_job(path) or ""
    try:
        return check_job_id(job_id)
    except BadRequest:
        raise NotFound(f"there is no job {job_id[:80]!r}", field="id") from None


def _about(path: str) -> dict[str, str]:
    """For the log's lines: nothing of what cannot be a job."""
    try:
        return {"job_id": _job_id(path)}
    except NotFound:
        return {}


def _query(query: bytes) -> Mapping[str, str]:
    try:
        return dict(parse_qsl(query.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=20))
    except ValueError:
        raise BadRequest("too many query parameters", field="query") from None


def _last_event_id(headers: Sequence[tuple[bytes, bytes]]) -> str | None:
    for name, value in headers:
        if name == b"last-event-id":
            return value.decode("utf-8", "replace").strip()
    return None
