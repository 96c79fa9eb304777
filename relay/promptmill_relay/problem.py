"""Errors over HTTP: ``application/problem+json`` (RFC 9457) for every answer that is not a success."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, Final

import orjson

from promptmill.errors import PromptmillError
from promptmill.text import clean_text

MEDIA_TYPE: Final = "application/problem+json"
NO_SNIFFING: Final = (b"x-content-type-options", b"nosniff")
"""What a model or a user wrote is never to be taken for a page, whatever it looks like."""

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]


def problem_fields(error: PromptmillError, status: int | None = None) -> dict[str, Any]:
    """``type``, ``title``, ``status``, ``detail``, and ours: ``code``, ``retryable``; where known ``field``, ``limit``,
    ``retry_after_s``. ``status`` stands in for the code's usual one.
    """
    # Of a lone surrogate, which JSON can escape in the name of an unknown field, no JSON could be made.
    fields = {name: clean_text(value) if isinstance(value, str) else value for name, value in error.to_dict().items()}
    detail = fields.pop("message")
    return {
        "type": f"urn:promptmill:error:{error.code}",
        "title": error.code.replace("_", " ").capitalize(),
        "status": status or error.http_status,
        "detail": detail,
        **fields,
    }


def encode_problem(
    error: PromptmillError, *, status: int | None = None, headers: Iterable[tuple[bytes, bytes]] = ()
) -> tuple[int, Headers, bytes]:
    """Status, headers and body of the answer; ``Retry-After`` where the wait is known, rounded up to whole seconds."""
    fields = problem_fields(error, status)
    body = orjson.dumps(fields)
    out: Headers = [
        (b"content-type", MEDIA_TYPE.encode()),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
        NO_SNIFFING,
        *headers,
    ]
    if error.retry_after_s is not None and math.isfinite(error.retry_after_s):
        out.append((b"retry-after", str(max(0, math.ceil(error.retry_after_s))).encode()))
    if fields["status"] == 401:
        out.append((b"www-authenticate", b'Bearer realm="promptmill"'))
    return fields["status"], out, body


async def send_problem(
    send: Send, error: PromptmillError, *, status: int | None = None, headers: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    """Answer with ``error``. Nothing may have been sent before."""
    code, out, body = encode_problem(error, status=status, headers=headers)
    await respond(send, code, out, body)


async def respond(send: Send, status: int, headers: Headers, body: bytes = b"") -> None:
    """A whole answer in one go."""
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
