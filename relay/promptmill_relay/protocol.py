"""uvicorn's HTTP protocol with bounds on the head of a request: its size, and the time until it is complete.

uvicorn bounds neither with httptools, so one connection could fill the memory, and idle ones could stay for ever.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from promptmill.errors import BadRequest
from promptmill_relay.problem import encode_problem

HEAD_MAX_BYTES: Final = 64 * 1024
HEAD_TIMEOUT_S: Final = 15.0


class BoundedHttpProtocol(HttpToolsProtocol):
    """Drops a connection whose request's head is too large or takes too long."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_open = True
        self._head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_complete()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0
        if not self._head_open:
            self._expect_head()

    def on_headers_complete(self) -> None:
        self._head_complete()
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > HEAD_MAX_BYTES:
            # Where the whole head came in one piece. The parser turns this into a 400.
            raise ValueError("the head of the request is too large")
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # Counted afterwards: a new head, which begins within this piece, sets the count to zero.
        if self._head_open:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_MAX_BYTES and not self.transport.is_closing():
                self.send_400_response("The head of the request is too large.")

    def send_400_response(self, msg: str) -> None:
        """Our kind of error in place of uvicorn's plain text."""
        _, headers, body = encode_problem(BadRequest(msg), headers=[(b"connection", b"close")])
        head = b"".join(b"%b: %b\r\n" % header for header in headers)
        self.transport.write(b"HTTP/1.1 400 Bad Request\r\n" + head + b"\r\n" + body)
        self.transport.close()

    def _expect_head(self) -> None:
        self._head_open = True
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._too_slow)

    def _head_complete(self) -> None:
        self._head_open = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_slow(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self.transport.close()
