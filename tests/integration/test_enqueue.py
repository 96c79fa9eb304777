"""Messages and the broker: away, silent, back again."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import struct
import threading
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import redis

from promptmill import enqueue
from promptmill.enqueue import Enqueuer
from promptmill.keys import new_job_id
from promptmill.queues import API_FAMILY, queues_of
from tests.support.processes import PATIENCE_S, wait_until
from tests.support.store import StoreServer, running_store

QUEUE = queues_of(API_FAMILY)[0]
SCHEMES = ("redis", "amqp")


@asynccontextmanager
async def enqueuer(url: str) -> AsyncGenerator[Enqueuer]:
    made = Enqueuer(url)
    try:
        yield made
    finally:
        await made.aclose()


async def send_several(sender: Enqueuer) -> list[int]:
    """What eight senders at once are answered; they must all be answered soon."""
    async with asyncio.timeout(PATIENCE_S):
        return await asyncio.gather(*(sender.send([(new_job_id(), QUEUE)]) for _ in range(8)))


async def wait_sent(sender: Enqueuer) -> None:
    """Until the broker takes messages."""

    async def sent() -> bool:
        return await sender.send([(new_job_id(), QUEUE)]) == 1

    await wait_until(sent, "a message is sent")


def waiting(server: StoreServer) -> int:
    with redis.Redis(port=server.port) as client:
        return client.llen(QUEUE)  # pyright: ignore[reportReturnType]


@pytest.fixture
def broker(tmp_path: Path) -> Generator[StoreServer]:
    """A broker that the test may stop."""
    with running_store(tmp_path) as server:
        yield server


@pytest.fixture
def silent_port() -> Generator[int]:
    """A port that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def closed_port() -> Generator[int]:
    """A port that refuses: bound, so that no one else gets it, and not listening."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@contextmanager
def half_an_amqp_broker() -> Generator[tuple[int, threading.Event]]:
    """Opens a connection as AMQP 0-9-1 has it (start, tune, open-ok), then never says a word.

    Its port, and what is set once a client asked for a channel.
    """

    def method(kind: int, arguments: bytes) -> bytes:
        payload = struct.pack(">HH", 10, kind) + arguments
        return struct.pack(">BHI", 1, 0, len(payload)) + payload + b"\xce"

    def longstr(text: bytes) -> bytes:
        return struct.pack(">I", len(text)) + text

    handshake = method(10, b"\0\x09" + longstr(b"") + longstr(b"PLAIN") + longstr(b"en_US"))
    handshake += method(30, struct.pack(">HIH", 10, 131072, 0)) + method(41, b"\0")
    opened: list[socket.socket] = []
    asked = threading.Event()

    def serve() -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            opened.append(client)
            said = client.recv(8)  # the protocol's header: a server speaks second
            client.sendall(handshake)
            while b"\x00\x14\x00\x0a" not in said and (more := client.recv(4096)):  # channel.open
                said += more
            asked.set()

    with socket.create_server(("127.0.0.1", 0)) as server:
        serving = threading.Thread(target=serve)
        serving.start()
        try:
            yield server.getsockname()[1], asked
        finally:
            server.shutdown(socket.SHUT_RDWR)
            serving.join()
            for client in opened:
                client.close()


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_a_broker_that_refuses_costs_senders_little(
    scheme: str, closed_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with enqueuer(f"{scheme}://127.0.0.1:{closed_port}//") as sender:
        assert await send_several(sender) == [0] * 8
        async with asyncio.timeout(PATIENCE_S):
            assert await sender.depth(QUEUE) is None
    assert caplog.text.count("broker unavailable") == 1


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_a_broker_that_never_answers_holds_no_one_for_long(
    scheme: str, silent_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with enqueuer(f"{scheme}://127.0.0.1:{silent_port}//") as sender:
        assert await send_several(sender) == [0] * 8
        async with asyncio.timeout(PATIENCE_S):
            assert await sender.depth(QUEUE) is None
    assert caplog.text.count("broker unavailable") == 1


async def test_an_amqp_broker_that_falls_silent_once_connected_holds_no_one_for_long() -> None:
    with half_an_amqp_broker() as (port, asked):
        async with enqueuer(f"amqp://127.0.0.1:{port}//") as sender:
            assert await send_several(sender) == [0] * 8
            assert asked.is_set()
            async with asyncio.timeout(PATIENCE_S):
                assert await sender.depth(QUEUE) is None


async def test_while_one_send_tries_again_the_others_go_on(silent_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enqueue, "SKIP_S", 0.0)
    async with enqueuer(f"redis://127.0.0.1:{silent_port}/0") as sender:
        assert await sender.send([(new_job_id(), QUEUE)]) == 0
        trying = asyncio.create_task(sender.send([(new_job_id(), QUEUE)]))
        await asyncio.sleep(0)
        assert await sender.send([(new_job_id(), QUEUE)]) == 0
        assert not trying.done()
        assert await trying == 0


async def test_messages_go_again_once_the_broker_was_away_and_is_back(
    broker: StoreServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with enqueuer(broker.url) as sender:
        assert await send_several(sender) == [1] * 8
        assert await sender.depth(QUEUE) == 8
        broker.kill()
        assert await send_several(sender) == [0] * 8
        broker.start()
        await wait_sent(sender)
        assert await send_several(sender) == [1] * 8
    assert caplog.text.count("broker unavailable") == 1
    assert caplog.text.count("the broker answers again") == 1


async def test_messages_go_again_once_the_broker_hung_and_goes_on(broker: StoreServer) -> None:
    assert broker.process
    async with enqueuer(broker.url) as sender:
        assert await send_several(sender) == [1] * 8
        os.kill(broker.process.pid, signal.SIGSTOP)
        try:
            assert await send_several(sender) == [0] * 8
            async with asyncio.timeout(PATIENCE_S):
                assert await sender.depth(QUEUE) is None
        finally:
            os.kill(broker.process.pid, signal.SIGCONT)
        await wait_sent(sender)
        before = waiting(broker)
        assert await send_several(sender) == [1] * 8
        assert await sender.depth(QUEUE) == waiting(broker) == before + 8


async def test_a_restart_while_no_one_sends_loses_no_message(broker: StoreServer) -> None:
    async with enqueuer(broker.url) as sender:
        assert await send_several(sender) == [1] * 8
        broker.kill()
        broker.start()
        assert await send_several(sender) == [1] * 8
        assert waiting(broker) == 16


async def test_a_queue_that_no_one_declared_is_empty(broker: StoreServer) -> None:
    async with enqueuer(broker.url) as sender:
        assert await sender.depth("promptmill.no-such-queue") == 0
