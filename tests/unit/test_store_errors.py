"""What goes wrong in a store call, and on the way to it, is told as it is; and a cancellation is never lost."""

from __future__ import annotations

import asyncio

import pytest
from kombu.exceptions import OperationalError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.sentinel import MasterNotFoundError

from promptmill.errors import ConfigError, StoreUnavailable
from promptmill.store import Store
from promptmill.store.connection import check_server, reason, store_errors


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


class OldServer:
    """A server that says which version it is."""

    def __init__(self, version: str) -> None:
        self.version = version

    async def info(self, section: str) -> dict[str, str]:
        assert section == "server"
        return {"redis_version": self.version}


@pytest.mark.parametrize("version", ["6.2.14", "5.0", "2.8.24"])
async def test_a_server_that_is_too_old_is_refused_with_what_is_needed(version: str) -> None:
    with pytest.raises(StoreUnavailable) as caught:
        await check_server(OldServer(version), "somewhere:6379")  # type: ignore[arg-type]
    assert version in caught.value.message
    assert "7.0" in caught.value.message
    assert not caught.value.retryable


@pytest.mark.parametrize("version", ["7.0.0", "7.2.4", "8.0", "10.1.2"])
async def test_a_server_that_is_new_enough_passes(version: str) -> None:
    assert (await check_server(OldServer(version), "somewhere:6379"))["redis_version"] == version  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "url",
    [
        "redis://:s3cret@h/0?tineout=1",
        "unix:///s?tineout=1",
        "redis+cluster://:s3cret@h?tineout=1",
        "redis+sentinel://:s3cret@h/m?tineout=1",
    ],
)
async def test_an_option_that_nobody_knows_is_named(url: str) -> None:
    with pytest.raises(ConfigError, match="knows no option 'tineout'") as caught:
        await Store.connect(url)
    assert caught.value.field == "redis_url"
    assert "s3cret" not in str(caught.value)


def test_of_a_failed_search_for_the_primary_only_the_outcome_is_told() -> None:
    shown = "<redis.client.Redis(<redis.connection.ConnectionPool(<redis.connection.Connection(password=s3cret)>)>)>"
    found = f"No master found for 'm' : {shown} - ConnectionError()"
    # kombu makes an error of its own of it.
    for err in (MasterNotFoundError(found), OperationalError(found)):
        assert reason(err) == "No master found for 'm' (not all Sentinels answer)"
    assert reason(MasterNotFoundError("No master found for 'm'")) == "No master found for 'm'"
    assert reason(TimeoutError()) == "TimeoutError"
