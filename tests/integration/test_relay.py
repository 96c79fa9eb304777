"""The relay over real HTTP: first its endpoint with a hub without Redis, then the process with a real store."""

import asyncio
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

from promptmill.errors import ConfigError, PromptmillError, StoreUnavailable
from promptmill.reading import Frame
from promptmill.settings import Settings
from promptmill_relay import protocol, server
from promptmill_relay.auth import Access, FixedSecret, KeyRing, Secret, StreamUrls
from promptmill_relay.door import Door
from promptmill_relay.stream import StreamEndpoint
from tests.support.processes import PATIENCE_S, wait_until
from tests.support.web import FakeHub, FakeJob, MissingSecret, Server, raw, request, serving

PATH = "/v1/jobs/job-1/stream"


def token(n: int, text: str = "x") -> Frame:
    return Frame(b"7-%d" % n, b"token", b'{"type":"token","text":"%b"}' % text.encode())


DONE = Frame(b"7-9", b"done", b'{"type":"done","text":"xx"}')


class Relay:
    """A running endpoint, its hub, and one job ``job-1`` of user ``ann``."""

    def __init__(self, running: Server, streams: StreamEndpoint, hub: FakeHub, urls: StreamUrls) -> None:
        self.running = running
        self.port = running.port
        self.streams = streams
        self.hub = hub
        self.urls = urls
        self.job = hub.jobs["job-1"]

    def say(self, *batches: list[Frame] | Exception | None) -> None:
        for batch in batches:
            self.job.events.put_nowait(batch)


@asynccontextmanager
async def relay(
    settings: Settings | None = None, secret: Secret | None = None, **api_keys: str
) -> AsyncGenerator[Relay]:
    settings = settings or Settings()
    hub = FakeHub()
    hub.jobs["job-1"] = FakeJob(user="ann")
    urls = StreamUrls(secret or FixedSecret("secret"), 60)
    access = Access(KeyRing(api_keys), urls)
    streams = StreamEndpoint(settings, hub, access)
    async with serving(Door(streams, settings, is_open=access.is_open), streams) as running:
        yield Relay(running, streams, hub, urls)
    assert not hub.open_readers


async def test_events_arrive_as_they_come_and_the_body_ends_behind_the_end_event() -> None:
    async with relay() as mill, request(mill.port, PATH) as answer:
        assert answer.status == 200
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["cache-control"] == "no-cache, no-transform"
        assert answer.headers["x-accel-buffering"] == "no"
        assert "content-length" not in answer.headers
        mill.say([token(1, "a")])
        (first,) = await answer.read_events(1)
        assert (first.type, first.last_event_id) == ("token", "7-1")
        mill.say([token(2), token(3)], [DONE], None)
        rest = await answer.read_events()
        assert [message.last_event_id for message in rest] == ["7-2", "7-3", "7-9"]
        assert answer.events.retry_ms == 1000
        assert answer.ended


async def test_a_batch_is_one_write() -> None:
    async with relay() as mill, request(mill.port, PATH) as answer:
        assert await answer.read_chunk() == b"retry: 1000\n\n"
        mill.say([token(1), token(2)])
        assert (await answer.read_chunk()).count(b"\n\n") == 2


@pytest.mark.parametrize(
    ("path", "headers", "expected"),
    [
        (PATH, {}, None),
        (PATH, {"Last-Event-ID": "7-1"}, "7-1"),
        (PATH, {"Last-Event-ID": ""}, None),
        (PATH + "?last_event_id=7-2", {}, "7-2"),
        (PATH + "?last_event_id=7-2", {"last-event-id": "7-1"}, "7-1"),
        (PATH + "?last_event_id=", {}, None),
    ],
)
async def test_the_header_wins_over_the_query(path: str, headers: dict[str, str], expected: str | None) -> None:
    async with relay() as mill, request(mill.port, path, headers=headers):
        assert mill.job.opened_after == [expected]


async def test_a_reconnect_from_the_end_gets_204() -> None:
    async with relay() as mill:
        mill.job.finished_after = "7-9"
        async with request(mill.port, PATH, headers={"Last-Event-ID": "7-9"}) as answer:
            assert answer.status == 204
            assert await answer.body() == b""


