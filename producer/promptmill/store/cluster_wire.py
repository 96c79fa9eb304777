"""The wire of a Redis Cluster: each command goes to the node that owns its key, on one connection a node.

What is asked of several nodes is asked of all at once; only the ``first`` commands of a call are waited for before the
others go out. So an outbox entry is there before the record that it vouches for, whichever nodes have them.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Final

from redis.exceptions import AskError, ClusterDownError, MovedError, RedisError, ResponseError, TryAgainError
from redis.exceptions import ConnectionError as RedisConnectionError

from promptmill.store.cluster import Cluster, Node
from promptmill.store.link import Command
from promptmill.store.slots import everywhere, sharded, slot_of

_PATIENCE_S: Final = 2.0
"""How long a command is repeated that was not executed because its slot is on the way to another node."""
_PAUSE_MIN_S: Final = 0.005
_PAUSE_MAX_S: Final = 0.1
_CHANGED: Final = "a connection to the cluster was lost, or a slot got another owner"


class ClusterWire:
    """The public face of :class:`promptmill.store.wire.Wire`, over many nodes."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._connected = 0
        self._version = 0
        self._serials: dict[Node, int] = {}

    @property
    def serial(self) -> int:
        """Stands for the connections to all primaries and for who owns which slot; 0 where one of them is lost."""
        if not self._serials or self._version != self.cluster.version:
            return 0
        return self._connected if all(n.wire.serial == serial for n, serial in self._serials.items()) else 0

    async def connected(self) -> int:
        """Connect to every primary where that is needed; answers the serial. Raises what :meth:`many` raises."""
        if not self.serial:
            nodes = await self.cluster.primaries()
            version = self.cluster.version
            try:
                serials = await asyncio.gather(*(node.wire.connected() for node in nodes))
            except (RedisError, OSError):
                self.cluster.suspect()
                raise
            if 0 not in serials and version == self.cluster.version:
                self._serials, self._version = dict(zip(nodes, serials, strict=True)), version
                self._connected += 1
        return self.serial

    async def call(self, *command: bytes | str | int | float) -> Any:
        """One reply. Raises ``ResponseError`` for an error reply, and what :meth:`many` raises."""
        reply = (await self.many((command,)))[0]
        if isinstance(reply, ResponseError):
            raise reply
        return reply

    async def many(self, commands: Sequence[Command], *, first: int = 0) -> list[Any]:
        """The replies, in order; an error reply stands in its place as a ``ResponseError``.

        The ``first`` so many are done before the others begin; where one of them is refused, the others are not sent
        and have the same reply. Within one node, and within the ``first`` and the others, the order is kept.

        Raises redis-py's ``ConnectionError`` or an ``OSError`` for a node that fails, whose slots nobody serves at the
        moment, or from which a slot is taken away for longer than 2 s: whether the commands took effect is unknown.
        """
        if not commands:
            await self.cluster.primaries()
            return []
        replies: list[Any] = []
        for part in _parts(commands, first):
            done = await self._everywhere(part[0]) if everywhere(part[0]) else await self._spread(part)
            replies += done
            refused = next((reply for reply in done if isinstance(reply, ResponseError)), None)
            if refused is not None and len(replies) < len(commands):
                return [*replies, *[refused] * (len(commands) - len(replies))]
        return replies

    async def many_on(self, serial: int, commands: Sequence[Command]) -> list[Any]:
        """As :meth:`many`, on those very connections, and while no slot got another owner.

        Raises redis-py's ``ConnectionError`` where that changed: a node may have lost what it had acknowledged.
        """
        if not serial or self.serial != serial:
            raise RedisConnectionError(_CHANGED)
        replies: list[Any] = []
        for part in _parts(commands, 0):
            replies += await (self._everywhere(part[0]) if everywhere(part[0]) else self._spread(part, serial))
        return replies

    def tell(self, commands: Sequence[Command]) -> None:
        """Send without waiting and without learning what became of it: for hints that a sweep repairs."""
        by_node: dict[Node, list[Command]] = defaultdict(list)
        for command in commands:
            node = self.cluster.owner(slot_of(command))
            if node is not None:
                by_node[node].append(sharded(command))
        for node, own in by_node.items():
            node.wire.tell(own)

    async def aclose(self) -> None:
        """Close all connections; calls that wait fail. Safe to repeat."""
        await self.cluster.aclose()

    # -- internals ----------------------------------------------------------------------------------------------

    async def _everywhere(self, command: Command) -> list[Any]:
        """One reply for all primaries: the first error, else the first one's."""
        nodes = await self.cluster.primaries()
        replies = [row[0] for row in await self._gather([(node, [sharded(command)]) for node in nodes])]
        return [next((reply for reply in replies if isinstance(reply, ResponseError)), replies[0])]

    async def _spread(self, commands: Sequence[Command], serial: int | None = None) -> list[Any]:
        """Each to its node, and again where it was not executed: to where its slot or its keys are by now.

        With a ``serial`` only what is asked for may be done there: who gets MOVED must look at what the store has.
        """
        ready = [sharded(command) for command in commands]
        replies: list[Any] = [None] * len(ready)
        left: dict[int, Node | None] = dict.fromkeys(range(len(ready)))
        deadline, pause = asyncio.get_running_loop().time() + _PATIENCE_S, _PAUSE_MIN_S
        while True:
            if serial is not None and self.serial != serial:
                raise RedisConnectionError(_CHANGED)
            by_node: dict[Node, list[int]] = defaultdict(list)
            for i, target in left.items():
                by_node[target or await self.cluster.node_of(slot_of(ready[i]))].append(i)
            asked = [(node, _asking(ready, places, left)) for node, places in by_node.items()]
            for places, found in zip(by_node.values(), await self._gather(asked), strict=True):
                given = iter(found)
                for i in places:
                    if left[i] is not None:
                        next(given)  # of ASKING
                    replies[i] = next(given)
            left = self._again(replies, left, serial)
            if not left:
                return replies
            if asyncio.get_running_loop().time() > deadline:
                raise RedisConnectionError(f"the cluster is busy: {next(replies[i] for i in left)}")
            await asyncio.sleep(pause)
            pause = min(pause * 2, _PAUSE_MAX_S)

    def _again(self, replies: list[Any], asked: dict[int, Node | None], serial: int | None) -> dict[int, Node | None]:
        """What was not executed, and where to try it now; None is the owner of its slot."""
        left: dict[int, Node | None] = {}
        for i in asked:
            reply = replies[i]
            if isinstance(reply, MovedError):
                self.cluster.moved(reply)
                if serial is not None:
                    raise RedisConnectionError("a slot got another owner")
                left[i] = None
            elif isinstance(reply, AskError):
                left[i] = self.cluster.target(reply)
            elif isinstance(reply, TryAgainError):
                left[i] = None
            elif isinstance(reply, ClusterDownError):
                self.cluster.suspect()
                raise RedisConnectionError(str(reply))
        return left

    async def _gather(self, asked: Sequence[tuple[Node, Sequence[Command]]]) -> list[list[Any]]:
        """The replies of each. All are waited for; where a node failed its error is raised then."""
        found = await asyncio.gather(*(node.wire.start(own) for node, own in asked), return_exceptions=True)
        answered: list[list[Any]] = []
        for replies in found:
            if isinstance(replies, BaseException):
                self.cluster.suspect()
                raise replies
            answered.append(replies)
        return answered


def _parts(commands: Sequence[Command], first: int) -> list[Sequence[Command]]:
    """What is asked together: the first so many, then the others; each that goes everywhere by itself."""
    parts: list[Sequence[Command]] = []
    for group in (commands[:first], commands[first:]):
        for apart, some in itertools.groupby(group, everywhere):
            together = [*some]
            parts += [[command] for command in together] if apart else [together]
    return parts


def _asking(commands: Sequence[Command], places: Sequence[int], targets: dict[int, Node | None]) -> list[Command]:
    own: list[Command] = []
    for i in places:
        own += [("ASKING",), commands[i]] if targets[i] is not None else [commands[i]]
    return own
