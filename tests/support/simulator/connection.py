"""HTTP/1.1 on one connection: requests in, answers out. Only what providers' clients use (RFC 9112)."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from typing import Protocol, cast
from urllib.parse import parse_qsl, unquote

from tests.support.simulator import records
from tests.support.simulator.records import RequestRecord

_HEAD_LIMIT = 64 * 1024
_BODY_LIMIT = 64 * 1024 * 1024


@dataclass(slots=True)
class Request:
    """One complete request. Header names are in lower case."""

    method: str
    target: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes


class Stoppable(Protocol):
    """An answer as its connection sees it."""

    def stop(self) -> None: ...

    def resume(self) -> None: ...


class Host(Protocol):
    """The server as its connections see it."""

    def opened(self, connection: Connection) -> None: ...

    def closed(self, connection: Connection) -> None: ...

    def handle(self, connection: Connection, request: Request) -> None: ...

    def ended(self, record: RequestRecord, outcome: str) -> None: ...


class BadRequestError(Exception):
    """Bytes that are no request; the connection is answered with `status` and closed."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Connection(asyncio.Protocol):
    """One client connection. Requests are answered in order, one at a time."""

    def __init__(self, host: Host, loop: asyncio.AbstractEventLoop) -> None:
        self._host = host
        self._loop = loop
        self._buffer = bytearray()
        self._busy = False
        self._keep_alive = True
        self._continued = False
        self.transport: asyncio.Transport | None = None
        self.record: RequestRecord | None = None
        self.answer: Stoppable | None = None
        self.paused = False
        self.control = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._host.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        if self.answer is not None:
            self.answer.stop()
        if self.record is not None:
            self._host.ended(self.record, records.DISCONNECTED)
        self.answer = self.record = None
        self._host.closed(self)

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        if self.answer is not None:
            self.answer.resume()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._advance()

    def write(self, data: bytes) -> None:
        if self.transport is not None:
            self.transport.write(data)

    def respond(
        self, status: int, body: bytes, *, headers: bytes = b"", outcome: str = records.FINISHED, bare: bool = False
    ) -> None:
        """Send a complete JSON answer; `bare` leaves the body out (HEAD)."""
        self.write(
            b"%bContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
            % (head(status, headers), len(body), b"" if bare else body)
        )
        self.answered(outcome)

    def answered(self, outcome: str) -> None:
        """The answer ended on a message boundary."""
        self._finish(outcome)
        self._busy = False
        if self.transport is None:
            return
        if not self._keep_alive:
            self.transport.close()
        elif self._buffer:
            self._loop.call_soon(self._advance)

    def close(self, outcome: str, *, reset: bool = False) -> None:
        """Close in mid-answer, with a FIN or, on `reset`, a RST (a few ms later: a RST overtakes unsent bytes)."""
        self._finish(outcome)
        if self.transport is None:
            return
        if reset:
            self._loop.call_later(0.005, self._reset)
        else:
            self.transport.close()

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def _finish(self, outcome: str) -> None:
        record, self.record, self.answer = self.record, None, None
        if record is not None:
            self._host.ended(record, outcome)

    def _reset(self) -> None:
        if self.transport is None:
            return
        descriptor = os.dup(self.transport.get_extra_info("socket").fileno())
        with socket.socket(fileno=descriptor) as plain:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def _advance(self) -> None:
        """Hand over the next request when one is complete and none is being answered."""
        if self._busy or self.transport is None:
            return
        try:
            request = self._take()
        except BadRequestError as error:
            self._keep_alive = False
            self._busy = True
            self.respond(error.status, b'{"error":{"message":"%b"}}' % str(error).encode())
            return
        if request is not None:
            self._busy = True
            self._host.handle(self, request)

    def _take(self) -> Request | None:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > _HEAD_LIMIT:
                raise BadRequestError(431, "request head too large")
            return None
        method, target, version, headers = parse_head(bytes(self._buffer[:end]))
        if not self._continued and headers.get("expect", "").lower() == "100-continue":
            self._continued = True
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        taken = self._body(end + 4, headers)
        if taken is None:
            return None
        body, consumed = taken
        del self._buffer[:consumed]
        self._continued = False
        self._keep_alive = headers.get("connection", "").lower() != "close" and version == "HTTP/1.1"
        path, _, query = target.partition("?")
        return Request(method, target, unquote(path), dict(parse_qsl(query)), headers, body)

    def _body(self, start: int, headers: Mapping[str, str]) -> tuple[bytes, int] | None:
        """The request's body and the buffer's length up to its end; None when it is not all there."""
        if headers.get("transfer-encoding", "").lower() == "chunked":
            return parse_chunks(self._buffer, start)
        length = headers.get("content-length", "0")
        if not length.isdigit():
            raise BadRequestError(400, "Content-Length is not a number")
        if int(length) > _BODY_LIMIT:
            raise BadRequestError(413, "request body too large")
        end = start + int(length)
        return (bytes(self._buffer[start:end]), end) if len(self._buffer) >= end else None


def head(status: int, headers: bytes = b"") -> bytes:
    """A status line, `Date`, and `headers` (complete lines); the caller adds the rest and the empty line."""
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:  # 529
        phrase = "Overloaded"
    return f"HTTP/1.1 {status} {phrase}\r\nDate: {formatdate(usegmt=True)}\r\n".encode() + headers


def parse_head(data: bytes) -> tuple[str, str, str, dict[str, str]]:
    """Method, target, version and headers of a request head.

    Raises:
        BadRequestError: not HTTP/1.x.
    """
    lines = data.decode("latin-1").split("\r\n")
    parts = lines[0].split(" ")
    if len(parts) != 3 or not parts[2].startswith("HTTP/1."):
        raise BadRequestError(400, "no HTTP/1.1 request line")
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if not colon:
            raise BadRequestError(400, "header line without a colon")
        headers[name.lower()] = value.strip()
    return parts[0], parts[1], parts[2], headers


def parse_chunks(data: bytearray, start: int) -> tuple[bytes, int] | None:
    """A chunked body that begins at `start`, and where it ends; None when it is not all there.

    Raises:
        BadRequestError: a chunk size that is no hexadecimal number, or too much.
    """
    body = bytearray()
    while True:
        line_end = data.find(b"\r\n", start)
        if line_end < 0:
            return None
        try:
            size = int(bytes(data[start:line_end]).partition(b";")[0], 16)
        except ValueError:
            raise BadRequestError(400, "bad chunk size") from None
        if len(body) + size > _BODY_LIMIT:
            raise BadRequestError(413, "request body too large")
        end = line_end + 2 + size
        if len(data) < end + 2:
            return None
        if size == 0:
            return bytes(body), end + 2
        body += data[line_end + 2 : end]
        start = end + 2
