"""What every request passes first: CORS, and the protection of a gateway that has no keys.

A gateway without API keys listens on loopback only, yet any page in a browser on that machine can send requests there.
So without keys a request must name a loopback host (against DNS rebinding), and one that changes something must not
come from a page of another origin.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable
from typing import Final
from urllib.parse import urlsplit

from promptmill.errors import NotAuthorised
from promptmill.settings import LOOPBACK, Settings
from promptmill_relay.problem import ASGIApp, Headers, Message, Receive, Scope, Send, respond, send_problem

_PREFLIGHT: Final[Headers] = [
    (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
    (
        b"access-control-allow-headers",
        b"Authorization, Cache-Control, Content-Type, Idempotency-Key, Last-Event-ID, X-API-Key",
    ),
    (b"access-control-max-age", b"7200"),
]
_SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})


def is_loopback(host: str) -> bool:
    """Whether ``host`` (a name or an address, without port) is this machine only."""
    if host.lower() in LOOPBACK:
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Door:
    """ASGI middleware; costs one plain call for each message of an answer that needs CORS headers, else nothing."""

    def __init__(self, app: ASGIApp, settings: Settings, *, is_open: bool) -> None:
        self._app = app
        self._is_open = is_open
        self._any_origin = "*" in settings.cors_origins
        self._origins = frozenset(origin.rstrip("/").encode() for origin in settings.cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        origin, host, asked = _headers(scope)
        if self._is_open and (refusal := self._refusal(scope["method"], origin, host)):
            await send_problem(send, NotAuthorised(refusal), status=403)
            return
        cors = self._cors(origin)
        if asked and origin is not None and scope["method"] == "OPTIONS":
            await respond(send, 204, [*cors, *_PREFLIGHT] if _EXPOSED in cors else cors)
            return
        await self._app(scope, receive, _adding(send, cors) if cors else send)

    def _cors(self, origin: bytes | None) -> Headers:
        if not self._origins:
            return []
        if self._any_origin:
            return [(b"access-control-allow-origin", b"*"), _EXPOSED]
        vary = (b"vary", b"Origin")
        if origin in self._origins:
            return [(b"access-control-allow-origin", origin), _EXPOSED, vary]
        return [vary]

    def _refusal(self, method: str, origin: bytes | None, host: bytes | None) -> str | None:
        if host is not None and not is_loopback(_host_name(host)):
            return "without an API key only requests to a loopback address are answered: set api_key"
        if origin is None or self._any_origin or origin in self._origins or method in _SAFE_METHODS:
            return None
        if _authority(origin) != host:
            return "a page of another origin may not do this: name its origin in cors_origins, or set api_key"
        return None


_EXPOSED: Final = (b"access-control-expose-headers", b"Location, Retry-After")


def _headers(scope: Scope) -> tuple[bytes | None, bytes | None, bool]:
    origin: bytes | None = None
    host: bytes | None = None
    preflight = False
    for name, value in scope["headers"]:
        if name == b"origin":
            origin = value
        elif name == b"host":
            host = value
        elif name == b"access-control-request-method":
            preflight = True
    return origin, host, preflight


def _authority(origin: bytes) -> bytes | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None  # an address that is none, such as http://[


def _host_name(host: bytes) -> str:
    text = host.decode("latin-1")
    return text.partition("]")[0] + "]" if text.startswith("[") else text.partition(":")[0]


def _adding(send: Send, headers: Headers) -> Send:
    def answer(message: Message) -> Awaitable[None]:
        # Not a coroutine of its own: a stream's every token passes here.
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *headers]}
        return send(message)

    return answer