@pytest.mark.parametrize("path", ["/v1/jobs/other/stream", "/v1/jobs/a%2Fb/stream", "/v1/jobs/%00/stream"])
async def test_an_unknown_job_is_a_problem_with_404(path: str) -> None:
    async with relay() as mill, request(mill.port, path) as answer:
        assert answer.status == 404
        assert answer.headers["content-type"] == "application/problem+json"
        assert b'"code":"not_found"' in await answer.body()


async def test_head_tells_what_get_would_without_a_body() -> None:
    async with relay() as mill:
        async with request(mill.port, PATH, method="HEAD", headers={"Connection": "close"}) as answer:
            assert answer.status == 200
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert await answer.reader.read() == b""
        async with request(mill.port, "/v1/jobs/none/stream", method="HEAD") as answer:
            assert answer.status == 404


async def test_other_methods_are_told_which_ones_there_are() -> None:
    async with relay() as mill:
        async with request(mill.port, PATH, method="POST") as answer:
            assert answer.status == 405
            assert answer.headers["allow"] == "GET, HEAD, OPTIONS"
        async with request(mill.port, PATH, method="OPTIONS") as answer:
            assert answer.status == 204


async def test_silence_is_filled_with_comments() -> None:
    async with relay() as mill, request(mill.port, PATH) as answer:
        await answer.read_chunk()
        mill.say([], [])
        assert [await answer.read_chunk(), await answer.read_chunk()] == [b": keepalive\n\n"] * 2


async def test_a_reader_that_leaves_frees_everything_at_once() -> None:
    async with relay() as mill:
        async with request(mill.port, PATH) as answer:
            await answer.read_chunk()
            assert mill.streams.open_streams == 1
        await wait_until(lambda: not mill.hub.open_readers, "the hub's reader is closed")
        assert mill.streams.open_streams == 0


async def test_a_reader_too_many_is_sent_away_and_a_place_that_becomes_free_is_given_again() -> None:
    async with relay(Settings(max_readers=1)) as mill:
        async with request(mill.port, PATH), request(mill.port, PATH) as second:
            assert second.status == 503
            assert second.headers["retry-after"] == "5"
            assert b'"code":"backlog_full"' in await second.body()
        await wait_until(lambda: mill.streams.open_streams == 0, "the first reader is gone")
        async with request(mill.port, PATH) as third:
            assert third.status == 200


async def test_shutdown_ends_every_stream_between_two_events() -> None:
    async with relay() as mill, request(mill.port, PATH) as answer, request(mill.port, PATH) as other:
        mill.say([token(1)], [token(2)])
        await answer.read_events(1)
        await mill.running.stop()
        for stream in (answer, other):
            await stream.read_events()
            assert stream.ended
            assert stream.events.comments == ["this server is going away: reconnect"]


async def test_a_reader_that_never_reads_does_not_hold_the_shutdown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_CUT_AFTER_S", 0.3)
    monkeypatch.setattr(server, "GRACE_S", 600)
    async with relay() as mill, request(mill.port, PATH) as answer:
        large = token(1, "y" * 1_000_000)
        mill.say(*([large] for _ in range(50)))
        await wait_until(lambda: mill.job.events.qsize() < 50, "the first events were written")
        left = mill.job.events.qsize()
        # It is not read: the socket's buffers fill up, and the rest stays where it is.
        assert left > 20
        async with asyncio.timeout(PATIENCE_S):
            await mill.running.stop()
        assert not answer.ended


async def test_an_error_in_mid_stream_ends_the_body_so_that_the_reader_comes_again() -> None:
    async with relay() as mill, request(mill.port, PATH) as answer:
        mill.say([token(1)], StoreUnavailable("gone"))
        assert len(await answer.read_events()) == 1
        assert answer.events.comments == ["interrupted: reconnect"]


async def test_an_unexpected_failure_in_mid_stream_cuts_the_body_short() -> None:
    async with relay() as mill, request(mill.port, PATH) as answer:
        mill.say([token(1)], ZeroDivisionError("a bug"))
        await answer.read_events(1)
        with pytest.raises(asyncio.IncompleteReadError):
            await answer.read_chunk()


async def test_while_the_signing_key_cannot_be_read_a_browser_is_told_to_come_again() -> None:
    async with relay(secret=MissingSecret()) as mill, request(mill.port, PATH + "?expires=9&sig=x") as answer:
        assert answer.status == 200
        assert await answer.read_events() == []
        assert answer.events.retry_ms == 1000


