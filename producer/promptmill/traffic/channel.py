"""Hearing what other workers learn, as soon as they do."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Any, Final, cast

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from promptmill import keys
from promptmill.store import Store
from promptmill.store.connection import reason
from promptmill.store.link import Link

logger = logging.getLogger(__name__)

_BACKOFF_MAX_S: Final = 2.0
_PING_EVERY_S: Final = 10.0
_SILENCE_MAX_S: Final = 25.0


async def follow(
    store: Store, heard: Callable[[bytes], None], again: Callable[[], None], channel: str = keys.TRAFFIC
) -> None:
    """Call ``heard`` with each message of the fleet's channel; ``again`` after every (re)subscription, before which
    messages may have been missed. Runs until it is cancelled."""
    backoff = 0.05
    while True:
        ear = _Ear(heard, again)
        try:
            link = await store.link(ear.received)
        except (RedisError, OSError) as err:
            logger.warning("the channel %s is not open: %s", channel, reason(err))
            await asyncio.sleep(backoff * random.uniform(0.5, 1.5))  # noqa: S311 - spreads reconnects, no secret
            backoff = min(backoff * 2, _BACKOFF_MAX_S)
            continue
        backoff = 0.05
        try:
            link.send([(b"SUBSCRIBE", channel)])
            logger.warning("the channel %s is lost: %s", channel, await ear.watch(link))
        finally:
            await link.aclose()


class _Ear:
    """One connection's messages, and how long it has been silent."""

    def __init__(self, heard: Callable[[bytes], None], again: Callable[[], None]) -> None:
        self._heard = heard
        self._again = again
        self._heard_at = asyncio.get_running_loop().time()

    def received(self, message: Any) -> None:
        self._heard_at = asyncio.get_running_loop().time()
        if not isinstance(message, list):
            return
        parts = cast("list[Any]", message)
        if parts[0] == b"message":
            self._heard(parts[2])
        elif parts[0] == b"subscribe":
            self._again()

    async def watch(self, link: Link) -> Exception:
        """Answers why the link was lost. One that is silent although it was asked is given up: it may hang for long."""
        loop = asyncio.get_running_loop()
        while not link.lost.done():
            await asyncio.wait({link.lost}, timeout=_PING_EVERY_S)
            if loop.time() - self._heard_at > _SILENCE_MAX_S:
                link.fail(RedisConnectionError(f"silent for {_SILENCE_MAX_S:g} s"))
            else:
                link.send([(b"PING",)])
        return link.lost.result()
