"""A Redis Cluster: who owns which slot, and one wire to each primary.

A node that has a slot no longer answers MOVED with the owner's address, and the command was not executed: it is
repeated there. While a slot moves, single keys of it are at the new owner already (ASK), or keys of one script are at
both (TRYAGAIN). A primary that dies and a slot that nobody serves are as a lost connection is on a single server.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine
from typing import Any, Final

from redis.asyncio import Redis
from redis.crc import key_slot
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

from promptmill.addresses import Address, read_address, where
from promptmill.errors import ConfigError, StoreUnavailable
from promptmill.store.connection import check_server, open_redis, reason, store_errors, transport_closed
from promptmill.store.slots import SLOTS
from promptmill.store.wire import Wire, shared

logger = logging.getLogger(__name__)

_REFRESH_EVERY_S: Final = 0.2
"""No more often than this: after a failure everybody wants to know at once."""
_ASK_S: Final = 3.0
_WANTED_S: Final = 60.0


class Node:
    """One primary."""

    def __init__(self, name: str, redis: Redis) -> None:
        self.name = name
        self.redis = redis
        self.wire = Wire(redis)
        self.wanted_until = float("-inf")
        """Kept so long although it has no slot: the first one may be on its way to it."""

    async def aclose(self) -> None:
        """Close its connections; calls that wait fail."""
        await self.wire.aclose()
        await self.redis.aclose()


class Cluster:
    """The slot map. Use from one event loop.

    ``changed`` are called, from the event loop, whenever a slot got another owner.
    """

    def __init__(self, url: str, *, max_connections: int = 64) -> None:
        try:
            self._address: Address = read_address(url)
        except ValueError as err:
            raise ConfigError(f"redis_url: {err}", field="redis_url") from None
        self.address = where(url)
        self.nodes: dict[str, Node] = {}
        self.version = 0
        """Rises with each change of the map; 0 before the first."""
        self.changed: list[Callable[[], None]] = []
        self._owners: list[Node | None] = [None] * SLOTS
        self._max_connections = max_connections
        self._refreshing: asyncio.Task[None] | None = None
        self._refreshed_at = float("-inf")
        self._background: set[asyncio.Task[None]] = set()
        self._closed = False

    # -- asking the map -----------------------------------------------------------------------------------------

    def owner(self, slot: int) -> Node | None:
        """Who has a slot, as far as is known."""
        return self._owners[slot]

    async def node_of(self, slot: int) -> Node:
        """Who has a slot. Raises redis-py's ``ConnectionError`` where nobody does."""
        if not self.version:
            await self.refresh()
        node = self._owners[slot]
        if node is None:
            self.suspect()
            raise RedisConnectionError(f"no node of the cluster serves slot {slot}")
        return node

    async def any_node(self) -> Node:
        """A primary, for what is told all over the cluster."""
        if not self.version:
            await self.refresh()
        if not self.nodes:
            raise RedisConnectionError("no node of the cluster serves anything")
        return random.choice([*self.nodes.values()])  # noqa: S311 - spreads subscribers, no secret

    async def primaries(self) -> list[Node]:
        """All primaries. Raises redis-py's ``ConnectionError`` where nobody can be asked, or a slot has no owner."""
        if not self.version:
            await self.refresh()
        if None in self._owners:
            self.suspect()
            raise RedisConnectionError(f"{self._owners.count(None)} of {SLOTS} slots of the cluster are not served")
        return [*dict.fromkeys(node for node in self._owners if node is not None)]

    def a_key_on(self, node: Node, prefix: str) -> str:
        """A name of a key that a node has by now: ``prefix``, a colon and a number."""
        for n in range(SLOTS * 8):
            if self._owners[key_slot((name := f"{prefix}:{n}").encode())] is node:
                return name
        raise RedisConnectionError(f"{node.name} has no slot of the cluster any more")

    # -- learning the map ---------------------------------------------------------------------------------------

    def suspect(self) -> None:
        """Something failed, or looks wrong: ask for the map soon."""
        if not self._closed and self._refreshing is None:
            self._run(self._refresh_soon())

    async def _refresh_soon(self) -> None:
        try:
            await self.refresh()
        except (RedisError, OSError, StoreUnavailable) as err:
            logger.debug("the cluster's map is not known: %s", reason(err))

    async def refresh(self) -> None:
        """Ask for the map; all who want it at the same moment share one question.

        Raises redis-py's ``ConnectionError`` where no node answers, StoreUnavailable where it is no cluster.
        """
        if self._refreshing is None:
            self._refreshing = asyncio.create_task(self._refresh(), name="cluster map")
            self._refreshing.add_done_callback(self._refreshed)
        await shared(self._refreshing)

    def _refreshed(self, task: asyncio.Task[None]) -> None:
        self._refreshing = None
        if not task.cancelled():
            task.exception()  # told to whoever waits; nobody may be left

    async def _refresh(self) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self._refreshed_at + _REFRESH_EVERY_S - loop.time())
        self._refreshed_at = loop.time()
        known = [*self.nodes.values()]
        # Whoever is connected first: a node that died must not be waited for, and one that starts may know old things.
        random.shuffle(known)
        known.sort(key=lambda node: not node.wire.serial)
        errors: list[str] = []
        for node in known:
            try:
                async with asyncio.timeout(_ASK_S):
                    self._take(await node.wire.call("CLUSTER", "SLOTS"), node.name.rpartition(":")[0])
            except (RedisError, OSError) as err:
                errors.append(f"{node.name}: {reason(err)}")
                continue
            return
        for host, port in self._address.nodes:
            if await self._ask_seed(host, port, errors):
                return
        raise RedisConnectionError("; ".join(errors) or "no node of the cluster is known")

    async def _ask_seed(self, host: str, port: int, errors: list[str]) -> bool:
        redis = self._open(host, port)
        wire = Wire(redis)
        try:
            async with asyncio.timeout(_ASK_S):
                rows = await wire.call("CLUSTER", "SLOTS")
        except ResponseError as err:
            if "cluster support disabled" in str(err):
                raise StoreUnavailable(
                    f"Redis at {host}:{port} is no cluster: write redis:// in the place of redis+cluster://",
                    retryable=False,
                    field="redis_url",
                ) from err
            raise
        except (RedisError, OSError) as err:
            errors.append(f"{host}:{port}: {reason(err)}")
            return False
        finally:
            await wire.aclose()
            await redis.aclose()
        self._take(rows, host)
        return bool(self.nodes)

    def moved(self, told: Any) -> None:
        """A node's MOVED says who has a slot: take its word for that one, and ask for the rest."""
        # Who is told to name no addresses names none here either.
        node: Node | None = self._node(told.host, told.port) if told.host else self._owners[int(told.slot_id)]
        if self._owners[told.slot_id] is not node:
            self._owners[told.slot_id] = node
            self._changed()
        self.suspect()

    def _take(self, rows: list[Any], asked: str) -> None:
        owners: list[Node | None] = [None] * SLOTS
        for first, last, primary, *_ in rows:
            # A node that does not know its own address says nothing there: it is the one that was asked.
            node = self._node((primary[0] or b"").decode() or asked, int(primary[1]))
            owners[first : last + 1] = [node] * (last - first + 1)
        if owners != self._owners:
            self._owners = owners
            self._changed()
        used = {node.name for node in owners if node is not None}
        now = asyncio.get_running_loop().time()
        for node in [node for node in self.nodes.values() if node.name not in used and node.wanted_until < now]:
            del self.nodes[node.name]
            self._run(node.aclose())

    def _changed(self) -> None:
        self.version += 1
        for told in self.changed:
            told()

    def _node(self, host: str, port: int) -> Node:
        name = f"{host}:{port}"
        node = self.nodes.get(name)
        if node is None:
            node = self.nodes[name] = Node(name, self._open(host, port))
        return node

    def target(self, told: Any) -> Node | None:
        """Where a slot is on its way to, by a node's ASK."""
        if not told.host:
            return None
        node = self._node(told.host, told.port)
        node.wanted_until = asyncio.get_running_loop().time() + _WANTED_S
        return node

    def _open(self, host: str, port: int) -> Redis:
        return open_redis(self._address.url_of(host, port), max_connections=self._max_connections)

    # -- the end ------------------------------------------------------------------------------------------------

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._ran)

    def _ran(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            if isinstance(error, RuntimeError) and not transport_closed(error):
                raise error
            logger.debug("a connection was not closed: %s", reason(error))

    async def aclose(self) -> None:
        """Close every connection. Safe to repeat."""
        self._closed = True
        if self._refreshing is not None:
            self._refreshing.cancel()
        for task in [*self._background]:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        for node in [*self.nodes.values()]:
            await node.aclose()


async def check_cluster(cluster: Cluster) -> dict[str, dict[str, Any]]:
    """Each primary's INFO section ``server``, by its address.

    Raises
    ------
    StoreUnavailable
        It is no cluster, a slot has no owner, or a primary is not reachable, refuses us, or is too old.
    """
    with store_errors(cluster.address):
        await cluster.refresh()
        nodes = await cluster.primaries()
    return {node.name: await check_server(node.redis, node.name) for node in nodes}
