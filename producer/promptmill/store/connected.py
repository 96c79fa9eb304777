"""A store's connections, and how its scripts are run: on one server or on a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final, Self

from redis.exceptions import NoScriptError, RedisError, ResponseError

from promptmill import keys
from promptmill.addresses import kind_of
from promptmill.errors import StoreUnavailable
from promptmill.store import scripts
from promptmill.store.cluster import Cluster, check_cluster
from promptmill.store.cluster_wire import ClusterWire
from promptmill.store.connection import check_single, open_cluster, open_redis, store_errors, where
from promptmill.store.durable import ClusterDurable, Durable
from promptmill.store.link import Command, Link
from promptmill.store.wire import Wire

_ANSWER_S: Final = 3.0


class Connected:
    """What :class:`promptmill.store.Store` rests on."""

    wire: Wire | ClusterWire
    """The shared connection (on a cluster: one to each primary) of everything that happens per job or per token."""

    def __init__(self, redis: Any, address: str = "redis", cluster: Cluster | None = None) -> None:
        # Any: half of redis-py's signatures are unknown to a strict checker.
        self.redis: Any = redis
        """redis-py's own client, for looking by hand and for tests: the product's commands go over the wire."""
        self.cluster = cluster
        self.address = address
        self.note: Callable[[str, str], None] = lambda _act, _detail: None
        """Told of what was done here: ``submitted`` a priority, ``requeued`` a phase, an end's state its error code."""
        if cluster is None:
            self.wire = Wire(redis)
            self.durable: Durable | ClusterDurable = Durable(redis, address)
        else:
            self.wire = ClusterWire(cluster)
            self.durable = ClusterDurable(cluster)

    @classmethod
    async def connect(cls, url: str, *, max_connections: int = 64) -> Self:
        """A store whose server, or each primary of whose cluster, was reached and is new enough."""
        if kind_of(url) == "cluster":
            cluster = Cluster(url, max_connections=max_connections)
            try:
                await check_cluster(cluster)
            except BaseException:
                await cluster.aclose()
                raise
            return cls(open_cluster(url), cluster.address, cluster)
        redis = open_redis(url, max_connections=max_connections)
        try:
            await check_single(redis, where(url))
        except BaseException:
            await redis.aclose()
            raise
        return cls(redis, where(url))

    async def aclose(self) -> None:
        """Close every connection."""
        await self.durable.aclose()
        await self.wire.aclose()
        await self.redis.aclose()

    async def link(self, on_reply: Callable[[Any], None]) -> Link:
        """A connection of its own for plain SUBSCRIBE; on a cluster to any node, for plain PUBLISH reaches all of them.

        Raises redis-py's errors or an ``OSError``.
        """
        if self.cluster is None:
            return await Link.connect(self.redis, on_reply)
        try:
            return await Link.connect((await self.cluster.any_node()).redis, on_reply)
        except (RedisError, OSError):
            self.cluster.suspect()
            raise

    async def run(self, script: scripts.Script, job_id: str, *args: bytes | str | float) -> Any:
        """One script on one job's keys; loads it where the server forgot it."""
        with store_errors(self.address):
            return await self._run(script, job_id, args)

    async def _run(
        self,
        script: scripts.Script,
        job_id: str,
        args: Sequence[bytes | str | float],
        *,
        before: Sequence[Command] = (),
        serial: int | None = None,
    ) -> Any:
        call = ("EVALSHA", script.sha, 2, keys.record(job_id), keys.log(job_id), *args)
        return (await self.ask_scripted(script, [*before, call], serial=serial, first=len(before)))[-1]

    async def ask_scripted(
        self, script: scripts.Script, commands: Sequence[Command], *, serial: int | None = None, first: int = 0
    ) -> list[Any]:
        """As :meth:`ask`, for commands of which some call ``script`` by its digest.

        Where the server forgot the script, all of them are sent again with its source, so all may be done twice. The
        source travels in the calls themselves: loaded by a command before them, it can be forgotten in between.
        """
        try:
            return await self.ask(commands, serial=serial, first=first)
        except NoScriptError:
            spelled_out: list[Command] = [
                ("EVAL", script.source, *command[2:]) if command[:2] == ("EVALSHA", script.sha) else command
                for command in commands
            ]
            return await self.ask(spelled_out, serial=serial, first=first)

    async def ask(self, commands: Sequence[Command], *, serial: int | None = None, first: int = 0) -> list[Any]:
        """Raw replies of several commands in one write. Raises redis-py's error for the first that was refused.

        The ``first`` so many are done before the others begin. ``serial`` is the connection that they are for: see
        :meth:`promptmill.store.wire.Wire.many_on`.
        """
        if serial is None:
            replies = await self.wire.many(commands, first=first)
        else:
            replies = await self.wire.many_on(serial, commands)
        for reply in replies:
            if isinstance(reply, ResponseError):
                raise reply
        return replies

    async def check_answers(self, *, writes: bool = False) -> None:
        """Raise StoreUnavailable unless the server answers within 3 s and, with ``writes``, takes writes."""
        try:
            async with asyncio.timeout(_ANSWER_S):
                with store_errors(self.address):
                    names = await self._a_key_on_each() if writes else []
                    # Changes nothing, and is refused where a write would be: out of memory, read-only, its disk full.
                    probes: list[Command] = [("ZADD", name, "XX", 0, "") for name in names]
                    await self.ask(probes or [("PING",)])
        except TimeoutError:
            raise StoreUnavailable(f"Redis at {self.address} does not answer") from None

    async def _a_key_on_each(self) -> list[str]:
        if self.cluster is None:
            return [keys.OUTBOX]
        return [self.cluster.a_key_on(node, keys.OUTBOX) for node in await self.cluster.primaries()]

    async def load_scripts(self) -> None:
        """Make every script known to the server, so that pipelines can name them by digest."""
        with store_errors(self.address):
            await self.ask([("SCRIPT", "LOAD", script.source) for script in scripts.ALL])
