"""A cancellation is never lost on the way through a store call."""

from __future__ import annotations

import asyncio

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from promptmill.errors import StoreUnavailable
from promptmill.store.connection import store_errors


async def swallowing(fails: bool) -> None:
    with store_errors("here"):
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            # What asyncio.wait_for of Python 3.11 does when the result arrives together with the cancellation.
            if fails:
                raise RedisConnectionError("gone") from None


@pytest.mark.parametrize("fails", [False, True])
async def test_a_cancellation_that_the_client_swallowed_is_raised(fails: bool) -> None:
    task = asyncio.create_task(swallowing(fails))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_clean_up_in_a_cancelled_task_may_use_the_store() -> None:
    async def cleans_up() -> str:
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            with store_errors("here"):
                await asyncio.sleep(0)
            with pytest.raises(StoreUnavailable), store_errors("here"):
                raise RedisConnectionError("gone") from None
            return "clean"
        return "never"

    task = asyncio.create_task(cleans_up())
    await asyncio.sleep(0)
    task.cancel()
    assert await task == "clean"
