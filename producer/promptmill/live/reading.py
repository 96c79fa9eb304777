"""The registry as it is now: the configuration file's part, and over it what stands in the store."""

from __future__ import annotations

import logging
import time
from typing import Final

from promptmill import keys
from promptmill.live.entries import VERSION, Entries, read_entries, read_version
from promptmill.queues import API_FAMILY
from promptmill.registry import Registry
from promptmill.settings import Settings
from promptmill.store import Store
from promptmill.store.connection import store_errors

logger = logging.getLogger(__name__)

STALE_S: Final = 2.0
"""A producer looks for a newer version when its snapshot is older than this."""
_TTL_S: Final = int(keys.REGISTRY_TTL.total_seconds())
_RENEW_S: Final = keys.REGISTRY_RENEW.total_seconds()


class LiveRegistry:
    """Use from one event loop. ``registry`` is a snapshot that never changes; a newer one is put in its place.

    Until the first :meth:`refresh` it is the configuration file's part alone.
    """

    def __init__(self, settings: Settings) -> None:
        self.base = Registry.of(settings)
        """The configuration file's part."""
        self.entries = Entries()
        """The store's part."""
        self.registry = self.base
        self._wanted = settings.live_registry
        self._in_file = frozenset(settings.models)
        self._read_at: float | None = None
        self._renewed_at: float | None = None

    async def refresh(self, store: Store, *, renew: bool = False) -> bool:
        """Take over what changed; True where something did. One short command where nothing did.

        ``renew``: also keep the keys alive, at most once an hour. Raises StoreUnavailable; the snapshot then stays.
        """
        if not self._wanted:
            return False
        raw: dict[bytes, bytes] | None = None
        with store_errors(store.address):
            if renew:
                await self._renew(store)
            version = read_version(await store.wire.call("HGET", keys.REGISTRY, VERSION))
            if version != self.entries.version:
                flat = await store.wire.call("HGETALL", keys.REGISTRY)
                raw = dict(zip(flat[::2], flat[1::2], strict=True))
        self._read_at = time.monotonic()
        if raw is None:
            return False
        self._take(read_entries(raw))
        return True

    async def refresh_if_stale(self, store: Store) -> bool:
        """:meth:`refresh` where the last one is longer ago than 2 s. Raises StoreUnavailable."""
        if self._read_at is not None and time.monotonic() - self._read_at < STALE_S:
            return False
        return await self.refresh(store)

    def _take(self, entries: Entries) -> None:
        for key, problem in entries.problems.items():
            if self.entries.problems.get(key) != problem:
                logger.warning("the live registry's entry %s is left out: %s", key, problem)
        self.entries = entries
        self.registry = entries.over(self.base)

    async def _renew(self, store: Store) -> None:
        now = time.monotonic()
        if self._renewed_at is None or now - self._renewed_at > _RENEW_S:
            held = (keys.REGISTRY, keys.REGISTRY_AUDIT)
            await store.ask([("EXPIRE", key, _TTL_S) for key in held])
            self._renewed_at = now

    def origin(self, name: str) -> str:
        """Where a model comes from: ``built in``, ``file``, ``live``, or ``live, over the file``."""
        if name in self.entries.models:
            return "live, over the file" if name in self._in_file else "live"
        return "file" if name in self._in_file else "built in"


async def families_of(settings: Settings) -> list[str]:
    """The families that the file's and the store's models need, the API family first. Raises StoreUnavailable."""
    live = LiveRegistry(settings)
    store = await Store.connect(settings.store_url, max_connections=1)
    try:
        await live.refresh(store)
    finally:
        await store.aclose()
    return list(dict.fromkeys([API_FAMILY, *(model.worker_family for model in live.registry.models.values())]))
