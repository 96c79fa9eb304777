"""Which connection follows which channel: one for all on a single server, one a shard on a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Final

from redis.crc import key_slot
from redis.exceptions import MovedError, ResponseError

from promptmill.reading.channel import Channel
from promptmill.reading.subscriber import Subscriber
from promptmill.store import Store
from promptmill.store.cluster import Cluster, Node

_SETTLE_S: Final = 0.01
"""A failover tells of many slots one by one; and two nodes that name each other must not keep us running."""
_MAP_EVERY_S: Final = 15.0
"""A node that became a replica goes on serving subscriptions, but nobody counts its subscribers as readers."""

Forget = Callable[[Channel], None]


class One:
    """A single server."""

    def __init__(self, store: Store, forget: Forget, connected: Callable[[], None]) -> None:
        self.subscriber = Subscriber(store.redis, forget, connected=connected)

    def start(self) -> None:
        """Begin to connect."""
        self.subscriber.start()

    def add(self, channel: Channel) -> None:
        """Follow a channel."""
        self.subscriber.add(channel)

    def drop(self, channel: Channel) -> None:
        """Follow it no more."""
        self.subscriber.drop(channel)

    def look(self, now: float) -> None:
        """Called about every second."""
        self.subscriber.look(now)

    async def aclose(self) -> None:
        """Close the connection."""
        self.subscriber.cancel()
        await self.subscriber.ended()


class Shards:
    """A cluster. ``channels`` are all that are followed, by name; they move when their slots do."""

    def __init__(
        self, cluster: Cluster, channels: Mapping[bytes, Channel], forget: Forget, connected: Callable[[], None]
    ) -> None:
        self._connected = connected
        self._cluster = cluster
        self._channels = channels
        self._forget = forget
        self._by_node: dict[Node, Subscriber] = {}
        self._homes: dict[bytes, tuple[Channel, Subscriber]] = {}
        self._moving: asyncio.TimerHandle | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._looked_at = 0.0
        self._started = False

    def start(self) -> None:
        """Begin to follow the cluster's map."""
        self._started = True
        self._cluster.changed.append(self._move_soon)
        self._cluster.suspect()
        self._move_soon()

    def add(self, channel: Channel) -> None:
        """Follow a channel: at once, or once it is known who has its slot."""
        if self._started:
            self._settle(channel)

    def drop(self, channel: Channel) -> None:
        """Follow it no more."""
        home = self._homes.get(channel.name)
        if home is not None and home[0] is channel:
            del self._homes[channel.name]
            home[1].drop(channel)

    def look(self, now: float) -> None:
        """Called about every second."""
        for subscriber in self._by_node.values():
            subscriber.look(now)
        homeless = len(self._homes) < len(self._channels)
        if homeless or now - self._looked_at > _MAP_EVERY_S:
            self._looked_at = now
            self._cluster.suspect()
        if homeless:
            self._move_soon()

    async def aclose(self) -> None:
        """Close the connections."""
        if self._started:
            self._cluster.changed.remove(self._move_soon)
            self._started = False
        if self._moving is not None:
            self._moving.cancel()
        for subscriber in self._by_node.values():
            subscriber.cancel()
        for subscriber in self._by_node.values():
            await subscriber.ended()
        await asyncio.gather(*self._closing)

    def _move_soon(self) -> None:
        if self._moving is None:
            self._moving = asyncio.get_running_loop().call_later(_SETTLE_S, self._move)

    def _move(self) -> None:
        """Every channel to the node that has its slot by now; nodes that have none are left."""
        self._moving = None
        for channel in [*self._channels.values()]:
            self._settle(channel)
        used = {subscriber for _, subscriber in self._homes.values()}
        for node, subscriber in [*self._by_node.items()]:
            if subscriber not in used and node not in self._cluster.nodes.values():
                del self._by_node[node]
                subscriber.cancel()
                closing = asyncio.create_task(subscriber.ended())
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)

    def _settle(self, channel: Channel) -> None:
        node = self._cluster.owner(key_slot(channel.name))
        old = self._homes.get(channel.name)
        if node is None or (old is not None and old[0] is channel and old[1] is self._by_node.get(node)):
            return
        if old is not None:
            old[0].acked.clear()
            old[1].drop(old[0])
        subscriber = self._by_node.get(node)
        if subscriber is None:
            subscriber = self._by_node[node] = Subscriber(
                node.redis, self._left, refused=self._refused, connected=self._connected, lost=self._cluster.suspect
            )
            subscriber.start()
        self._homes[channel.name] = (channel, subscriber)
        subscriber.add(channel)

    def _left(self, channel: Channel) -> None:
        home = self._homes.get(channel.name)
        if home is not None and home[0] is channel:
            del self._homes[channel.name]
        self._forget(channel)

    def _refused(self, err: ResponseError) -> None:
        if isinstance(err, MovedError):
            self._cluster.moved(err)
        else:
            self._cluster.suspect()
