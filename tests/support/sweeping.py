"""The watcher's sweep, one at a time."""

from __future__ import annotations

from promptmill import keys
from promptmill.store import Store
from promptmill.watch import Watcher


async def swept(watcher: Watcher, store: Store) -> None:
    """One sweep, whoever swept a moment ago."""
    await store.redis.delete(keys.SWEEP_LOCK)
    await watcher.sweep()
