"""A store in this process's memory, for unit tests: fakeredis under the same scripts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import fakeredis
from redis.exceptions import ResponseError

from promptmill.store import Store


class FakeWire:
    """Raw replies from fakeredis, as :class:`promptmill.store.wire.Wire` gives them from a server."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self._told: list[Sequence[Any]] = []

    async def call(self, *command: Any) -> Any:
        reply = (await self.many([command]))[0]
        if isinstance(reply, ResponseError):
            raise reply
        return reply

    async def many(self, commands: Sequence[Any], *, first: int = 0) -> list[Any]:
        told, self._told = self._told, []
        for earlier in told:
            await self.many(earlier)
        replies: list[Any] = []
        for command in commands:
            try:
                reply = await self._raw.execute_command(*command)
                # A hash comes as its fields and values in turn.
                replies.append([part for pair in reply.items() for part in pair] if isinstance(reply, dict) else reply)
            except ResponseError as err:
                replies.append(err)
        return replies

    serial = 1
    """It never connects anew."""

    async def connected(self) -> int:
        return self.serial

    async def many_on(self, serial: int, commands: Sequence[Any]) -> list[Any]:
        return await self.many(commands)

    def tell(self, commands: Sequence[Any]) -> None:
        # In its place among the commands, as on a wire.
        self._told.append(commands)

    async def aclose(self) -> None:
        await self._raw.aclose()


def fake_store() -> Store:
    """A store that nobody else sees."""
    server = fakeredis.FakeServer()
    store = Store(fakeredis.FakeAsyncRedis(server=server), "fakeredis")
    raw = fakeredis.FakeAsyncRedis(server=server)
    raw.response_callbacks.clear()  # replies as they come over the wire
    store.wire = FakeWire(raw)  # type: ignore[assignment]
    return store
