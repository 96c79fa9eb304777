"""What one client may ask of a server: heads, bodies, connections, streams, and the time for each of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from promptmill.contract import Limits
from promptmill.errors import BadRequest, Overloaded, PromptmillError
from promptmill.reading import Frame
from promptmill.settings import Settings
from promptmill_gateway import body
from promptmill_relay import protocol, server
from promptmill_relay.auth import Access, FixedSecret, KeyRing, StreamUrls
from promptmill_relay.problem import ASGIApp, encode_problem, respond
from promptmill_relay.server import Service, StreamServer
from promptmill_relay.stream import StreamEndpoint
from tests.support.gateway import running_gateway
from tests.support.processes import wait_until
from tests.support.web import FakeHub, FakeJob, Server, raw, request

LONG_S = 60.0
ECHO: dict[str, Any] = {"prompt": "hello", "model": "echo"}
PATH = "/v1/jobs/job-1/stream"
HELLO = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def hello(scope: Any, receive: Any, send: Any) -> None:
    """Answers at once and reads no body."""
    await respond(send, 200, [(b"content-length", b"5")], b"hello")


def streams(hub: FakeHub | None = None, settings: Settings | None = None, **api_keys: str) -> StreamEndpoint:
    access = Access(KeyRing(api_keys), StreamUrls(FixedSecret("secret"), 60))
    return StreamEndpoint(settings or Settings(), hub or FakeHub(), access)


@asynccontextmanager
async def served(
    app: ASGIApp, endpoint: StreamEndpoint | None = None, sock: socket.socket | None = None, **limits: int
) -> AsyncGenerator[Server]:
    """``app`` on a free port, with bounds of its own."""
    endpoint = endpoint or streams()
    sock = sock or socket.create_server(("127.0.0.1", 0))
    sock.setblocking(False)
    made = StreamServer(Service(app, endpoint, **limits))
    running = Server(sock.getsockname()[1], made, asyncio.create_task(made.serve(sockets=[sock])))
    try:
        await wait_until(lambda: made.started, "the server has started", LONG_S)
        yield running
    finally:
        await running.stop()


async def ended(reader: asyncio.StreamReader) -> bytes:
    """What comes until the server closes, politely or not."""
    received = b""
    async with asyncio.timeout(LONG_S):
        with contextlib.suppress(ConnectionError):
            while chunk := await reader.read(1 << 16):
                received += chunk
    return received


async def answered(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(LONG_S):
        head = await reader.readuntil(b"\r\n\r\n")
        return head + await reader.readexactly(5)


# -- connections ----------------------------------------------------------------------------------------------------


async def test_a_connection_too_many_is_answered_with_503_and_closed_and_a_place_is_given_again() -> None:
    async with served(hello, max_connections=2) as running, AsyncExitStack() as stack:
        first = await stack.enter_async_context(raw(running.port))
        second = await stack.enter_async_context(raw(running.port))
        for reader, writer in (first, second):
            writer.write(HELLO)
            assert (await answered(reader)).startswith(b"HTTP/1.1 200 ")
        async with raw(running.port) as (reader, _):
            refused = await ended(reader)
            assert refused.startswith(b"HTTP/1.1 503 ")
            assert b"retry-after: 5\r\n" in refused
            assert b"connection: close\r\n" in refused
            assert json.loads(refused.partition(b"\r\n\r\n")[2])["code"] == "backlog_full"
        second[1].close()
        await wait_until(lambda: len(running.server.server_state.connections) == 1, "a place is free", LONG_S)
        async with raw(running.port) as (reader, writer):
            writer.write(HELLO)
            assert (await answered(reader)).startswith(b"HTTP/1.1 200 ")


async def test_what_a_refused_connection_sends_is_not_served() -> None:
    async with served(hello, max_connections=1) as running, raw(running.port) as (reader, writer):
        writer.write(HELLO)
        await answered(reader)
        async with raw(running.port) as (other, other_writer):
            with contextlib.suppress(ConnectionError):
                other_writer.write(HELLO)
            assert b" 200 " not in await ended(other)


def test_connections_are_never_more_than_the_files_that_may_be_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (1024, 4096))
    assert StreamServer(Service(hello, streams(), max_connections=25_000)).config.max_connections == 896
    assert StreamServer(Service(hello, streams(), max_connections=10)).config.max_connections == 10


# -- time -----------------------------------------------------------------------------------------------------------


async def test_a_connection_that_never_says_anything_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.2)
    async with served(hello) as running, raw(running.port) as (reader, _):
        assert await ended(reader) == b""


async def test_a_head_that_comes_byte_by_byte_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.3)
    async with served(hello) as running, raw(running.port) as (reader, writer):
        assert await drip(reader, writer, b"GET / HTTP/1.1\r\nX: ", b"y") == b""


async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, first: bytes, again: bytes) -> bytes:
    """Send something, then a little again and again, until the server closes; answers what it said."""
    writer.write(first)
    reading = asyncio.create_task(ended(reader))
    while not reading.done():
        with contextlib.suppress(ConnectionError):
            writer.write(again)
            await writer.drain()
        await asyncio.wait({reading}, timeout=0.02)
    return reading.result()


@pytest.mark.parametrize("again", [b"\r\n", b"\n"])
async def test_bytes_that_begin_no_request_do_not_keep_a_connection(
    again: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Line ends between requests are skipped by the parser, yet each one ended uvicorn's own timer."""
    monkeypatch.setattr(protocol, "KEEP_ALIVE_S", 0.3)
    async with served(hello) as running, raw(running.port) as (reader, writer):
        assert (await drip(reader, writer, HELLO, again)).count(b"HTTP/1.1 200 ") == 1


