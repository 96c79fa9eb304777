"""What a gateway counts for its operators beside its streams. docs/observing.md explains every figure."""

from __future__ import annotations

import time
from typing import Final

from prometheus_client import Counter, Histogram

from promptmill.metrics import PREFIX, SHORT_S
from promptmill.tracing import request_span
from promptmill_relay.problem import ASGIApp, Message, Receive, Scope, Send

_REQUESTS: Final = Counter(
    f"{PREFIX}http_requests", "Requests other than streams, by the path of their route.", ("method", "path", "status")
)
_SECONDS: Final = Histogram(
    f"{PREFIX}http_request_seconds", "From a request's head to the end of its answer.", ("path",), buckets=SHORT_S
)
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE"})


class Measured:
    """ASGI middleware that counts what a FastAPI application answers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 0

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._traced(scope, receive, sent)
        finally:
            path = _route(scope)
            method = scope["method"] if scope["method"] in _METHODS else "other"
            _REQUESTS.labels(method, path, str(status or "none")).inc()
            _SECONDS.labels(path).observe(time.monotonic() - began)

    async def _traced(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST":
            # Whoever waits for a job by asking again and again would bury its trace.
            await self._app(scope, receive, send)
            return
        traceparent = next(
            (value.decode("latin-1") for name, value in scope["headers"] if name == b"traceparent"), None
        )
        with request_span("POST", traceparent) as span:
            await self._app(scope, receive, send)
            span.rename(f"POST {_route(scope)}")


def _route(scope: Scope) -> str:
    # Not the path itself, which holds ids and whatever else anybody asks for.
    return getattr(scope.get("route"), "path", "none")
