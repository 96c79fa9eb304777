"""The relay and the gateway as processes: how they start, how they end, and what they say where they cannot."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from promptmill.client import AsyncProducer
from promptmill.settings import Settings
from promptmill.up.embedded import free_port
from tests.support.processes import PATIENCE_S
from tests.support.store import StoreServer
from tests.support.web import raw, request

SERVERS = ("promptmill_relay", "promptmill_gateway")


class Running:
    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process = process
        self.port = port

    async def end(self) -> int:
        """Its exit code."""
        async with asyncio.timeout(PATIENCE_S):
            return await self.process.wait()


@asynccontextmanager
async def started(module: str, redis_url: str, *arguments: str, **environment: str) -> AsyncGenerator[Running]:
    """The module as a process that listens."""
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        "--port",
        str(port),
        *arguments,
        env={**os.environ, "PROMPTMILL_REDIS_URL": redis_url, **environment},
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(PATIENCE_S):
            line = await process.stderr.readline()
            assert b"listens on" in line, line + await process.stderr.read()
        yield Running(process, port)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def refused(module: str, *arguments: str, cwd: Path, **environment: str) -> tuple[int, str]:
    """The module as a process that cannot start: its exit code and what it said."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        *arguments,
        env={**os.environ, **environment},
        cwd=cwd,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(PATIENCE_S):
        _, said = await process.communicate()
    assert process.returncode is not None
    return process.returncode, said.decode()


async def a_job(redis_url: str) -> str:
    async with AsyncProducer(Settings(redis_url=redis_url)) as producer:
        return (await producer.submit("hello", model="echo")).id


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("module", SERVERS)
async def test_the_first_signal_ends_streams_cleanly_and_the_process_with_0(
    module: str, number: signal.Signals, redis_url: str
) -> None:
    job_id = await a_job(redis_url)
    async with started(module, redis_url) as running, request(running.port, f"/v1/jobs/{job_id}/stream") as stream:
        await stream.read_events(1)
        running.process.send_signal(number)
        assert await stream.read_events() == []
        assert stream.ended
        assert await running.end() == 0


async def test_the_second_signal_ends_the_process_at_once(redis_url: str) -> None:
    async with started("promptmill_gateway", redis_url) as running, raw(running.port) as (_, writer):
        # A request whose body never comes holds the first signal's grace.
        writer.write(b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
        async with request(running.port, "/healthz") as answer:
            assert answer.status == 200
        running.process.send_signal(signal.SIGTERM)
        stderr = running.process.stderr
        assert stderr is not None
        async with asyncio.timeout(PATIENCE_S):
            while b"stopping" not in await stderr.readline():
                continue
        running.process.send_signal(signal.SIGTERM)
        assert await running.end() == 128 + signal.SIGTERM


async def test_a_request_that_is_being_sent_does_not_hold_the_end_for_ever(redis_url: str) -> None:
    async with started("promptmill_gateway", redis_url) as running, raw(running.port) as (_, writer):
        writer.write(b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
        async with request(running.port, "/healthz") as answer:
            assert answer.status == 200
        running.process.send_signal(signal.SIGTERM)
        assert await running.end() == 0


@pytest.mark.parametrize("module", SERVERS)
async def test_a_socket_that_was_handed_on_is_served(module: str, redis_url: str) -> None:
    job_id = await a_job(redis_url)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            env={**os.environ, "PROMPTMILL_REDIS_URL": redis_url, "PROMPTMILL_LISTEN_FD": str(listener.fileno())},
            pass_fds=[listener.fileno()],
        )
        try:
            # No waiting for a start: what comes early waits in the socket.
            async with request(port, f"/v1/jobs/{job_id}/stream") as stream:
                assert len(await stream.read_events(1)) == 1
        finally:
            process.terminate()
            assert await process.wait() == 0


@pytest.mark.parametrize("module", SERVERS)
async def test_what_hinders_the_start_is_said_in_one_line(module: str, redis_url: str, tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text("prot = 3\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, url, code, said in (
            (["--port", port], redis_url, 6, f"port {port}"),
            (["--host", "0.0.0.0", "--port", "0"], redis_url, 6, "api_key"),
            (["--port", "0"], "redis://127.0.0.1:1/0", 5, "cannot be reached"),
            (["--config", "broken.toml"], redis_url, 6, "prot: no such setting"),
            (["--config", "none.toml"], redis_url, 6, "no such file"),
        ):
            found, line = await refused(module, *arguments, cwd=tmp_path, PROMPTMILL_REDIS_URL=url)
            assert (found, line.count("\n")) == (code, 1), line
            assert said in line


async def test_a_stream_goes_on_where_it_was_after_redis_came_back(tmp_path: Path) -> None:
    store = StoreServer(tmp_path)
    store.start()
    try:
        job_id = await a_job(store.url)
        async with started("promptmill_gateway", store.url, PROMPTMILL_KEEPALIVE_S="0.2") as running:
            path = f"/v1/jobs/{job_id}/stream"
            async with request(running.port, path) as stream:
                await stream.read_events(1)
                store.kill()
                # Alive all the same, and a reader that comes now is told to wait, not to go.
                async with request(running.port, path) as late, request(running.port, "/readyz") as ready:
                    assert (late.status, ready.status) == (200, 503)
                    assert await late.read_chunk() == b"retry: 1000\n\n"
                    assert await late.read_chunk() == b": keepalive\n\n"
                    store.start()
                    async with AsyncProducer(Settings(redis_url=store.url)) as producer:
                        await producer.cancel(job_id, reason="seen")
                    assert [message.type for message in await stream.read_events()] == ["cancelled"]
                    assert [message.type for message in await late.read_events()] == ["progress", "cancelled"]
    finally:
        store.kill()
