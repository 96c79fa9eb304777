"""Connections to Redis: one way to open them, one way to name what is wrong with them."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Final

from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import (
    Sentinel,
    SentinelConnectionPool,
    SentinelManagedConnection,
    SentinelManagedSSLConnection,
)
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    ConnectionError,  # noqa: A004 - redis-py's own name
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,  # noqa: A004 - redis-py's own name
)

from promptmill.addresses import SENTINEL_S, Address, kind_of, read_address, where
from promptmill.errors import ConfigError, StoreUnavailable

__all__ = [
    "check_server",
    "check_single",
    "open_cluster",
    "open_redis",
    "reason",
    "store_errors",
    "transport_closed",
    "where",
]

MIN_VERSION: Final = (7, 0)
CONNECT_TIMEOUT_S: Final = 5.0
COMMAND_TIMEOUT_S: Final = 10.0

_FAILED_SENTINELS: Final = " : <redis."
"""What redis-py puts between "No master found for …" and the clients of the Sentinels that it could not ask."""


def open_redis(url: str, *, max_connections: int = 64, command_timeout_s: float | None = COMMAND_TIMEOUT_S) -> Redis:
    """A client that answers bytes and never retries by itself.

    redis-py would repeat commands up to ten times; our scripts are repeatable, but only their callers know whether
    repeating still makes sense. Nothing is connected yet.

    Raises
    ------
    ConfigError
        The address is malformed.
    """
    given: dict[str, Any] = {
        "protocol": 2,
        "max_connections": max_connections,
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "socket_timeout": command_timeout_s,
        "retry": Retry(NoBackoff(), 0),
        "client_name": "promptmill",
    }
    try:
        if kind_of(url) == "sentinel":
            redis = _behind_sentinel(read_address(url), given)
        else:
            redis = Redis.from_pool(ConnectionPool.from_url(url, **given))  # pyright: ignore[reportUnknownMemberType]
        _check_options(redis)
    except ValueError as err:
        raise ConfigError(f"redis_url: {err}", field="redis_url") from None
    return redis


def _check_options(redis: Any) -> None:
    """Raise ValueError for an option that redis-py does not know, or not without TLS. Nothing is connected.

    It would say so at the first connection, with an error that nobody takes for one of the address.
    """
    try:
        redis.connection_pool.make_connection()
    except TypeError as err:
        name = str(err).rpartition("argument ")[2]
        raise ValueError(f"redis-py knows no option {name} for such a connection (ssl_… belong to rediss://)") from None


def open_cluster(url: str) -> RedisCluster:
    """redis-py's client of a cluster, that answers bytes and never retries by itself. Nothing is connected yet."""
    address = read_address(url)
    one: dict[str, Any] = {**parse_url(address.url_of(*address.nodes[0]))}
    for name in ("host", "port", "db", "connection_class"):
        one.pop(name, None)
    return RedisCluster(
        startup_nodes=[ClusterNode(host, port) for host, port in address.nodes],
        protocol=2,
        ssl=address.tls,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        socket_timeout=COMMAND_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
        **one,
    )


def _behind_sentinel(address: Address, given: dict[str, Any]) -> Redis:
    """Every new connection asks the Sentinels, in turn, where the primary is by now."""
    # One that is silent must leave time for all others and for the primary, else no attempt ever reaches them.
    each_s = min(SENTINEL_S, CONNECT_TIMEOUT_S / (len(address.nodes) + 1))
    of_primary: dict[str, Any] = {**parse_url(address.url_of(*address.nodes[0])), **given}
    for name in ("host", "port", "connection_class"):
        of_primary.pop(name, None)
    of_sentinels = {name: value for name, value in of_primary.items() if name.startswith("ssl_")}
    of_sentinels |= {
        "username": address.sentinel_username,
        "password": address.sentinel_password,
        "ssl": address.tls,
        "socket_connect_timeout": each_s,
        "socket_timeout": each_s,
        "retry": Retry(NoBackoff(), 0),
    }
    of_primary["connection_class"] = SentinelManagedSSLConnection if address.tls else SentinelManagedConnection
    sentinel: Any = Sentinel([*address.nodes], sentinel_kwargs=of_sentinels)
    pool: Any = SentinelConnectionPool(address.service, sentinel, **of_primary)
    return _BehindSentinel.from_pool(pool)


