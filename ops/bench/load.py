"""The readers: many HTTP connections in one event loop, a few microseconds a token.

A token's text is the time at which the provider wrote it (``time.monotonic_ns()``, one clock for the whole machine), so
the reader knows the token's latency from receipt alone. Each job uses one connection: submit, then stream.
"""

from __future__ import annotations

import asyncio
import gc
import time
from array import array
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, cast
from urllib.parse import urlsplit

import httptools
import uvloop
from ops.bench.sse import RESTART, Dialect, SSEParser

TICK_S = 0.25
SUBMIT_TIMEOUT_S = 30.0
ENDS = frozenset({"done", "error", "cancelled"})


class Target(Protocol):
    """How jobs are given to one system and read from it."""

    url: str
    """``http://host:port`` of the system."""
    submit_path: str
    direct: bool
    """The answer to the submission is the stream itself."""
    dialect: Dialect

    def submit_body(self, model: str) -> bytes:
        """Return the JSON body that submits one job for the model (a simulator specification)."""
        ...

    def job_paths(self, answer: bytes) -> tuple[str, str]:
        """Return the stream's path and the stored job's path from the body that answered the submission."""
        ...

    def stored_text(self, answer: bytes) -> str | None:
        """Return the text in the stored job's body; None if the job holds none (yet)."""
        ...


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to run: ``jobs`` jobs of ``model``, started evenly over ``ramp_s``, or one after another."""

    jobs: int
    tokens: int
    rate: float
    """Tokens a second of one job."""
    first_s: float
    """Seconds until a job's first token."""
    ramp_s: float = 0.0
    sequential: bool = False
    stall_s: float = 8.0
    """Readers without an end are given up when no reader of the run received anything for so long."""

    @property
    def model(self) -> str:
        """The simulator's specification of this plan's answers."""
        return f"sim:tokens={self.tokens},rate={self.rate:g},first={self.first_s:g},stamp=1"


@dataclass(kw_only=True)
class JobOutcome:
    """What one reader saw."""

    tokens: int = 0
    end: str = ""
    """``done``, ``error``, ``cancelled``; empty if the reader never got an end; else why the job could not be read."""
    disorder: int = 0
    """Tokens that were not younger than the one before: out of order or delivered twice."""
    parts: list[str] = field(default_factory=list[str])
    stored_path: str = ""

    @property
    def ended(self) -> bool:
        """The reader got an end event."""
        return self.end in ENDS


@dataclass(kw_only=True)
class LoadResult:
    """What all readers of a run saw; ``latencies_ns`` has one entry a received token, in no order."""

    outcomes: list[JobOutcome]
    latencies_ns: array[int]
    tokens_s: float
    """Seconds from the first received token of the run to the last."""
    submitting_s: float
    """Seconds from the first submission to the last one's answer."""


class _Run:
    """State shared by the readers of one run."""

    __slots__ = ("first_token_ns", "last_activity_ns", "last_submit_ns", "last_token_ns", "latencies_ns", "open_ends")

    def __init__(self) -> None:
        self.latencies_ns: array[int] = array("q")
        self.first_token_ns = 0
        self.last_token_ns = 0
        self.last_submit_ns = 0
        self.last_activity_ns = time.monotonic_ns()
        self.open_ends: set[asyncio.Future[None]] = set()


class TokenReader:
    """Turn one stream's bytes into an outcome; ``ended`` is resolved at its end event."""

    __slots__ = ("_dialect", "_last_stamp", "_parser", "_run", "ended", "outcome")

    def __init__(self, dialect: Dialect, run: _Run, outcome: JobOutcome, ended: asyncio.Future[None]) -> None:
        self._dialect = dialect
        self._parser = SSEParser()
        self._run = run
        self._last_stamp = 0
        self.outcome = outcome
        self.ended = ended

    def feed(self, body: bytes, now_ns: int) -> None:
        """Take body bytes that were received at ``now_ns``."""
        for event in self._parser.feed(body):
            text, end = self._dialect(event)
            if text:
                self._take(text, now_ns)
            elif end == RESTART:
                self.outcome.parts.clear()
                self.outcome.tokens = 0
            elif end:
                self.outcome.end = end
                self._run.last_activity_ns = now_ns
                if not self.ended.done():
                    self.ended.set_result(None)

    def _take(self, text: str, now_ns: int) -> None:
        run = self._run
        outcome = self.outcome
        outcome.parts.append(text)
        for word in text.split():
            stamp = int(word)
            run.latencies_ns.append(now_ns - stamp)
            outcome.tokens += 1
            if stamp <= self._last_stamp:
                outcome.disorder += 1
            self._last_stamp = stamp
        run.first_token_ns = run.first_token_ns or now_ns
        run.last_token_ns = run.last_activity_ns = now_ns


