"""A connection that broke a moment ago, as uvloop tells of it: the store is away, and nothing else is wrong."""

from __future__ import annotations

import asyncio

import pytest
import uvloop

from promptmill.errors import StoreUnavailable
from promptmill.store.connection import store_errors, transport_closed

CLOSED = "unable to perform operation on <TCPTransport closed=True reading=False 0x1>; the handler is closed"


def test_what_uvloop_raises_is_known() -> None:
    """redis-py writes with ``writelines``, and passes on what uvloop raises where the connection has just gone."""

    async def write_to_what_was_aborted() -> RuntimeError | None:
        server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
        try:
            _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.transport.abort()
            await asyncio.sleep(0.01)
            try:
                writer.writelines([b"PING\r\n"])
            except RuntimeError as err:
                return err
        finally:
            server.close()
        return None

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        error = runner.run(write_to_what_was_aborted())
    assert error is not None
    assert transport_closed(error), error


async def test_the_store_is_away() -> None:
    with pytest.raises(StoreUnavailable, match="cannot be reached"), store_errors("there:6379"):
        raise RuntimeError(CLOSED)


async def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="another"), store_errors("there:6379"):
        raise RuntimeError("another")
