"""Is the store there, is it new enough, and does it keep what it was given? And the broker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Final
from urllib.parse import urlsplit

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from promptmill.addresses import kind_of, kombu_tls, where
from promptmill.client import AsyncProducer
from promptmill.doctor.report import Check
from promptmill.errors import PromptmillError
from promptmill.queues import queues_of
from promptmill.settings import Settings
from promptmill.store.cluster import Cluster, check_cluster
from promptmill.store.connection import check_server, check_single, open_redis, reason, store_errors

_BROKER_S: Final = 5


async def check_store(settings: Settings) -> list[Check]:
    """Reachable, version, append-only file, eviction policy, and whether a worker can claim."""
    try:
        async with _servers(settings.store_url) as servers:
            looked = [await _look_at(address, redis) for address, redis in servers.items()]
    except PromptmillError as err:
        if settings.redis_url is None:
            return [Check("reachable", "redis", "off", err.message, "start `promptmill up`, or set redis_url")]
        return [Check("reachable", "redis", "fail", err.message, "see that it runs and that redis_url is right")]
    names = ", ".join(dict.fromkeys(one.program for one in looked))
    address = where(settings.store_url)
    if kind_of(settings.store_url) == "cluster":
        address = f"{', '.join(one.address for one in looked)}: a cluster of {len(looked)} nodes"
    return [
        Check("reachable", "redis", "ok", f"{names} at {address}"),
        _worst({one.address: one.persistence for one in looked}),
        _worst({one.address: one.eviction for one in looked}),
        *await _workers(settings),
    ]


@dataclass(frozen=True, slots=True)
class _Server:
    address: str
    program: str
    persistence: Check
    eviction: Check


@asynccontextmanager
async def _servers(url: str) -> AsyncGenerator[dict[str, Redis]]:
    """The server, or the primaries of the cluster, by address."""
    if kind_of(url) == "cluster":
        cluster = Cluster(url, max_connections=1)
        try:
            await check_cluster(cluster)
            yield {name: node.redis for name, node in cluster.nodes.items()}
        finally:
            await cluster.aclose()
        return
    redis = open_redis(url, max_connections=1)
    try:
        await check_single(redis, where(url))
        yield {where(url): redis}
    finally:
        await redis.aclose()


async def _look_at(address: str, redis: Redis) -> _Server:
    server = await check_server(redis, address)
    with store_errors(address):
        memory: dict[str, Any] = await redis.info("memory")  # pyright: ignore[reportUnknownMemberType]
        kept: dict[str, Any] = await redis.info("persistence")  # pyright: ignore[reportUnknownMemberType]
        policy = await _appendfsync(redis)
    name = "Valkey" if server.get("server_name") == "valkey" else "Redis"
    version = server.get("valkey_version") or server.get("redis_version")
    return _Server(address, f"{name} {version}", _persistence(kept, policy), _eviction(memory))


def _worst(checks: dict[str, Check]) -> Check:
    """One finding for all servers: the worst, with the addresses of those that it holds for where others are better."""
    ranks = ("ok", "off", "fail")
    worst = max(checks.values(), key=lambda check: ranks.index(check.status))
    if all(check.status == worst.status for check in checks.values()):
        return worst
    places = ", ".join(address for address, check in checks.items() if check.status == worst.status)
    return replace(worst, found=f"{places}: {worst.found}")


async def _appendfsync(redis: Any) -> str | None:
    """When the server syncs its file; None where it does not tell, as hosted ones do not."""
    try:
        found: dict[str, str] = await redis.config_get("appendfsync")
    except ResponseError:
        return None
    return found.get("appendfsync")


def _persistence(kept: dict[str, Any], policy: str | None) -> Check:
    if kept.get("aof_last_write_status", "ok") != "ok":
        return Check("reachable", "redis appendonly", "fail", "cannot write its file", "make room on its disk")
    if kept.get("aof_enabled"):
        synced = f", appendfsync {policy}" if policy else ""
        return Check("reachable", "redis appendonly", "ok", f"on{synced}: jobs survive its restart")
    return Check(
        "reachable", "redis appendonly", "off", "off: a restart of Redis loses jobs", "set appendonly yes there"
    )


def _eviction(memory: dict[str, Any]) -> Check:
    policy = str(memory.get("maxmemory_policy", "unknown"))
    limit = int(memory.get("maxmemory", 0))
    if policy == "noeviction" or not limit:
        return Check("reachable", "redis maxmemory-policy", "ok", policy if limit else f"{policy}, no limit set")
    return Check(
        "reachable",
        "redis maxmemory-policy",
        "fail",
        f"{policy}: Redis may throw jobs away",
        "set maxmemory-policy noeviction there",
    )


async def _workers(settings: Settings) -> list[Check]:
    try:
        async with AsyncProducer(settings) as producer:
            ready = await producer.ready()
    except PromptmillError as err:
        return [Check("reachable", "workers", "fail", err.message)]
    if not ready.ok:
        return [Check("reachable", "workers", "off", ready.reason, "start `promptmill up` or `promptmill worker`")]
    checks: list[Check] = []
    for family in settings.served_families:
        count = ready.families.get(family, 0)
        title = f"workers {family}"
        if count:
            levels = ready.levels.get(family)
            held = f", programs kept together by {' and '.join(levels)}" if levels else ""
            checks.append(Check("reachable", title, "ok", f"{count} can claim jobs{held}"))
        else:
            advice = f"start `promptmill up` or `promptmill worker --family {family}`"
            checks.append(Check("reachable", title, "fail", "none: jobs of its models wait", advice))
    checks += [
        Check("reachable", f"login of {name}", "fail", "expired: a worker does not ask it", "log in again there")
        for name in ready.paused
    ]
    return checks


async def check_broker(settings: Settings) -> list[Check]:
    """Celery's broker, where it is another than the store."""
    if settings.broker_url is None or settings.broker_url == settings.store_url:
        return []
    parts = urlsplit(settings.broker_url)
    if kind_of(settings.broker_url) == "sentinel":
        address = where(settings.broker_url)
    else:
        address = f"{parts.scheme}://{parts.hostname or ''}:{parts.port or ''}".rstrip(":")
    try:
        return [await asyncio.to_thread(_look_at_broker, settings.broker_url, address, settings.served_families)]
    except Exception as err:  # noqa: BLE001 - each of kombu's transports raises errors of its own; all become a finding
        found = f"{address}: {reason(err)}"
        return [Check("reachable", "broker", "fail", found, "see that it runs and that broker_url is right")]


