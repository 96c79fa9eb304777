"""The chaos suite's network: what passes, and what each way to fail does to who talks through it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest
from ops.chaos.plan import CUTS
from ops.chaos.proxy import Proxy

from tests.support.processes import wait_until

WAIT_S = 30.0


@asynccontextmanager
async def echoing() -> AsyncGenerator[tuple[Proxy, list[bytes]]]:
    """A proxy before a server that answers with what it got; and what the server got."""
    got: list[bytes] = []

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1000):
                got.append(data)
                writer.write(data)
        except ConnectionError:
            return
        finally:
            writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    proxy = Proxy("a way", "127.0.0.1", server.sockets[0].getsockname()[1], random.Random(1))
    await proxy.start()
    try:
        yield proxy, got
    finally:
        await proxy.aclose()
        server.close()


@asynccontextmanager
async def client(proxy: Proxy) -> AsyncGenerator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def said_back(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes = b"hello") -> bytes:
    writer.write(data)
    async with asyncio.timeout(WAIT_S):
        return await reader.readexactly(len(data))


@asynccontextmanager
async def failing(proxy: Proxy, how: str) -> AsyncGenerator[None]:
    """The proxy fails as long as the block lasts: a time would be over too soon on a machine that pauses."""
    over = asyncio.Event()
    proxy.lasting = lambda _: over.wait()
    task = asyncio.create_task(proxy.disturb(how, WAIT_S))
    try:
        await wait_until(lambda: proxy.state == how, f"it begins: {how}")
        yield
    finally:
        over.set()
        await task


async def closed(reader: asyncio.StreamReader) -> bytes:
    """What comes until the connection ends, well or not."""
    got = b""
    async with asyncio.timeout(WAIT_S):
        try:
            while data := await reader.read(1000):
                got += data
        except ConnectionError:
            return got
    return got


async def test_everything_passes_both_ways() -> None:
    async with echoing() as (proxy, got), client(proxy) as (reader, writer):
        assert await said_back(reader, writer, b"x" * 100_000) == b"x" * 100_000
        assert b"".join(got) == b"x" * 100_000
        assert proxy.connections == 1


async def test_a_side_that_closes_closes_the_other() -> None:
    async with echoing() as (proxy, _):
        async with client(proxy) as (reader, writer):
            await said_back(reader, writer)
        await wait_until(lambda: proxy.connections == 0, "the connection is gone")


async def test_a_cut_ends_every_connection_and_the_next_one_works() -> None:
    async with echoing() as (proxy, _), client(proxy) as one, client(proxy) as two:
        await said_back(*one)
        await said_back(*two)
        assert await proxy.disturb("cut", 0) == 2
        assert [await closed(one[0]), await closed(two[0])] == [b"", b""]
        async with client(proxy) as (reader, writer):
            assert await said_back(reader, writer) == b"hello"


async def test_what_is_torn_arrives_in_part() -> None:
    async with echoing() as (proxy, got), client(proxy) as (reader, writer):
        await said_back(reader, writer)
        async with failing(proxy, "torn"):
            writer.write(b"y" * 1000)
            assert len(await closed(reader)) < 1000
        assert len(b"".join(got)) < 1005


async def test_the_mute_hear_and_do_not_answer() -> None:
    async with echoing() as (proxy, got), client(proxy) as (reader, writer):
        await said_back(reader, writer)
        async with failing(proxy, "mute"):
            writer.write(b"again")
            await wait_until(lambda: got == [b"hello", b"again"], "it is heard")
            ending = asyncio.create_task(closed(reader))
            await asyncio.wait([ending], timeout=0.1)
            assert not ending.done()
        assert await ending == b""


async def test_what_stalls_arrives_later_and_whole() -> None:
    async with echoing() as (proxy, got), client(proxy) as (reader, writer):
        await said_back(reader, writer)
        async with failing(proxy, "stall"):
            saying = asyncio.create_task(said_back(reader, writer, b"again"))
            await asyncio.wait([saying], timeout=0.1)
            assert got == [b"hello"]
            assert not saying.done()
        assert await saying == b"again"


async def test_what_is_slow_arrives() -> None:
    async with echoing() as (proxy, _), client(proxy) as (reader, writer):
        task = asyncio.create_task(proxy.disturb("slow", 0.2))
        await asyncio.sleep(0)
        assert await said_back(reader, writer) == b"hello"
        await task


async def test_who_is_refused_cannot_talk_until_it_is_over() -> None:
    async with echoing() as (proxy, got), client(proxy) as before:
        await said_back(*before)
        async with failing(proxy, "refuse"):
            assert await closed(before[0]) == b""
            async with client(proxy) as (reader, _):
                assert await closed(reader) == b""
        async with client(proxy) as (reader, writer):
            assert await said_back(reader, writer, b"after") == b"after"
        assert got == [b"hello", b"after"]


@pytest.mark.parametrize("how", CUTS)
async def test_every_way_to_fail_is_over_when_it_says_so(how: str) -> None:
    async with echoing() as (proxy, _):
        assert await proxy.disturb(how, 0.01) == 0
        async with client(proxy) as (reader, writer):
            assert await said_back(reader, writer) == b"hello"
