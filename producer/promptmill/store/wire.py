"""One connection that carries many raw commands in one write.

redis-py's pipeline costs several times as much per command; the token path is made of such commands.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

from hiredis import pack_command
from redis.exceptions import ResponseError

from promptmill.store.connection import COMMAND_TIMEOUT_S

_CONNECT_TIMEOUT_S: Final = 5.0

Command = tuple[bytes | str | int, ...]


class Wire:
    """Connects at the first call and again after a failure. One call at a time."""

    def __init__(self, redis: Any) -> None:
        self._pool = redis.connection_pool
        self._connection: Any = None

    async def execute(self, commands: Sequence[Command]) -> list[Any]:
        """The replies, in order; an error reply stands in its place as a ``ResponseError``.

        Raises what redis-py raises for a connection that fails or stays silent for 10 s; whether the commands took
        effect is then unknown.
        """
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT_S):
                connection = await self._connected()
                packed = b"".join([pack_command(c) for c in commands])
                await connection.send_packed_command(packed, check_health=False)
                receive = connection.read_response
                replies: list[Any] = []
                for _ in commands:
                    try:
                        replies.append(await receive(disable_decoding=True))
                    except ResponseError as err:
                        replies.append(err)
                return replies
        except BaseException:
            # Replies of a call that was cut off must never be taken for those of the next.
            await self.aclose()
            raise

    async def _connected(self) -> Any:
        if self._connection is None:
            connection = self._pool.make_connection()
            connection.socket_timeout = None  # execute() bounds the whole exchange instead of each read
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                await connection.connect()
            self._connection = connection
        return self._connection

    async def aclose(self) -> None:
        """Close the connection. Safe to repeat; a later call connects again."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.disconnect(nowait=True)