class _BehindSentinel(Redis):
    """redis-py closes the connections to the primary, and leaves those to the Sentinels open."""

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        await super().aclose(close_connection_pool)
        pool: Any = self.connection_pool
        for sentinel in pool.sentinel_manager.sentinels:
            await sentinel.aclose()


def reason(err: BaseException) -> str:
    """What an exception says, or its name where it says nothing, as timeouts do."""
    said, _, failures = str(err).partition(_FAILED_SENTINELS)
    if failures:
        # Behind this redis-py shows each of the clients with all of its options; before 7.4 the password, too.
        return f"{said} (not all Sentinels answer)"
    return said or type(err).__name__


def transport_closed(err: RuntimeError) -> bool:
    """Whether this is how uvloop refuses to write to a connection that broke a moment ago; redis-py passes it on."""
    return "handler is closed" in str(err)


@contextmanager
def store_errors(address: str) -> Generator[None]:
    """Turn what redis-py raises into :class:`StoreUnavailable` with advice; leave everything else alone.

    A cancellation that came meanwhile is raised at the end: redis-py sends through ``asyncio.wait_for``, which on
    Python 3.11 loses one that arrives together with the result, and the task would then never end.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    try:
        yield
    except (RedisError, OSError, asyncio.IncompleteReadError, RuntimeError) as err:
        if isinstance(err, RuntimeError) and not transport_closed(err):
            raise
        if task and task.cancelling() > before:
            raise asyncio.CancelledError from err
        raise _explain(err, address) from err
    if task and task.cancelling() > before:
        raise asyncio.CancelledError


def _explain(err: BaseException, address: str) -> StoreUnavailable:
    if isinstance(err, (AuthenticationError, NoPermissionError)) or "NOAUTH" in str(err) or "WRONGPASS" in str(err):
        return StoreUnavailable(
            f"Redis at {address} refuses the user or password: check redis_url", retryable=False, field="redis_url"
        )
    if isinstance(err, OutOfMemoryError) or str(err).startswith(("OOM", "MISCONF")):
        return StoreUnavailable(f"Redis at {address} takes no writes: {err}")
    if isinstance(err, ReadOnlyError):
        return StoreUnavailable(f"Redis at {address} is a read-only replica")
    if isinstance(err, (ConnectionError, TimeoutError, OSError, asyncio.IncompleteReadError, RuntimeError)):
        return StoreUnavailable(f"Redis at {address} cannot be reached: {reason(err)}")
    return StoreUnavailable(f"Redis at {address} answered: {err}")


async def check_server(redis: Redis, address: str) -> dict[str, Any]:
    """The server's INFO section ``server``.

    Raises
    ------
    StoreUnavailable
        Not reachable, refuses us, or older than Redis 7.0, whose scripts and streams we need.
    """
    with store_errors(address):
        try:
            info: dict[str, Any] = await redis.info("server")  # pyright: ignore[reportUnknownMemberType]
        except ResponseError as err:
            if "unknown command" not in str(err).lower():
                raise
            raise StoreUnavailable(f"{address} is no Redis that we know: {err}", retryable=False) from err
    version = str(info.get("redis_version", "0"))
    if tuple(int(p) for p in version.split(".")[:2] if p.isdigit()) < MIN_VERSION:
        raise StoreUnavailable(
            f"Redis at {address} is version {version}; promptmill needs {'.'.join(map(str, MIN_VERSION))} or newer",
            retryable=False,
            field="redis_url",
        )
    return info


async def check_single(redis: Redis, address: str) -> None:
    """As :func:`check_server`, and raise StoreUnavailable for a node of a cluster, which is asked otherwise."""
    info = await check_server(redis, address)
    # Valkey calls it otherwise.
    if "cluster" in (info.get("redis_mode"), info.get("server_mode")):
        raise StoreUnavailable(
            f"Redis at {address} is a node of a cluster: write redis+cluster:// in the place of redis://",
            retryable=False,
            field="redis_url",
        )