class Connection(asyncio.Protocol):
    """One HTTP/1.1 connection, one exchange at a time; bodies go to a reader or are collected."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._body = bytearray()
        self._reader: TokenReader | None = None
        self._now_ns = 0
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport (called by the event loop)."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own classes do not inherit from asyncio's

    def data_received(self, data: bytes) -> None:
        """Parse what arrived; one receipt time for all of it."""
        self._now_ns = time.monotonic_ns()
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        """Called by the parser with a part of the body."""
        if self._reader is not None and self._parser.get_status_code() == 200:
            self._reader.feed(body, self._now_ns)
        else:
            self._body += body

    def on_message_complete(self) -> None:
        """Called by the parser at the end of a response."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_result((self._parser.get_status_code(), bytes(self._body)))
        self._parser = httptools.HttpResponseParser(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail the exchange that is under way."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(exc or ConnectionResetError("the server closed the connection"))

    def request(
        self, method: str, path: str, body: bytes = b"", reader: TokenReader | None = None
    ) -> asyncio.Future[tuple[int, bytes]]:
        """Send a request; the future gives status and body when the response is complete.

        With a reader, the body of a 200 answer goes to it. Raises ``ConnectionError`` (from the future) if the
        connection closes first.
        """
        if self._transport is None:
            raise RuntimeError("request before the connection was made")
        self._reader = reader
        self._body.clear()
        self._answer = asyncio.get_running_loop().create_future()
        if self._transport.is_closing():
            self._answer.set_exception(ConnectionResetError("the server closed the connection"))
            return self._answer
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._host}\r\nAccept: */*\r\n"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self._transport.write(head.encode() + b"\r\n" + body)
        return self._answer

    def close(self) -> None:
        """Close the socket; an exchange under way is dropped."""
        if self._answer is not None and not self._answer.cancel() and not self._answer.cancelled():
            self._answer.exception()  # marks it as seen; whoever awaited it has handled it
        if self._transport is not None:
            self._transport.abort()


async def connect(url: str) -> Connection:
    """Open a connection to ``http://host:port``; raises ``OSError``, or ``ValueError`` for another URL."""
    parts = urlsplit(url)
    if parts.hostname is None or parts.port is None:
        raise ValueError(f"not a URL with host and port: {url!r}")
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(lambda: Connection(parts.netloc), parts.hostname, parts.port)
    return connection


async def _job(target: Target, plan: Plan, run: _Run, outcome: JobOutcome) -> None:
    """Submit one job and read it until its end, until the connection ends or until the run gives up."""
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    reader = TokenReader(target.dialect, run, outcome, ended)
    connection = await connect(target.url)
    try:
        body = target.submit_body(plan.model)
        if target.direct:
            answer = connection.request("POST", target.submit_path, body, reader)
        else:
            async with asyncio.timeout(SUBMIT_TIMEOUT_S):
                status, content = await connection.request("POST", target.submit_path, body)
            if status not in (200, 202):
                outcome.end = f"submit answered {status}: {content[:200]!r}"
                return
            stream_path, outcome.stored_path = target.job_paths(content)
            answer = connection.request("GET", stream_path, reader=reader)
        run.last_submit_ns = run.last_activity_ns = time.monotonic_ns()
        run.open_ends.add(ended)
        await asyncio.wait({ended, answer}, return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            status, content = await answer
            outcome.end = f"stream ended without an end event (status {status}): {content[:200]!r}"
    except (ConnectionError, TimeoutError) as error:
        outcome.end = f"{type(error).__name__}: {error}"
    finally:
        run.open_ends.discard(ended)
        connection.close()


async def _watch(run: _Run, stall_s: float) -> None:
    """Give up the open readers whenever nothing at all has happened for ``stall_s``.

    What passes while this process itself stands still is no silence: its readers have had no turn.
    """
    seen_ns, silent_s = run.last_activity_ns, 0.0
    while True:
        await asyncio.sleep(TICK_S)
        silent_s = silent_s + TICK_S if run.last_activity_ns == seen_ns else 0.0
        seen_ns = run.last_activity_ns
        if silent_s >= stall_s:
            for ended in list(run.open_ends):
                ended.cancel()


async def _start_at(at: float, job: Callable[[], Awaitable[None]]) -> None:
    await asyncio.sleep(max(0.0, at - asyncio.get_running_loop().time()))
    await job()


async def _load(target: Target, plan: Plan) -> LoadResult:
    run = _Run()
    outcomes = [JobOutcome() for _ in range(plan.jobs)]
    watch = asyncio.create_task(_watch(run, plan.stall_s))
    started_ns = time.monotonic_ns()
    try:
        if plan.sequential:
            for outcome in outcomes:
                await _job(target, plan, run, outcome)
        else:
            start = asyncio.get_running_loop().time()
            async with asyncio.TaskGroup() as group:
                for index, outcome in enumerate(outcomes):
                    at = start + index * plan.ramp_s / plan.jobs
                    group.create_task(_start_at(at, partial(_job, target, plan, run, outcome)))
    finally:
        watch.cancel()
    return LoadResult(
        outcomes=outcomes,
        latencies_ns=run.latencies_ns,
        tokens_s=max(0, run.last_token_ns - run.first_token_ns) / 1e9,
        submitting_s=max(0, run.last_submit_ns - started_ns) / 1e9,
    )


def run_load(target: Target, plan: Plan) -> LoadResult:
    """Run the plan against the target and return what its readers saw.

    Raises ``ExceptionGroup`` or ``OSError`` if the target cannot be reached or sends what is no token.
    """
    gc.collect()
    gc.disable()  # a collection over thousands of live objects would be counted as latency
    try:
        return uvloop.run(_load(target, plan))
    finally:
        gc.enable()


async def _stored(target: Target, paths: Sequence[str]) -> list[str | None]:
    texts: list[str | None] = []
    connection = await connect(target.url)
    try:
        for path in paths:
            if not path:
                texts.append(None)
                continue
            status, content = await connection.request("GET", path)
            texts.append(target.stored_text(content) if status == 200 else None)
    finally:
        connection.close()
    return texts


def stored_texts(target: Target, outcomes: Sequence[JobOutcome]) -> list[str | None]:
    """Fetch the stored text of each job, one after another; None where the target has none."""
    return uvloop.run(_stored(target, [outcome.stored_path for outcome in outcomes]))