def _look_at_broker(url: str, address: str, families: list[str]) -> Check:
    # A tenth of a second that only this check needs.
    from amqp.exceptions import NotFound, PreconditionFailed  # noqa: PLC0415
    from kombu.connection import Connection  # noqa: PLC0415

    from promptmill.enqueue import broker_address, broker_queue, foreign_queue, is_amqp  # noqa: PLC0415

    connection: Any
    address_of, options = broker_address(url)
    tls: Any = kombu_tls(url) or False
    with Connection(address_of, connect_timeout=_BROKER_S, transport_options=options, ssl=tls) as connection:
        connection.ensure_connection(max_retries=1, timeout=_BROKER_S)
        if not is_amqp(url):
            return Check("reachable", "broker", "ok", address)
        connection.connection.sock.settimeout(_BROKER_S)
        for name in (queue for family in families for queue in queues_of(family)):
            try:
                connection.channel().queue_declare(name, passive=True)
                # Only what is there already: a look must not make queues.
                broker_queue(name, url)(connection.channel()).queue_declare()
            except NotFound:
                continue
            except PreconditionFailed as err:
                found, advice = foreign_queue(err) or (str(err), "see the broker's log")
                return Check("reachable", "broker", "fail", f"{address}: {found}", advice)
        server: dict[str, Any] = connection.connection.server_properties
        return Check("reachable", "broker", "ok", f"{server.get('product')} {server.get('version')} at {address}")
