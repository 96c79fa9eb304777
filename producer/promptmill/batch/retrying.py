"""A second batch of the lines of a first one that failed."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Final

import orjson

from promptmill import keys
from promptmill.batch import scripts
from promptmill.batch.models import BatchLine
from promptmill.batch.store import StoredHead, no_batch, read_entry, read_head, read_lines, run
from promptmill.errors import BadRequest
from promptmill.store import Store
from promptmill.store.connection import store_errors

if TYPE_CHECKING:
    from promptmill.batch.client import BatchClient

_PAGE: Final = 200
_AGAIN: Final = frozenset({"failed", "expired"})


async def retry_failed(batches: BatchClient, store: Store, batch_id: str) -> str:
    """See :meth:`promptmill.batch.BatchClient.retry_failed`.

    The new batch's id is noted with the old one first, and a batch that ended does not change: whoever repeats this
    makes the same batch of the same lines.
    """
    status = await batches.status(batch_id)
    if not status.ended:
        raise BadRequest(f"batch {batch_id} has not ended: it is {status.state}", field="state")
    if not status.failed + status.expired:
        raise BadRequest(f"no line of batch {batch_id} failed", field="id")
    stored = await read_head(store, batch_id)
    new: bytes = await run(store, scripts.RETRY, batch_id, keys.new_job_id())
    if not new:
        raise no_batch(batch_id)
    new_id = new.decode()
    await batches.create(new_id, stored.head.model_copy(update={"retry_of": batch_id}))
    size = stored.head.chunk_lines
    waiting: list[BatchLine] = []
    total = 0
    async for line in _failed(store, batch_id, stored):
        waiting.append(line)
        total += 1
        if len(waiting) == size:
            await batches.add(new_id, (total - 1) // size, waiting)
            waiting = []
    if waiting:
        await batches.add(new_id, (total - 1) // size, waiting)
    await batches.seal(new_id, total)
    return new_id


async def _failed(store: Store, batch_id: str, stored: StoredHead) -> AsyncGenerator[BatchLine]:
    """The lines that failed, in the order in which they did, then those that expired before they could begin."""
    places: dict[int, int] = {}
    async for indexes in _pages(store, batch_id, stored):
        found = await read_lines(store, batch_id, stored.head.chunk_lines, indexes)
        for index in indexes:
            line = found.get(index)
            if line is not None:
                same = None if line.same is None else places.get(line.same)
                places[index] = len(places)
                yield BatchLine(line.id, line.request, same)


async def _pages(store: Store, batch_id: str, stored: StoredHead) -> AsyncGenerator[list[int]]:
    offset = 0
    while True:
        with store_errors(store.address):
            rows: list[bytes] = await store.wire.call("LRANGE", keys.batch_ended(batch_id), offset, offset + _PAGE - 1)
            entries = [read_entry(row) for row in rows]
            ids = [stored.job_id(index if first is None else first) for index, first in entries]
            states: list[bytes | None] = await store.ask([("HGET", keys.record(job_id), "st") for job_id in ids])
        yield [
            index
            for (index, _), raw in zip(entries, states, strict=True)
            if raw is None or orjson.loads(raw)["state"] in _AGAIN
        ]
        offset += len(rows)
        if len(rows) < _PAGE:
            break
    with store_errors(store.address):
        fields: list[bytes | None] = await store.wire.call("HMGET", keys.batch(batch_id), "ending", "cut", "total")
    if fields[0] == b"expired":
        cut, total = int(fields[1] or 0), int(fields[2] or 0)
        for start in range(cut, total, _PAGE):
            yield [*range(start, min(start + _PAGE, total))]
