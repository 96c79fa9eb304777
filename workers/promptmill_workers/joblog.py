"""What one attempt has to tell its readers, until the store has it.

Pieces of text wait unnumbered and merge. When the writer takes them they become an event with a number, and from then
on its bytes never change: what is sent again is the same.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

import orjson

from promptmill import keys

_MERGE_MAX_CHARS: Final = 2_000
"""Pieces merge up to this size, so that one event stays well below what travels on the channel."""
UNSENT_MAX_BYTES: Final = 1024 * 1024
_KEPT_MAX_BYTES: Final = 2 * 1024 * 1024

_TOKEN_HEAD: Final = b'{"type":"token","text":'


class JobLog:
    """The events of one claim. Not thread-safe: lives in the worker's event loop.

    Numbers begin at 2: the claim itself wrote ``<epoch>-1``.
    """

    __slots__ = (
        "_kept",
        "_kept_bytes",
        "_kept_from",
        "_pending",
        "_room",
        "acked",
        "claim",
        "dirty",
        "epoch",
        "fenced",
        "idle",
        "job_id",
        "last_n",
        "log_key",
        "lost",
        "quiet",
        "record_key",
        "unsent_bytes",
        "urgent",
    )

    def __init__(self, job_id: str, claim: str, epoch: int) -> None:
        self.job_id = job_id
        self.claim = claim
        self.epoch = b"%d" % epoch
        self.record_key, self.log_key = keys.record(job_id).encode(), keys.log(job_id).encode()
        self._pending: deque[str | bytes] = deque()
        self._kept: deque[bytes] = deque()
        self._kept_from = 2
        self._kept_bytes = 0
        self.unsent_bytes = 0
        self.last_n = 1
        self.acked = 1
        self.dirty = False
        self.fenced = False
        """The claim is no longer ours: nothing is written any more."""
        self.lost = False
        """The log itself is gone from the store; the job goes on and its text is stored at the end."""
        self.quiet = False
        """The last event reached no reader: what comes next may wait a while."""
        self.urgent = False
        """The end waits for these events."""
        self.idle = asyncio.Event()
        self.idle.set()
        self._room = asyncio.Event()
        self._room.set()

    def add_text(self, text: str) -> None:
        """A piece of the answer."""
        self._pending.append(text)
        self._grow(len(text))

    def add_event(self, event: bytes) -> None:
        """Any other event, as JSON; keeps its place among the pieces."""
        self._pending.append(event)
        self._grow(len(event))

    def _grow(self, size: int) -> None:
        self.unsent_bytes += size
        if self.unsent_bytes > UNSENT_MAX_BYTES:
            self._room.clear()

    async def wait_for_room(self) -> None:
        """Return once the store has taken enough: this is how a slow store slows the backend down."""
        await self._room.wait()

    @property
    def full(self) -> bool:
        """True where the writer is too far behind to take more."""
        return self.unsent_bytes > UNSENT_MAX_BYTES

    @property
    def settled(self) -> bool:
        """True where everything was taken by the store, or nothing ever will be."""
        return self.fenced or self.lost or (not self._pending and self.acked == self.last_n)

    def freeze(self) -> None:
        """Number what waits; merge neighbouring pieces of text."""
        pending, kept = self._pending, self._kept
        while pending:
            item = pending.popleft()
            if isinstance(item, str):
                size = len(item)
                parts = [item]
                while pending and size < _MERGE_MAX_CHARS:
                    more = pending[0]
                    if isinstance(more, bytes):
                        break
                    parts.append(more)
                    size += len(more)
                    pending.popleft()
                if len(parts) > 1:
                    item = "".join(parts)
                item = _TOKEN_HEAD + orjson.dumps(item) + b"}"
            kept.append(item)
            self._kept_bytes += len(item)
            self.last_n += 1

    def unsent(self) -> tuple[int, list[bytes]]:
        """The number of the first event that the store has not acknowledged, and that event and all after it."""
        first = self.acked + 1
        skip = first - self._kept_from
        kept = self._kept
        return first, [kept[i] for i in range(skip, len(kept))] if skip else list(kept)

    def acknowledge(self, n: int) -> None:
        """The store has every event up to ``n``. They are kept for a store that loses its tail, up to a bound."""
        self.acked = n
        if not self._pending and n == self.last_n:
            self.unsent_bytes = 0
            self.idle.set()
        else:
            self.unsent_bytes = sum(map(len, self._pending)) + sum(map(len, self.unsent()[1]))
        if self.unsent_bytes <= UNSENT_MAX_BYTES:
            self._room.set()
        while self._kept_bytes > _KEPT_MAX_BYTES and self._kept_from <= n:
            self._kept_bytes -= len(self._kept.popleft())
            self._kept_from += 1

    def rewind(self, n: int) -> None:
        """The store has only what stands up to ``n``: all behind it is to be sent again, as far as it is kept."""
        self.acked = max(min(self.acked, n), self._kept_from - 1)
        if self.acked < self.last_n:
            self.idle.clear()

    def release(self) -> None:
        """Nothing more will be written: let whoever waits go on."""
        self._pending.clear()
        self.idle.set()
        self._room.set()
