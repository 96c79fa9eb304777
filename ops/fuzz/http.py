"""Bytes that are hardly HTTP, sent to a server that must answer with something that is, and never with a 5xx."""

from __future__ import annotations

import re
import socket
import time
from typing import Final

import hypothesis
from hypothesis import strategies as st

_STATUS: Final = re.compile(rb"HTTP/1\.1 (\d{3}) ")
_ANSWER_S: Final = 60.0
_PIECES: Final = st.sampled_from(
    [
        *(b"GET ", b"POST ", b"HEAD ", b"OPTIONS ", b"CONNECT ", b"PUT ", b"get ", b"PRI * HTTP/2.0"),
        *(b"/", b"*", b"/v1/jobs", b"/v1/jobs/x/stream", b"/v1/jobs/%00/cancel", b"//", b"/%", b"/%ff%fe", b"?%", b"#"),
        *(b"http://x/v1/jobs", b"http://[::1", b"/\xe2\x80\xa8", b"/../..", b"?limit=1&limit=x&cursor=%00"),
        *(
            b" HTTP/1.1\r\n",
            b" HTTP/1.0\r\n",
            b" HTTP/9.9\r\n",
            b" HTTP/1.1\n",
            b"\r\n",
            b"\n",
            b"\r",
            b"\0",
            b" ",
            b"\t",
        ),
        *(b"Host: 127.0.0.1\r\n", b"Host: \xff\r\n", b"Host:\r\n", b": x\r\n", b"X: \xc3\xa4\r\n", b"X\0: y\r\n"),
        *(b"Content-Length: 5\r\n", b"Content-Length: -1\r\n", b"Content-Length: 99999999999999999999\r\n"),
        *(b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: chunked, x\r\n", b"Expect: 100-continue\r\n"),
        *(b"Connection: close\r\n", b"Connection: upgrade\r\nUpgrade: websocket\r\n", b"Upgrade: h2c\r\n"),
        *(b"Origin: null\r\n", b"Origin: http://[\r\n", b"Access-Control-Request-Method: x\r\n"),
        *(b"Authorization: Bearer \xff\r\n", b"X-API-Key:\r\n", b"Last-Event-ID: 1-1\r\n", b"Last-Event-ID: \xff\r\n"),
        *(b"Idempotency-Key: \x80\r\n", b"Content-Type: application/json\r\n", b"Cookie: a\r\n\tb\r\n"),
        *(
            b'{"prompt": "x", "model": "echo"}',
            b'{"\\ud800": 1}',
            b"5\r\nhello\r\n",
            b"0\r\n\r\n",
            b"ffffffffffffffff\r\n",
        ),
    ]
)
_REQUEST: Final = st.builds(
    lambda method, path, headers, body: method + path + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n" + headers + b"\r\n" + body,
    st.sampled_from([b"GET ", b"POST ", b"OPTIONS ", b"HEAD ", b"DELETE "]),
    st.lists(_PIECES | st.binary(max_size=4), min_size=1, max_size=3).map(b"".join),
    st.lists(_PIECES, max_size=4).map(b"".join),
    st.lists(_PIECES, max_size=3).map(b"".join),
)
SENT: Final = st.lists(_REQUEST | st.lists(_PIECES | st.binary(max_size=8), max_size=12).map(b"".join), max_size=3).map(
    b"".join
)


def statuses(port: int, sent: bytes, *, half_close: bool = True) -> list[int]:
    """Send it, end, and read to the end: the statuses of all answers. Raises where an answer is no HTTP.

    With ``half_close`` the server is told that nothing more comes, and closes, perhaps before it has answered.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=_ANSWER_S) as link:
        received = b""
        try:
            link.sendall(sent)
            if half_close:
                link.shutdown(socket.SHUT_WR)
            while chunk := link.recv(1 << 16):
                received += chunk
        except ConnectionError:
            pass  # refused while it was still being sent
    if received and not received.startswith(b"HTTP/1.1 "):
        raise AssertionError(f"not HTTP: {received[:200]!r}")
    return [int(status) for status in _STATUS.findall(received)]


def fuzz(port: int, *, examples: int, seed: int, until: float | None = None) -> int:
    """Send again and again; answers how often. Raises what the smallest bytes that fail raise."""
    asked = 0

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(SENT)
    def send(sent: bytes) -> None:
        nonlocal asked
        if until is not None and time.monotonic() > until:
            return
        asked += 1
        for status in statuses(port, sent):
            if status >= 500:
                raise AssertionError(f"{status} for {sent!r}")

    send()
    alive = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    if statuses(port, alive, half_close=False) != [200]:
        raise AssertionError("it is no longer alive")
    return asked