@pytest.mark.parametrize(
    ("head", "again"),
    [
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n", b"z"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nz\r\n"),
    ],
)
async def test_the_rest_of_a_body_that_nobody_wants_is_not_received_for_ever(
    head: bytes, again: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "LINGER_S", 0.3)
    async with served(hello) as running, raw(running.port) as (reader, writer):
        said = await drip(reader, writer, head, again)
        # Closed at once, the client could lose the answer, which it had not read while it was sending.
        assert said.startswith(b"HTTP/1.1 200 ")
        assert said.endswith(b"hello")


async def test_an_unwanted_body_that_does_end_leaves_the_connection_as_good_as_before() -> None:
    async with served(hello) as running, raw(running.port) as (reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n")
        assert (await answered(reader)).startswith(b"HTTP/1.1 200 ")
        writer.write(b"abc" + HELLO)
        assert (await answered(reader)).startswith(b"HTTP/1.1 200 ")


async def test_requests_that_stand_in_line_are_all_answered() -> None:
    async with served(hello) as running, raw(running.port) as (reader, writer):
        writer.write(HELLO * 50)
        for _ in range(50):
            assert (await answered(reader)).startswith(b"HTTP/1.1 200 ")


async def test_a_body_that_drips_is_answered_with_408(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "TOTAL_TIMEOUT_S", 0.5)
    async with running_gateway(Settings(redis_url=redis_url)) as front, raw(front.port) as (reader, writer):
        head = b"POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100000\r\n\r\n"
        assert (await drip(reader, writer, head, b" ")).startswith(b"HTTP/1.1 408 ")


# -- bodies ---------------------------------------------------------------------------------------------------------


async def test_bodies_that_are_being_received_are_bounded_together(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body, "AT_ONCE", 2)
    settings = Settings(redis_url=redis_url, limits=Limits(request_bytes=1000))
    async with running_gateway(settings) as front, AsyncExitStack() as stack:
        head = b"POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\n"
        senders = [await stack.enter_async_context(raw(front.port)) for _ in range(3)]
        for _, writer in senders:
            writer.write(head + b" " * 900)
        waiting = [asyncio.create_task(reader.readuntil(b"\r\n\r\n")) for reader, _ in senders]
        async with asyncio.timeout(LONG_S):
            done, held = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        (refused,) = done
        assert refused.result().startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 2\r\n" in refused.result()
        # What was refused is forgotten: there is room for a small one now.
        assert (await front.http.post("/v1/jobs", json=ECHO)).status_code == 202
        for task in held:
            task.cancel()
        await asyncio.gather(*held, return_exceptions=True)
        for _, writer in senders:
            writer.close()

        async def fits() -> bool:
            last = await front.http.post("/v1/jobs", content=json.dumps(ECHO).encode().ljust(1000))
            return last.status_code == 202

        await wait_until(fits, "their room is free again, once the server knows that they left", LONG_S)


async def test_a_cancels_body_is_bounded_by_less(redis_url: str) -> None:
    async with running_gateway(Settings(redis_url=redis_url)) as front:
        path = (await front.http.post("/v1/jobs", json=ECHO)).headers["location"]
        answer = await front.http.post(f"{path}/cancel", content=b" " * (16 * 1024 + 1))
        assert (answer.status_code, answer.json()["code"]) == (413, "too_large")


# -- streams --------------------------------------------------------------------------------------------------------


async def test_one_users_readers_are_bounded_however_they_come_in() -> None:
    hub = FakeHub()
    hub.jobs |= {"job-1": FakeJob(user="ann"), "job-2": FakeJob(user="ann"), "job-3": FakeJob(user="bob")}
    endpoint = streams(hub, Settings(max_readers_per_user=2), ann="key-a", bob="key-b")
    signer = StreamUrls(FixedSecret("secret"), 60)
    async with served(endpoint, endpoint) as running:
        ann, bob = {"X-API-Key": "key-a"}, {"X-API-Key": "key-b"}
        async with (
            request(running.port, PATH, headers=ann),
            request(running.port, await signer.sign("job-2")) as second,
        ):
            assert second.status == 200
            for path, headers in ((PATH, ann), (await signer.sign("job-1"), None)):
                async with request(running.port, path, headers=headers) as refused:
                    assert refused.status == 429
                    assert refused.headers["retry-after"] == "5"
                    fields = json.loads(await refused.body())
                    assert (fields["code"], fields["field"], fields["limit"]) == ("backlog_full", "user", 2)
            async with request(running.port, "/v1/jobs/job-3/stream", headers=bob) as other:
                assert other.status == 200
        await wait_until(lambda: endpoint.open_streams == 0, "all have left", LONG_S)
        assert not hub.open_readers
        async with request(running.port, PATH, headers=ann) as again:
            assert again.status == 200


async def test_without_keys_users_are_names_and_their_readers_are_not_counted() -> None:
    hub = FakeHub()
    hub.jobs["job-1"] = FakeJob(user="ann")
    endpoint = streams(hub, Settings(max_readers_per_user=1))
    async with (
        served(endpoint, endpoint) as running,
        request(running.port, PATH),
        request(running.port, PATH) as second,
    ):
        assert second.status == 200


async def test_a_reader_that_sends_without_end_costs_no_memory_and_is_still_served() -> None:
    hub = FakeHub()
    hub.jobs["job-1"] = FakeJob()
    endpoint = streams(hub)
    async with served(endpoint, endpoint) as running, raw(running.port) as (reader, writer):
        writer.write(b"GET %b HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n" % PATH.encode())
        for _ in range(100):
            writer.write(b"z" * 100_000)
            async with asyncio.timeout(LONG_S):
                await writer.drain()
        hub.jobs["job-1"].events.put_nowait([Frame(b"7-1", b"done", b'{"type":"done"}')])
        async with asyncio.timeout(LONG_S):
            assert b"event: done" in await reader.readuntil(b"\n\n\r\n0\r\n\r\n")
        (connection,) = running.server.server_state.connections
        assert len(connection.cycle.body) <= 1 << 20


async def test_a_reader_that_reads_nothing_is_dropped_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_PEER_TIMEOUT_MS", 500)
    monkeypatch.delenv("PROMPTMILL_LISTEN_FD", raising=False)
    hub = FakeHub()
    hub.jobs["job-1"] = job = FakeJob()
    endpoint = streams(hub)
    sock = server.listening_socket(Settings(port=0))
    async with served(endpoint, endpoint, sock) as running:
        with socket.create_connection(("127.0.0.1", running.port)) as client:
            client.sendall(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % PATH.encode())
            await wait_until(lambda: endpoint.open_streams == 1, "the stream is open", LONG_S)
            text = b'{"type":"token","text":"%b"}' % (b"y" * 500_000)
            for n in range(60):
                job.events.put_nowait([Frame(b"7-%d" % n, b"token", text)])
            await wait_until(lambda: endpoint.open_streams == 0, "the reader was given up", LONG_S)
        assert not hub.open_readers


# -- answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "wait"),
    [
        (Overloaded("full", retry_after_s=0.2), 429, b"1"),
        (Overloaded("full", retry_after_s=5), 429, b"5"),
        (Overloaded("spent", code="budget_exceeded", retry_after_s=86_399.5), 429, b"86400"),
        (body.Busy("busy", retry_after_s=2), 429, b"2"),
        (Overloaded("never", retryable=False), 429, None),
        (BadRequest("no"), 400, None),
        (PromptmillError("odd", retry_after_s=float("inf")), 400, None),
        (PromptmillError("odd", retry_after_s=float("nan")), 400, None),
        (PromptmillError("odd", retry_after_s=-3), 400, b"0"),
    ],
)
def test_every_known_wait_is_told_in_whole_seconds(error: PromptmillError, status: int, wait: bytes | None) -> None:
    code, headers, sent = encode_problem(error)
    assert code == status
    assert dict(headers).get(b"retry-after") == wait
    assert json.loads(sent)["code"] == error.code


