"""Waiting until what was stored is on a disk: WAITAOF.

The server confirms what a connection wrote itself, and answers nothing else on that connection meanwhile. So this is a
connection of its own: it writes a mark, which stands behind all that was acknowledged before, and waits for that. All
who wait at the same moment share one mark.

A server that was restarted, or took the place of one that vanished, confirms just as readily and may never have had
what was acknowledged before. So the connection is opened before anything is stored, and confirms on that one only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any, Final, TypeAlias, TypeVar

from redis.exceptions import ResponseError

from promptmill import keys
from promptmill.errors import StoreUnavailable
from promptmill.settings.parts import Durability
from promptmill.store.cluster import Cluster, Node
from promptmill.store.connection import store_errors
from promptmill.store.wire import Wire

WAIT_S: Final = 2.0

T = TypeVar("T")

Since: TypeAlias = Mapping[str, int]
"""The connection to each server at a moment. A server that is still asked on it has forgotten nothing since then."""


class Durable:
    """Marks and their confirmations. One per server."""

    def __init__(self, redis: Any, address: str, mark: Callable[[], str] = lambda: keys.MARK) -> None:
        self.address = address
        self._wire = Wire(redis)
        self._name_of_mark = mark
        self._turn = asyncio.Lock()
        self._asking: dict[Durability, asyncio.Task[int]] = {}
        self._gathering: dict[Durability, asyncio.Task[int]] = {}
        self._able: dict[Durability, int] = {}

    async def check(self, level: Durability) -> Since:
        """Before anything is stored: what :meth:`confirm` must know.

        The server is asked once on each connection, however many come before it has answered.

        Raises
        ------
        StoreUnavailable
            It cannot confirm at all, or is not reached.
        """
        if level == "server":
            return {}
        able = self._able.get(level)
        if able is None or able != self._wire.serial:
            able = await _together(self._asking, level, self._ask)
        return {self.address: able}

    async def _ask(self, level: Durability) -> int:
        try:
            with store_errors(self.address):
                self._able[level] = serial = await self._try(level)
        finally:
            del self._asking[level]
        return serial

    async def _try(self, level: Durability) -> int:
        serial = await self._wire.connected()
        # Waits for nothing: of a connection that wrote nothing all is confirmed.
        (reply,) = await self._wire.many_on(serial, [("WAITAOF", 1, 0, 1)])
        if isinstance(reply, ResponseError):
            raise StoreUnavailable(
                f"durability = {level!r}: Redis at {self.address} cannot confirm what is on its disk ({reply}); "
                "it must be 7.2 or newer, a primary, with appendonly yes. Nothing was stored",
                retryable=False,
                field="durability",
            )
        return serial

    async def confirm(self, level: Durability, since: Since) -> None:
        """Return once all that was acknowledged after that check and before this call is on disks, as ``level`` says.

        Raises
        ------
        StoreUnavailable
            It was not confirmed within 2 s: what was stored is stored, and may be lost with its machine. Or the server
            was restarted meanwhile, or another took its place, which may confirm what it does not have.
        """
        if level == "server":
            return
        if await _together(self._gathering, level, self._mark) != since[self.address]:
            raise _unconfirmed(f"the connection to Redis at {self.address} was lost meanwhile")

    async def _mark(self, level: Durability) -> int:
        try:
            await self._turn.acquire()
        finally:
            # Whoever comes from here on may have written behind this mark.
            del self._gathering[level]
        try:
            with store_errors(self.address):
                serial = await self._wire.connected()
                replies = await self._wire.many_on(
                    serial,
                    [
                        ("SET", self._name_of_mark(), "1", "PX", int(keys.MARK_TTL.total_seconds() * 1000)),
                        ("WAITAOF", 1, 1 if level == "replica" else 0, int(WAIT_S * 1000)),
                    ],
                )
                for reply in replies:
                    if isinstance(reply, ResponseError):
                        raise reply
        except StoreUnavailable as err:
            raise _unconfirmed(err.message) from err
        finally:
            self._turn.release()
        local, replicas = replies[1]
        if not local or (level == "replica" and not replicas):
            missing = "no replica" if local else "its disk"
            raise _unconfirmed(f"Redis at {self.address} heard of {missing} within {WAIT_S:g} s")
        return serial

    async def aclose(self) -> None:
        """Close the connection; who waits gets StoreUnavailable. Safe to repeat."""
        await self._wire.aclose()
        await asyncio.gather(*self._asking.values(), *self._gathering.values(), return_exceptions=True)


class ClusterDurable:
    """The same for a cluster: what a submission writes may stand on any of its nodes, so all are asked."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._nodes: dict[Node, Durable] = {}

    async def check(self, level: Durability) -> Since:
        """As :meth:`Durable.check`, for every primary."""
        since: dict[str, int] = {}
        if level != "server":
            for durable in await self._each():
                since |= await durable.check(level)
        return since

    async def confirm(self, level: Durability, since: Since) -> None:
        """As :meth:`Durable.confirm`, on every primary; they must be those of the check."""
        if level == "server":
            return
        try:
            each = await self._each()
        except StoreUnavailable as err:
            raise _unconfirmed(err.message) from err
        if {durable.address for durable in each} != set(since):
            raise _unconfirmed(f"the primaries of the cluster at {self._cluster.address} changed meanwhile")
        outcomes = await asyncio.gather(*(durable.confirm(level, since) for durable in each), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def _each(self) -> list[Durable]:
        with store_errors(self._cluster.address):
            nodes = await self._cluster.primaries()
        # Taken out before anything is waited for: others come by here meanwhile.
        for durable in [self._nodes.pop(node) for node in [*self._nodes] if node not in nodes]:
            await durable.aclose()
        for node in nodes:
            if node not in self._nodes:
                mark = partial(self._cluster.a_key_on, node, keys.MARK)
                self._nodes[node] = Durable(node.redis, node.name, mark)
        return [self._nodes[node] for node in nodes]

    async def aclose(self) -> None:
        """Close the connections; who waits gets StoreUnavailable. Safe to repeat."""
        await asyncio.gather(*(durable.aclose() for durable in self._nodes.values()))


async def _together(
    under_way: dict[Durability, asyncio.Task[T]],
    level: Durability,
    work: Callable[[Durability], Coroutine[Any, Any, T]],
) -> T:
    """Wait for the work of that level which is under way, or begin it; it leaves ``under_way`` by itself."""
    task = under_way.get(level)
    if task is None:
        task = under_way[level] = asyncio.create_task(work(level), name="durable")
        task.add_done_callback(_told)
    # Shielded: one caller's cancellation must not be everybody's.
    return await asyncio.shield(task)


def _told(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()  # raised to whoever waits; nobody may be left


def _unconfirmed(why: str) -> StoreUnavailable:
    return StoreUnavailable(
        f"what was submitted exists, but is not known to be durable: {why}. Repeat with the same idempotency key"
    )
