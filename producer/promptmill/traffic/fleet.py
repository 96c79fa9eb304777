"""What all workers know of models and hosts, kept in step by messages and, where one was missed, by reading again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any, Final

import orjson

from promptmill import keys
from promptmill.errors import StoreUnavailable
from promptmill.store import Store
from promptmill.store.link import Command
from promptmill.traffic.channel import follow
from promptmill.traffic.health import Book, Cooldown, Health
from promptmill.traffic.wire import Asker

logger = logging.getLogger(__name__)

TROUBLED_TTL_S: Final = int(keys.TROUBLED_TTL.total_seconds())
_US: Final = 1_000_000


class Fleet:
    """Keeps a :class:`Book` true. ``reread`` asks for a look at once; ``capped_anew`` is set when a cap was learned."""

    def __init__(self, store: Store, asker: Asker, refresh_s: float) -> None:
        self.book = Book()
        self.reread = asyncio.Event()
        self.capped_anew = asyncio.Event()
        self._store = store
        self._asker = asker
        self._refresh_s = refresh_s

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(follow(self._store, self._heard, self.reread.set))
            tasks.create_task(self._refresh())

    def capped(self, model: str, now: float) -> bool:
        """True where a model's calls at once are limited by what was learned."""
        entry = self.book.entries.get(model)
        return entry is not None and entry.capped(now)

    def _heard(self, message: bytes) -> None:
        try:
            told: Any = orjson.loads(message)
            subject, fields, now_us = told["subject"], told.get("health", {}), int(told["now"])
            self._tell(subject, fields, now_us)
        except (ValueError, KeyError, TypeError, AttributeError):
            # Of a newer version, perhaps; what it says is read again soon.
            logger.warning("not a message of traffic: %r", message[:200])

    def _tell(self, subject: str, fields: Mapping[str, str], now_us: int) -> None:
        now = time.monotonic()
        was_capped = self.capped(subject, now)
        self.book.tell(subject, fields, now_us, now)
        if not was_capped and self.capped(subject, now):
            self.capped_anew.set()

    async def _refresh(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._refresh_s):
                    await self.reread.wait()
            self.reread.clear()
            found = await self._read(self.book.entries)
            if found is not None:
                for subject, fields in found[1].items():
                    try:
                        self._tell(subject, fields, found[0])
                    except (ValueError, KeyError, TypeError):
                        # Written by hand, or by a newer version: one model's trouble must not end the worker.
                        logger.warning("the health of %s cannot be read: %r", subject, fields)

    async def _read(self, known: Iterable[str]) -> tuple[int, dict[str, dict[str, str]]] | None:
        """Redis's time in µs and the health of all that may be in trouble; None where Redis does not answer."""
        old = ("ZREMRANGEBYSCORE", keys.TROUBLED, "-inf", time.time() - TROUBLED_TTL_S)
        listed = await self._asker.commands([old, ("ZRANGE", keys.TROUBLED, 0, -1)])
        if listed is None:
            return None
        subjects = sorted({*known, *(name.decode() for name in listed[1])})
        asked: list[Command] = [("HGETALL", keys.traffic(subject, "health")) for subject in subjects]
        replies = await self._asker.commands([("TIME",), *asked])
        if replies is None:
            return None
        (seconds, micros), *raw = replies
        rows = [dict(zip(r[::2], r[1::2], strict=True)) for r in raw]
        fields = [{k.decode(): v.decode() for k, v in row.items()} for row in rows]
        return int(seconds) * _US + int(micros), dict(zip(subjects, fields, strict=True))

    async def cooldowns(self) -> list[Cooldown]:
        """See :meth:`promptmill.traffic.Traffic.cooldowns`."""
        found = await self._read(())
        if found is None:
            raise StoreUnavailable(f"Redis at {self._store.address} does not answer")
        now = time.monotonic()
        entries = [(s, Health.of(fields, found[0], now)) for s, fields in found[1].items() if fields]
        return [cooldown for subject, entry in entries for cooldown in entry.cooldowns(subject, now)]
