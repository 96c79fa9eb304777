"""Traffic's scripts on the store's shared connection: bounded in time, and never in a job's way where Redis is away."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any, Final

from redis.exceptions import NoScriptError, RedisError, ResponseError

from promptmill import keys
from promptmill.store import Store
from promptmill.store.connection import reason
from promptmill.store.link import Command
from promptmill.store.scripts import Script

logger = logging.getLogger(__name__)

_ANSWER_S: Final = 1.0
_AWAY_S: Final = 2.0
"""After a failure nobody asks for so long, so that each job does not wait in turn."""
_WARN_EVERY_S: Final = 10.0

TTL_MS: Final = int(keys.TRAFFIC_TTL.total_seconds() * 1000)

Call = tuple[Script, Sequence[str], Sequence[bytes | str | float]]


class Asker:
    """Runs scripts; answers None where Redis does not."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._away_until = 0.0
        self._warned_at = float("-inf")

    @property
    def away(self) -> bool:
        """True for a moment after Redis did not answer."""
        return time.monotonic() < self._away_until

    async def scripts(self, calls: Sequence[Call], *, before: Sequence[Command] = ()) -> list[Any] | None:
        """The replies to ``calls``, or None. ``before`` goes out first, in the same write."""
        if self.away:
            return None
        sent: list[Command] = [("EVALSHA", s.sha, len(names), *names, *args) for s, names, args in calls]
        try:
            async with asyncio.timeout(_ANSWER_S):
                replies = (await self._store.wire.many([*before, *sent], first=len(before)))[len(before) :]
                for i, reply in enumerate(replies):
                    if isinstance(reply, NoScriptError):
                        script, names, args = calls[i]
                        replies[i] = await self._store.wire.call("EVAL", script.source, len(names), *names, *args)
                    elif isinstance(reply, ResponseError):
                        raise reply
        except (RedisError, OSError, TimeoutError) as err:
            self._failed(err)
            return None
        return replies

    def tell(self, calls: Sequence[Call]) -> None:
        """Send without waiting and without learning what became of it."""
        self._store.wire.tell([("EVALSHA", s.sha, len(names), *names, *args) for s, names, args in calls])

    async def commands(self, commands: Sequence[Command]) -> list[Any] | None:
        """The replies to plain commands, or None. Asked even where Redis was away a moment ago."""
        try:
            async with asyncio.timeout(_ANSWER_S):
                replies = await self._store.ask(commands)
        except (RedisError, OSError, TimeoutError) as err:
            self._failed(err)
            return None
        self._away_until = 0.0
        return replies

    def _failed(self, err: Exception) -> None:
        now = time.monotonic()
        self._away_until = now + _AWAY_S
        if now - self._warned_at > _WARN_EVERY_S:
            self._warned_at = now
            logger.warning("limits and cooldowns are not shared for now, calls go on: %s", reason(err))