async def test_a_user_reads_own_jobs_only() -> None:
    async with relay(ann="key-a", bob="key-b") as mill:
        for headers, status in (
            ({"Authorization": "Bearer key-a"}, 200),
            ({"X-API-Key": "key-b"}, 404),
            ({"X-API-Key": "key-c"}, 401),
            ({}, 401),
        ):
            async with request(mill.port, PATH, headers=headers) as answer:
                assert answer.status == status, headers
        async with request(mill.port, PATH) as answer:
            assert answer.headers["www-authenticate"].startswith("Bearer")


async def test_a_signed_address_needs_no_header() -> None:
    async with relay(ann="key-a") as mill:
        url = await mill.urls.sign("job-1")
        async with request(mill.port, url) as answer:
            assert answer.status == 200
        async with request(mill.port, url[:-1]) as answer:
            assert answer.status == 401
            assert b'"code":"not_authorised"' in await answer.body()


async def test_with_redis_away_nobody_gets_events_of_a_job_whose_owner_is_not_known() -> None:
    async with relay(ann="key-a") as mill:
        mill.hub.away = True
        async with request(mill.port, PATH, headers={"X-API-Key": "key-a"}) as answer:
            assert answer.status == 200
            mill.say([], [token(1)])
            assert await answer.read_events() == []
            assert answer.events.comments == ["keepalive"]


async def test_a_page_of_a_configured_origin_may_read_the_stream() -> None:
    async with relay(Settings(cors_origins=["https://page.example"])) as mill:
        async with request(mill.port, PATH, headers={"Origin": "https://page.example"}) as answer:
            assert answer.headers["access-control-allow-origin"] == "https://page.example"
        async with request(mill.port, PATH, headers={"Origin": "https://evil.example"}) as answer:
            assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("pieces", [1, 10])
async def test_a_head_that_is_too_large_is_refused(pieces: int) -> None:
    async with relay() as mill, raw(mill.port) as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\n")
        value = b"y" * (protocol.HEAD_MAX_BYTES // pieces)
        for n in range(pieces):
            writer.write(b"X-%d: %b\r\n" % (n, value))
        writer.write(b"\r\n")
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert b"application/problem+json" in answer


async def test_a_head_without_an_end_is_refused_once_it_is_too_large() -> None:
    async with relay() as mill, raw(mill.port) as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nX: " + b"y" * (protocol.HEAD_MAX_BYTES + 1))
        assert (await reader.read()).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("first", [b"", b"GET / HTTP/1.1\r\nX: y\r\n", b"GET / HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\n"])
async def test_a_head_that_never_ends_is_given_up(first: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.2)
    async with relay() as mill, raw(mill.port) as (reader, writer):
        writer.write(first)
        async with asyncio.timeout(PATIENCE_S):
            await reader.read()


async def test_an_open_stream_outlives_the_time_for_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.5)
    async with relay() as mill, request(mill.port, PATH) as answer:
        await answer.read_chunk()
        # Past the head's time, because this waits for a later timer of the same loop.
        await asyncio.sleep(0.6)
        mill.say([DONE], None)
        assert len(await answer.read_events()) == 1


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMPTMILL_LISTEN_FD", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PromptmillError, match=f"port {port}") as caught:
            server.listening_socket(Settings(port=port))
    assert caught.value.code == "port_in_use"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "no-such-host.invalid", "192.0.2.1"])
def test_another_address_without_a_key_is_refused(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMPTMILL_LISTEN_FD", raising=False)
    with pytest.raises(ConfigError, match="api_key"):
        server.listening_socket(Settings(host=host, port=0))


def test_another_address_with_a_key_is_listened_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMPTMILL_LISTEN_FD", raising=False)
    with server.listening_socket(Settings(host="0.0.0.0", port=0, api_key="k")) as sock:
        assert sock.getsockname()[0] == "0.0.0.0"


def test_an_inherited_socket_beyond_loopback_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    inherited = socket.create_server(("0.0.0.0", 0))
    monkeypatch.setenv("PROMPTMILL_LISTEN_FD", str(inherited.detach()))
    with pytest.raises(ConfigError, match="api_key"):
        server.listening_socket(Settings())