# -- requests in line -----------------------------------------------------------------------------------------------


async def test_a_reader_that_left_with_a_request_in_line_is_noticed_at_once() -> None:
    hub = FakeHub()
    hub.jobs["job-1"] = FakeJob()
    endpoint = streams(hub)
    async with served(endpoint, endpoint) as running:
        async with raw(running.port) as (reader, writer):
            writer.write(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % PATH.encode() + HELLO)
            async with asyncio.timeout(LONG_S):
                await reader.readuntil(b"retry: 1000\n\n")
            assert endpoint.open_streams == 1
        # No event comes, and no keepalive: nothing is written that could fail.
        await wait_until(lambda: endpoint.open_streams == 0, "the stream is closed", LONG_S)


async def test_nonsense_behind_an_open_stream_ends_it_and_does_not_pose_as_events(
    caplog: pytest.LogCaptureFixture,
) -> None:
    hub = FakeHub()
    hub.jobs["job-1"] = FakeJob()
    endpoint = streams(hub)
    async with served(endpoint, endpoint) as running, raw(running.port) as (reader, writer):
        writer.write(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % PATH.encode())
        async with asyncio.timeout(LONG_S):
            await reader.readuntil(b"retry: 1000\n\n")
        writer.write(b"\0\0\0")
        assert b"400" not in await ended(reader)
        await wait_until(lambda: endpoint.open_streams == 0, "the stream is closed", LONG_S)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
