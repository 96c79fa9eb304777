"""Bodies of requests, bounded in size and time while they arrive."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Final

from starlette.requests import ClientDisconnect, Request

from promptmill.errors import BadRequest, Overloaded

IDLE_TIMEOUT_S: Final = 30.0
TOTAL_TIMEOUT_S: Final = 300.0
AT_ONCE: Final = 8
"""So many of the largest bodies may be in memory at once."""
_RETRY_WHEN_FULL_S: Final = 2.0


class BodyTimeout(BadRequest):
    """The body did not arrive in time; answered with 408."""


class Busy(Overloaded):
    """There is no room for it in this process at the moment; answered with 503."""


class Bodies:
    """The bodies that this process holds; together bounded, or a hundred slow senders could fill the memory."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._room = max_bytes * AT_ONCE

    @asynccontextmanager
    async def read(self, request: Request, limit: int | None = None) -> AsyncGenerator[bytes]:
        """The whole body, of ``limit`` bytes at most, which counts as held until the block ends.

        Raises
        ------
        BadRequest
            ``too_large`` as soon as more than ``limit`` bytes are announced or have come.
        BodyTimeout
            Nothing came for 30 s, or not all of it within 300 s.
        Busy
            ``backlog_full``: other bodies fill the room.
        """
        limit = limit or self._max_bytes
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > limit:
            raise _too_large(limit)
        chunks: list[bytes] = []
        size = 0
        try:
            async for chunk in _in_time(request):
                size += len(chunk)
                self._room -= len(chunk)
                if size > limit:
                    raise _too_large(limit)
                if self._room < 0:
                    raise Busy("too many requests are being received here: try again", retry_after_s=_RETRY_WHEN_FULL_S)
                chunks.append(chunk)
            yield b"".join(chunks)
        finally:
            self._room += size


async def _in_time(request: Request) -> AsyncGenerator[bytes]:
    loop = asyncio.get_running_loop()
    end_s = loop.time() + TOTAL_TIMEOUT_S
    stream = request.stream()
    while True:
        try:
            async with asyncio.timeout_at(min(loop.time() + IDLE_TIMEOUT_S, end_s)):
                chunk = await anext(stream, None)
        except TimeoutError:
            raise BodyTimeout("the body did not arrive in time", field="request", retryable=True) from None
        except ClientDisconnect:
            raise BadRequest("the body broke off", field="request", retryable=True) from None
        if chunk is None:
            return
        yield chunk


def _too_large(limit: int) -> BadRequest:
    message = f"the request is larger than {limit} bytes"
    return BadRequest(message, code="too_large", field="request", limit=limit)
