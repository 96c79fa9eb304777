"""uvicorn's HTTP protocol with bounds that it lacks: on the head of a request, on time, and on connections.

A connection is dropped where it does not get on in time, whatever bytes come meanwhile:

=========================================  ============================================================================
what is waited for                         how long
=========================================  ============================================================================
a request's head, complete                 ``HEAD_TIMEOUT_S`` from its first byte, or from the connection's beginning
the next request                           ``KEEP_ALIVE_S`` from the last answer
the rest of a body that was not wanted     ``LINGER_S`` from the answer; closed at once, the answer itself could be lost
=========================================  ============================================================================

A body that is wanted is bounded by who reads it, an answer by who writes it.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from promptmill.errors import BadRequest, Overloaded, PromptmillError
from promptmill_relay.problem import encode_problem

HEAD_MAX_BYTES: Final = 64 * 1024
HEAD_TIMEOUT_S: Final = 15.0
# Longer than the usual 60 s of a proxy, so that it is the proxy that closes and no request meets a closing socket.
KEEP_ALIVE_S: Final = 75
LINGER_S: Final = 15.0
_RETRY_WHEN_FULL_S: Final = 5.0


class BoundedConfig(uvicorn.Config):
    """uvicorn's configuration, with the most connections that are served at once."""

    def __init__(self, app: Any, *, max_connections: int, **options: Any) -> None:
        super().__init__(app, http=BoundedHttpProtocol, timeout_keep_alive=KEEP_ALIVE_S, **options)
        self.max_connections = max_connections


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection; needs a :class:`BoundedConfig`."""

    def __init__(self, config: BoundedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._max_connections = config.max_connections
        self._timer: asyncio.TimerHandle | None = None
        self._head_open = True
        self._head_bytes = 0
        self._body_open = False
        self._running: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect(HEAD_TIMEOUT_S)
        if len(self.connections) > self._max_connections:
            error = Overloaded("too many connections", limit=self._max_connections, retry_after_s=_RETRY_WHEN_FULL_S)
            self._refuse(b"503 Service Unavailable", error, 503)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect(None)
        self._leave()
        super().connection_lost(exc)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0
        if not self._head_open:
            self._head_open = True
            self._expect(HEAD_TIMEOUT_S)

    def on_headers_complete(self) -> None:
        self._head_open = False
        self._body_open = True
        self._expect(None)
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > HEAD_MAX_BYTES:
            # Where the whole head came in one piece. The parser turns this into a 400.
            raise ValueError("the head of the request is too large")
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._body_open = False
        self._expect_next()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect_next()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return  # refused; what still comes is not looked at
        super().data_received(data)
        # Counted afterwards: a new head, which begins within this piece, sets the count to zero.
        if self._head_open:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_MAX_BYTES and not self.transport.is_closing():
                self.send_400_response("The head of the request is too large.")

    def send_400_response(self, msg: str) -> None:
        """Our kind of error in place of uvicorn's plain text."""
        self._refuse(b"400 Bad Request", BadRequest(msg), 400)

    def _refuse(self, status: bytes, error: PromptmillError, code: int) -> None:
        if not self._leave():
            _, headers, body = encode_problem(error, status=code, headers=[(b"connection", b"close")])
            head = b"".join(b"%b: %b\r\n" % header for header in headers)
            self.transport.write(b"HTTP/1.1 " + status + b"\r\n" + head + b"\r\n" + body)
        self.transport.close()

    def _leave(self) -> bool:
        """Tell the request that is being answered that nobody listens any more. True where its answer had begun.

        uvicorn tells the newest request only, which with requests in line is another one: that which runs would write
        to a closed connection, and a stream would learn only at its next event that its reader has left.
        """
        cycle = self._running
        if cycle is None or cycle.response_complete:
            return False
        cycle.disconnected = True
        cycle.message_event.set()
        return cycle.response_started

    def _expect_next(self) -> None:
        """The last request is answered: wait for its rest, or for the next one."""
        if self.cycle.response_complete and not self._head_open:
            # uvicorn's own timer ends with any byte that comes, one that begins no request too.
            self._expect(LINGER_S if self._body_open else KEEP_ALIVE_S)

    def _expect(self, seconds: float | None) -> None:
        """Drop the connection unless this is called again within so many seconds; None: no hurry."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if seconds is not None:
            self._timer = self.loop.call_later(seconds, self._too_slow)

    def _too_slow(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            self.transport.close()
