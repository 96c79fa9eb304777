"""Bodies of requests, bounded in size and time while they arrive."""

from __future__ import annotations

import asyncio
from typing import Final

from starlette.requests import ClientDisconnect, Request

from promptmill.errors import BadRequest

IDLE_TIMEOUT_S: Final = 30.0
TOTAL_TIMEOUT_S: Final = 300.0


class BodyTimeout(BadRequest):
    """The body did not arrive in time; answered with 408."""


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body.

    Raises
    ------
    BadRequest
        ``too_large`` as soon as more than ``limit`` bytes are announced or have come.
    BodyTimeout
        Nothing came for 30 s, or not all of it within 300 s.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise _too_large(limit)
    chunks: list[bytes] = []
    size = 0
    loop = asyncio.get_running_loop()
    end_s = loop.time() + TOTAL_TIMEOUT_S
    try:
        async with asyncio.timeout_at(loop.time() + IDLE_TIMEOUT_S) as bound:
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit:
                    raise _too_large(limit)
                chunks.append(chunk)
                bound.reschedule(min(loop.time() + IDLE_TIMEOUT_S, end_s))
    except TimeoutError:
        raise BodyTimeout("the body did not arrive in time", field="request", retryable=True) from None
    except ClientDisconnect:
        raise BadRequest("the body broke off", field="request", retryable=True) from None
    return b"".join(chunks)


def _too_large(limit: int) -> BadRequest:
    message = f"the request is larger than {limit} bytes"
    return BadRequest(message, code="too_large", field="request", limit=limit)
