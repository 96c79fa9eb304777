"""Who serves readers: each relay and gateway says every few seconds that it is there, and how many read from it.

It is for people and dashboards only: nothing is decided by it. Times are Redis's own, as in :mod:`.heartbeat`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final, Literal

import orjson

from promptmill import keys
from promptmill.errors import StoreUnavailable
from promptmill.rolling import Rates
from promptmill.store import Store
from promptmill.store.connection import store_errors
from promptmill.store.scripts import Script

logger = logging.getLogger(__name__)

ServerKind = Literal["relay", "gateway"]

_LEAVE_S: Final = 2.0

# KEYS: servers. ARGV: server, what it says (JSON), ttl s. Takes off the list who was silent for so long.
_ANNOUNCE: Final = Script(
    "announce",
    """
local t = redis.call('TIME')
local now = tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
local said = cjson.decode(ARGV[2])
said.at = now
redis.call('HSET', KEYS[1], ARGV[1], cjson.encode(said))
redis.call('EXPIRE', KEYS[1], ARGV[3])
local all = redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
  if cjson.decode(all[i + 1]).at < now - ARGV[3] * 1000 then redis.call('HDEL', KEYS[1], all[i]) end
end
return 1
""",
    prelude="",
)


@dataclass(frozen=True, slots=True)
class Server:
    """A relay or gateway process, as it said last.

    ``readers`` are the streams that are open, ``events`` what was sent to readers since it began, ``events_per_s`` over
    the last ten seconds, ``silent_s`` how long ago it said so.
    """

    id: str
    kind: str
    alive: bool
    silent_s: float
    up_s: float
    readers: int
    events: int
    events_per_s: float


@asynccontextmanager
async def announced(
    store: Store, kind: ServerKind, every_s: float, facts: Callable[[], tuple[int, int]]
) -> AsyncGenerator[None]:
    """While the block runs this process is on the list. ``facts``: how many readers there are, and events sent."""
    server = f"{kind}@{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    telling = asyncio.create_task(_tell(store, server, kind, every_s, facts), name="announcements")
    try:
        yield
    finally:
        telling.cancel()
        await asyncio.wait([telling])
        with suppress(StoreUnavailable, TimeoutError):
            async with asyncio.timeout(_LEAVE_S):
                with store_errors(store.address):
                    await store.wire.call("HDEL", keys.SERVERS, server)


async def _tell(
    store: Store, server: str, kind: ServerKind, every_s: float, facts: Callable[[], tuple[int, int]]
) -> None:
    began = time.monotonic()
    rates = Rates()
    ttl_s = int(keys.SERVERS_TTL.total_seconds())
    while True:
        now = time.monotonic()
        readers, events = facts()
        (events_s,) = rates.note(now, events)
        said = {"kind": kind, "every": every_s, "up_s": round(now - began, 1), "readers": readers}
        data = orjson.dumps({**said, "events": events, "events_s": events_s})
        try:
            with store_errors(store.address):
                await store.wire.call("EVAL", _ANNOUNCE.source, 1, keys.SERVERS, server, data, ttl_s)
        except StoreUnavailable as err:
            logger.debug("not announced: %s", err)
        await asyncio.sleep(every_s)


def read_server(server: str, raw: bytes, now_ms: int) -> Server:
    """An entry of the list at Redis's ``now_ms``."""
    said: dict[str, Any] = orjson.loads(raw)
    silent_s = max(now_ms - int(said.get("at", 0)), 0) / 1000
    return Server(
        id=server,
        kind=str(said.get("kind", "")),
        alive=silent_s < 3 * float(said.get("every", 0)) + 1,
        silent_s=round(silent_s, 1),
        up_s=float(said.get("up_s", 0)),
        readers=int(said.get("readers", 0)),
        events=int(said.get("events", 0)),
        events_per_s=float(said.get("events_s", 0)),
    )
