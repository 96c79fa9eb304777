"""The simulator: which plan a request gets, and how it is played."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Any, Self

import orjson

from tests.support.processes import PATIENCE_S
from tests.support.simulator import records
from tests.support.simulator.anthropic import AnthropicMessages
from tests.support.simulator.connection import Connection, Request, head
from tests.support.simulator.dialect import ApiError, Dialect, dumps
from tests.support.simulator.gemini import GeminiContent
from tests.support.simulator.gemini_chat import GeminiChat
from tests.support.simulator.openai import OpenAIChat, models
from tests.support.simulator.records import Ledger, RequestRecord
from tests.support.simulator.script import STATUS_FAULTS, Plan, PlanError, plan_from_mapping, plan_from_model
from tests.support.simulator.stream import Answer, WholeAnswer
from tests.support.simulator.ticker import Ticker

_STREAM_HEAD = (
    b"Content-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n\r\n"
)
_MESSAGES = {400: "Invalid request.", 401: "Invalid key.", 404: "The model does not exist.", 529: "Overloaded"}


class Simulator:
    """A provider on a loopback port: OpenAI-compatible, Anthropic Messages and Gemini, faults included.

    A request's plan: the first queued one that fits its model, else the spec in its model name, else `default`.
    Use it as an async context manager, on one event loop; `url` has no trailing slash and no path.

    Args:
        host: address to listen on.
        port: 0 picks a free one.
        key: with a key, requests without it get the provider's answer to a wrong key.
        default: the plan of a request that no other plan fits.
    """

    def __init__(
        self, *, host: str = "127.0.0.1", port: int = 0, key: str | None = None, default: Plan | None = None
    ) -> None:
        self._host = host
        self._port = port
        self._key = key
        self._initial = default or Plan()
        self.default = self._initial
        self._ledger = Ledger()
        self._queue: deque[tuple[str, Plan]] = deque()
        self._queued = 0
        self._faulted: Counter[str] = Counter()
        self._connections: set[Connection] = set()
        self._waiters: list[asyncio.Future[None]] = []
        self._server: asyncio.Server | None = None
        self.url = ""

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen; sets `url`.

        Raises:
            OSError: the port is taken.
        """
        self._loop = asyncio.get_running_loop()
        self._ticker = Ticker(self._loop)
        self._server = await self._loop.create_server(
            lambda: Connection(self, self._loop), self._host, self._port, backlog=4096
        )
        self.url = f"http://{self._host}:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        """Stop listening and abort every connection; returns when all are closed."""
        if self._server is None:
            return
        self._server.close()
        self._ticker.close()
        for connection in list(self._connections):
            connection.abort()
        await self.wait_for(lambda: not self._connections, description="connections to close")
        await self._server.wait_closed()
        self._server = None

    @property
    def requests(self) -> list[RequestRecord]:
        """All provider requests since the last reset, in order of arrival."""
        return self._ledger.records

    @property
    def open_connections(self) -> int:
        """TCP connections, idle ones in a client's pool included, those that asked for `/_sim/` left out."""
        return sum(not connection.control for connection in self._connections)

    def plan(self, plan: Plan | None = None, **fields: Any) -> Plan:
        """Queue a plan (given, or from `Plan`'s fields) for one request; returns it.

        One with `times=N` serves N requests with its fault and one more without, then leaves the queue.

        Raises:
            PlanError: fields that are no plan.
        """
        made = plan if plan is not None else plan_from_mapping(fields)
        self._queued += 1
        self._queue.append((f"queued-{self._queued}", made))
        return made

    def reset(self) -> None:
        """Forget ended requests, queued plans and fault counters; the default plan is the first one again."""
        self._ledger.reset()
        self._queue.clear()
        self._faulted.clear()
        self.default = self._initial

    def stats(self) -> dict[str, Any]:
        """The ledger's sums, `open_connections`, `queued_plans`, and this process's `cpu_s` and `pid`."""
        return self._ledger.stats() | {
            "open_connections": self.open_connections,
            "queued_plans": len(self._queue),
            "cpu_s": time.process_time(),
            "pid": os.getpid(),
        }

    async def wait_for(self, condition: Callable[[], bool], *, description: str, timeout_s: float = PATIENCE_S) -> None:
        """Wait until `condition()` holds; it is asked whenever a connection or request opens or ends.

        Raises:
            TimeoutError: with `description`.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while not condition():
                    waiter = asyncio.get_running_loop().create_future()
                    self._waiters.append(waiter)
                    await waiter
        except TimeoutError:
            raise TimeoutError(f"waited {timeout_s} s for {description}; {self.stats()}") from None

    async def wait_idle(self, *, timeout_s: float = PATIENCE_S, connections: bool = False) -> None:
        """Wait until no request is open and, with `connections`, no TCP connection either.

        Raises:
            TimeoutError: with the stats.
        """
        await self.wait_for(
            lambda: not self._ledger.open_count and not (connections and self.open_connections),
            timeout_s=timeout_s,
            description="no open request",
        )

    async def wait_requests(self, count: int, *, timeout_s: float = PATIENCE_S) -> None:
        """Wait until `count` requests have arrived since the last reset.

        Raises:
            TimeoutError: with the stats.
        """
        await self.wait_for(
            lambda: self._ledger.stats()["requests"] >= count, timeout_s=timeout_s, description=f"{count} requests"
        )

    # Called by connections.

    def opened(self, connection: Connection) -> None:
        self._connections.add(connection)
        self._changed()

    def closed(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._changed()

    def ended(self, record: RequestRecord, outcome: str) -> None:
        self._ledger.end(record, outcome)
        self._changed()

    def handle(self, connection: Connection, request: Request) -> None:
        """Answer one request."""
        if request.path.startswith("/_sim/"):
            self._control(connection, request)
            return
        dialect = dialect_for(request)
        if dialect is None:
            self._other(connection, request)
            return
        record = self._ledger.start(request.method, request.target, dialect.name, request.headers)
        connection.record = record
        self._changed()
        try:
            plan = self._accept(request, dialect, record)
        except ApiError as error:
            self._refuse(connection, dialect, record, error)
            return
        record.fault = plan.fault
        if request.path.endswith(("/count_tokens", ":countTokens")):
            name = "totalTokens" if dialect.name == "gemini" else "input_tokens"
            record.status = 200
            connection.respond(200, dumps({name: max(1, dialect.ask.characters // 4)}), headers=dialect.headers())
            return
        self._play(connection, dialect, plan, record)

    def _accept(self, request: Request, dialect: Dialect, record: RequestRecord) -> Plan:
        """Check the request as the provider would, and choose its plan."""
        if self._key is not None and not dialect.authorised(request.headers, request.query, self._key):
            raise dialect.unauthorised()
        if dialect.name == "anthropic" and "anthropic-version" not in request.headers:
            raise ApiError(400, "anthropic-version: header is required")
        try:
            record.body = orjson.loads(request.body)
        except orjson.JSONDecodeError as error:
            raise ApiError(400, f"We could not parse the JSON body of your request: {error}") from error
        if not isinstance(record.body, dict):
            raise ApiError(400, "The JSON body is not an object.")
        ask = dialect.parse(record.body)
        record.model, record.stream, record.images = ask.model, ask.stream, ask.images
        try:
            return self._choose(ask.model)
        except PlanError as error:
            raise ApiError(400, str(error), param="model") from error

    def _choose(self, model: str) -> Plan:
        for index, (key, plan) in enumerate(self._queue):
            if plan.model is None or plan.model == model:
                chosen = self._counted(plan, plan.key or key)
                if plan.times is None or chosen.fault is None:
                    del self._queue[index]
                return chosen
        plan = plan_from_model(model, self.default) or self.default
        return self._counted(plan, plan.key or model)

    def _counted(self, plan: Plan, key: str) -> Plan:
        if plan.times is None:
            return plan
        if self._faulted[key] >= plan.times:
            return plan.healthy()
        self._faulted[key] += 1
        return plan

    def _play(self, connection: Connection, dialect: Dialect, plan: Plan, record: RequestRecord) -> None:
        fault = plan.fault or ""
        if fault == "hang":
            return
        if fault in STATUS_FAULTS or fault == "context":
            error = dialect.context_error(plan.message)
            if fault != "context":
                status = STATUS_FAULTS[fault]
                error = ApiError(status, plan.message or _MESSAGES.get(status, f"Simulated error {status}."))
            error.retry_after = plan.retry_after
            delayed = Delayed(lambda: self._refuse(connection, dialect, record, error))
            connection.answer = delayed
            self._ticker.at(time.monotonic() + plan.first, delayed)
            return
        record.status = 200
        if fault == "hang_headers":
            connection.write(head(200, dialect.headers()) + _STREAM_HEAD)
            return
        if dialect.ask.stream:
            answer = Answer(connection, self._ticker, dialect, plan, record)
            connection.answer = answer
            answer.begin(head(200, dialect.headers()) + _STREAM_HEAD)
            return
        if fault == "error_event":  # without a stream there is no other way to say it
            status = 529 if dialect.name == "anthropic" else 503
            self._refuse(connection, dialect, record, ApiError(status, plan.message or "Overloaded"))
            return
        whole = WholeAnswer(connection, self._ticker, dialect, plan, record)
        connection.answer = whole
        whole.begin(head(200, dialect.headers()) + b"Content-Type: application/json\r\n")

    def _refuse(self, connection: Connection, dialect: Dialect, record: RequestRecord, error: ApiError) -> None:
        record.status = error.status
        headers = dialect.headers() + dialect.error_headers(error)
        connection.respond(error.status, dialect.error(error), headers=headers, outcome=records.FAULTED)

    def _other(self, connection: Connection, request: Request) -> None:
        """Model lists, a root page for programs that probe it, and 404."""
        bare = request.method == "HEAD"
        if request.path in {"/v1/models", "/api/models"} and request.method in {"GET", "HEAD"}:
            dialect = OpenAIChat()
            if self._key is not None and not dialect.authorised(request.headers, request.query, self._key):
                connection.respond(401, dialect.error(dialect.unauthorised()), bare=bare)
            else:
                connection.respond(200, models(["sim"]), bare=bare)
        elif request.path == "/":
            connection.respond(200, b"{}", bare=bare)
        else:
            error = {"message": f"Unknown request URL: {request.method} {request.path}.", "type": "not_found"}
            connection.respond(404, dumps({"error": error}), bare=bare)

    def _control(self, connection: Connection, request: Request) -> None:
        """`/_sim/…`: GET `requests` (`?redact=1`) and `stats`; POST `plans` (one or a list), `default`, `reset`."""
        connection.control = True
        try:
            status, answer = self._controlled(request)
        except (PlanError, orjson.JSONDecodeError) as error:
            status, answer = 400, {"error": str(error)}
        connection.respond(status, dumps(answer))

    def _controlled(self, request: Request) -> tuple[int, Any]:
        match request.method, request.path.removeprefix("/_sim/"):
            case "GET", "requests":
                redact = request.query.get("redact") == "1"
                return 200, [record.as_json(redact=redact) for record in self.requests]
            case "GET", "stats":
                return 200, self.stats()
            case "POST", "plans":
                given = orjson.loads(request.body)
                plans = [plan_from_mapping(_object(item)) for item in (given if isinstance(given, list) else [given])]
                for plan in plans:
                    self.plan(plan)
                return 200, {"queued": len(self._queue)}
            case "POST", "default":
                self.default = plan_from_mapping(_object(orjson.loads(request.body)))
                return 200, {}
            case "POST", "reset":
                self.reset()
                return 200, {}
            case _:
                return 404, {"error": f"no {request.method} {request.path}"}

    def _changed(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


class Delayed:
    """One call after a time, unless the connection goes first."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call: Callable[[], None] | None = call

    def stop(self) -> None:
        self._call = None

    def resume(self) -> None:
        return

    def tick(self, now: float) -> None:
        if self._call is not None:
            self._call()


def dialect_for(request: Request) -> Dialect | None:
    """The protocol of a request's path; None for a path of no provider."""
    if request.method != "POST":
        return None
    path = request.path
    if path in {"/v1/chat/completions", "/api/chat/completions"}:
        return OpenAIChat()
    if path == "/v1beta/openai/chat/completions":
        return GeminiChat()
    if path in {"/v1/messages", "/v1/messages/count_tokens"}:
        return AnthropicMessages(counting=path.endswith("count_tokens"))
    if path.startswith("/v1beta/models/"):
        model, _, method = path.removeprefix("/v1beta/models/").rpartition(":")
        sse = request.query.get("alt") == "sse"
        if method == "streamGenerateContent":
            return GeminiContent(model, stream=sse, array=not sse)
        if method in {"generateContent", "countTokens"}:
            return GeminiContent(model, stream=False)
    return None


def _object(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise PlanError(f"plan: expected an object, got {type(value).__name__}")
    return value
