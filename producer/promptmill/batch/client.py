"""Batches, as clients see them: many requests as one object that runs on the workers and survives its caller."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from promptmill import keys
from promptmill.batch import scripts
from promptmill.batch.chunks import pack
from promptmill.batch.models import BatchHead, BatchLine, BatchResult, BatchStatus
from promptmill.batch.retrying import retry_failed
from promptmill.batch.store import StoredHead, no_batch, read_entry, read_head, read_lines, read_status, run, tell
from promptmill.contract import JobRequest
from promptmill.errors import BadRequest, IdempotencyConflict, NotFound
from promptmill.settings import Settings
from promptmill.store import Store
from promptmill.store.connection import store_errors
from promptmill.store.link import Command
from promptmill.usage.budgets import check_budgets

if TYPE_CHECKING:
    # At run time that package imports this one.
    from promptmill.client.routes import Routes

EXPIRES_MAX: Final = timedelta(days=30)
RETENTION_MAX: Final = timedelta(days=365)
RESULTS_AT_ONCE: Final = 200
_POLL_MIN_S: Final = 0.02
_POLL_MAX_S: Final = 0.5
_HEADS_MAX: Final = 1_000


class BatchClient:
    """Makes, follows and ends batches. Everything may be repeated after a lost reply.

    Make a batch with :meth:`create`, give it lines with :meth:`add`, say that these are all with :meth:`seal`; its
    lines run meanwhile. Read what ended with :meth:`results`, from an offset that is kept by the caller.

    All methods raise :class:`~promptmill.errors.StoreUnavailable` where Redis does not answer.
    """

    def __init__(self, store: Callable[[], Awaitable[Store]], settings: Settings, routes: Routes) -> None:
        self._store = store
        self._settings = settings
        self._routes = routes
        self._heads: dict[str, StoredHead] = {}

    async def check(self, requests: Sequence[JobRequest], *, budgets: bool = True) -> None:
        """Refuse what nothing can answer, before anything is stored; without ``budgets``, whoever may pay for it.

        Raises
        ------
        BadRequest
            ``unknown_model``, ``unknown_role`` …
        Overloaded
            ``budget_exceeded``: the user's budget of the day is used up.
        """
        await self._routes.check(requests, self._store)
        if budgets:
            await check_budgets(await self._store(), self._settings, requests)

    # -- making one ---------------------------------------------------------------------------------------------

    async def create(self, batch_id: str, head: BatchHead | None = None) -> None:
        """Make a batch under an id of :func:`promptmill.keys.new_job_id`; nothing happens where it is there already.

        Raises
        ------
        BadRequest
            The id could not be one, or it is to be kept for too long.
        IdempotencyConflict
            There is another batch with this id.
        """
        keys.check_job_id(batch_id)
        asked = head or BatchHead()
        head = self._complete(asked)
        stored = StoredHead(head, keys.new_token())
        store = await self._store()
        since = await store.durable.check(self._settings.durability)
        expires_ms, keep_ms = int((head.expires_s or 0) * 1000), int((head.retention_s or 0) * 1000)
        # The index first: a crash in between leaves a name that the feeder and the list drop.
        await self._index(store, batch_id, head.user, expires_ms + keep_ms)
        reply = await run(store, scripts.CREATE, batch_id, stored.to_json(), expires_ms, keep_ms)
        if reply[0] == b"exists":
            stored = StoredHead.from_json(reply[1])
            # What was left to the settings may have changed since.
            left = {"expires_s": asked.expires_s, "retention_s": asked.retention_s}
            if stored.head.model_copy(update={name: None for name, given in left.items() if given is None}) != asked:
                raise IdempotencyConflict(f"there is another batch {batch_id}", field="id")
        await store.durable.confirm(self._settings.durability, since)
        self._know(batch_id, stored)

    def _complete(self, head: BatchHead) -> BatchHead:
        expires_s = head.expires_s or self._settings.batch_expires_s
        retention_s = head.retention_s or self._settings.retention_s
        for field, value_s, most in (
            ("expires_s", expires_s, EXPIRES_MAX),
            ("retention_s", retention_s, RETENTION_MAX),
        ):
            if value_s > most.total_seconds():
                limit = most.total_seconds()
                raise BadRequest(f"{field} is {value_s:g}, the limit is {limit:g}", field=field, limit=limit)
        return head.model_copy(update={"expires_s": expires_s, "retention_s": retention_s})

    async def _index(self, store: Store, batch_id: str, user: str, life_ms: int) -> None:
        ttl_ms = max(life_ms, _ms(keys.LIST_TTL))
        with store_errors(store.address):
            commands: list[Command] = []
            for index in (keys.BATCHES, keys.ALL_BATCHES, keys.user_batches(user)):
                commands += [("ZADD", index, "NX", _now_ms(), batch_id), ("PEXPIRE", index, ttl_ms)]
            await store.ask(commands)

    async def add(self, batch_id: str, chunk: int, lines: Sequence[BatchLine]) -> None:
        """Give a batch its next chunk: ``chunk_lines`` lines, fewer in the last one.

        The last chunk may be given again with more lines behind those that it has. What is there already changes
        nothing. Lines may run from now on. ``same`` must name a line that has none itself.

        Raises
        ------
        NotFound
            There is no such batch (any more).
        BadRequest
            The chunk is not the next one or too large, or the batch takes no more: it is sealed, cancelled or expired.
        """
        stored = await self._head(batch_id)
        size = stored.head.chunk_lines
        if not 0 < len(lines) <= size:
            raise BadRequest(f"a chunk of this batch has 1 to {size} lines, not {len(lines)}", field="lines")
        for place, line in enumerate(lines):
            if line.same is not None and not 0 <= line.same < chunk * size + place:
                raise BadRequest(f"same of line {line.id!r} is {line.same}: no earlier line", field="same")
        store = await self._store()
        outcome, known = await run(store, scripts.ADD, batch_id, chunk, chunk * size, len(lines), pack(lines))
        if outcome == b"missing":
            raise no_batch(batch_id)
        if outcome == b"gap":
            raise BadRequest(
                f"chunk {chunk} of batch {batch_id} came before those below it: it has {known} lines", field="chunk"
            )
        if outcome != b"ok":
            raise BadRequest(f"batch {batch_id} takes no more lines: it is {outcome.decode()}", field="state")
        await self._tell(store, batch_id)

    async def seal(self, batch_id: str, total: int) -> None:
        """Say that all ``total`` lines were given: the batch ends with the last of them.

        Raises
        ------
        NotFound
            There is no such batch (any more).
        BadRequest
            It has another number of lines, or none.
        """
        if total < 1:
            raise BadRequest("a batch needs at least one line", field="total")
        store = await self._store()
        since = await store.durable.check(self._settings.durability)
        outcome, known = await run(store, scripts.SEAL, batch_id, total)
        if outcome == b"missing":
            raise no_batch(batch_id)
        if outcome == b"wrong":
            raise BadRequest(f"batch {batch_id} has {known} lines, not {total}", field="total")
        await store.durable.confirm(self._settings.durability, since)
        await self._tell(store, batch_id)

    async def _tell(self, store: Store, batch_id: str) -> None:
        # The feeder may have dropped the name while there was no batch yet.
        with store_errors(store.address):
            await store.ask([("ZADD", keys.BATCHES, "NX", _now_ms(), batch_id), tell(b"batch")], first=1)

    # -- reading ------------------------------------------------------------------------------------------------

    async def status(self, batch_id: str) -> BatchStatus:
        """The batch as it stands now. Raises NotFound."""
        store = await self._store()
        with store_errors(store.address):
            flat: list[bytes] = await store.wire.call("HGETALL", keys.batch(keys.check_job_id(batch_id)))
        return read_status(batch_id, dict(zip(flat[::2], flat[1::2], strict=True)))

    async def list(self, user: str | None = None, limit: int = 50) -> list[BatchStatus]:
        """Batches that are still kept, newest first, of one user or of all."""
        store = await self._store()
        index = keys.ALL_BATCHES if user is None else keys.user_batches(user)
        found: list[BatchStatus] = []
        start = 0
        while len(found) < limit:
            with store_errors(store.address):
                rows: list[bytes] = await store.wire.call("ZREVRANGE", index, start, start + limit - 1)
            gone: list[str] = []
            for batch_id in (row.decode() for row in rows):
                try:
                    found.append(await self.status(batch_id))
                except NotFound:
                    gone.append(batch_id)
            if len(rows) < limit:
                break
            start += len(rows)
        return found[:limit]

    async def results(
        self, batch_id: str, offset: int = 0, count: int = RESULTS_AT_ONCE
    ) -> tuple[list[BatchResult], int]:
        """Up to ``count`` lines (200 at most) that ended, in the order in which they did, from the ``offset``-th on.

        Answers the offset to go on from, too. Read until the batch has ended and nothing more comes. A store that lost
        its last second (its power failed) may count a few lines again in another order: who then has fewer lines than
        were counted reads again from 0.

        Raises :class:`~promptmill.errors.NotFound`.
        """
        store = await self._store()
        stored = await self._head(batch_id)
        count = max(1, min(count, RESULTS_AT_ONCE))
        with store_errors(store.address):
            rows: list[bytes]
            rows, there = await store.ask(
                [
                    ("LRANGE", keys.batch_ended(batch_id), offset, offset + count - 1),
                    ("EXISTS", keys.batch(batch_id)),
                ]
            )
        if not there:
            self._heads.pop(batch_id, None)
            raise no_batch(batch_id)
        entries = [read_entry(row) for row in rows]
        records = await store.find_many(stored.job_id(index if first is None else first) for index, first in entries)
        # Whose job does not say what the caller calls the line.
        unnamed = [
            index
            for (index, first), record in zip(entries, records, strict=True)
            if first is not None or record is None or record.batch is None
        ]
        lines = await read_lines(store, batch_id, stored.head.chunk_lines, unnamed)
        found: list[BatchResult] = []
        for (index, first), record in zip(entries, records, strict=True):
            line = lines.get(index)
            own = record.batch[2] if record is not None and record.batch is not None and first is None else None
            name = own if own is not None else line.id if line is not None else str(index)
            found.append(BatchResult(index, name, record.job() if record else None, first))
        return found, offset + len(entries)

    async def lines(self, batch_id: str, indexes: Iterable[int]) -> list[BatchLine]:
        """Lines as they were given, in the order asked for.

        Raises :class:`~promptmill.errors.NotFound` where there is no such batch or no such line.
        """
        stored = await self._head(batch_id)
        wanted = [*indexes]
        found = await read_lines(await self._store(), batch_id, stored.head.chunk_lines, wanted)
        for index in wanted:
            if index not in found:
                self._heads.pop(batch_id, None)
                raise NotFound(f"batch {batch_id} has no line {index}", field="index")
        return [found[index] for index in wanted]

    async def wait_change(
        self, batch_id: str, known: BatchStatus | None = None, timeout_s: float | None = None
    ) -> BatchStatus:
        """The batch once it differs from what is ``known``, or has ended, or ``timeout_s`` went by.

        Raises :class:`~promptmill.errors.NotFound`.
        """
        loop = asyncio.get_running_loop()
        until = None if timeout_s is None else loop.time() + timeout_s
        pause_s = _POLL_MIN_S
        while True:
            status = await self.status(batch_id)
            if status != known or status.ended or (until is not None and loop.time() >= until):
                return status
            await asyncio.sleep(pause_s if until is None else max(0.0, min(pause_s, until - loop.time())))
            pause_s = min(pause_s * 1.5, _POLL_MAX_S)

    # -- ending -------------------------------------------------------------------------------------------------

    async def cancel(self, batch_id: str) -> BatchStatus:
        """End a batch: lines that did not begin never run, those that run are stopped. One that ended stays as it is.

        The lines that run end within moments; then the state is ``cancelled``. Raises
        :class:`~promptmill.errors.NotFound`.
        """
        store = await self._store()
        if not await run(store, scripts.STOP, keys.check_job_id(batch_id), "cancelled"):
            raise no_batch(batch_id)
        await self._tell(store, batch_id)
        return await self.status(batch_id)

    async def retry_failed(self, batch_id: str) -> str:
        """Make a batch of the lines that failed or expired; answers its id. Repeated, it answers the same batch.

        The new one names the old one as ``retry_of`` and has its user, name and options.

        Raises
        ------
        NotFound
            There is no such batch (any more).
        BadRequest
            It has not ended, or no line of it failed.
        """
        return await retry_failed(self, await self._store(), batch_id)

    # -- heads --------------------------------------------------------------------------------------------------

    async def _head(self, batch_id: str) -> StoredHead:
        stored = self._heads.get(batch_id)
        if stored is None:
            stored = await read_head(await self._store(), keys.check_job_id(batch_id))
            self._know(batch_id, stored)
        return stored

    def _know(self, batch_id: str, stored: StoredHead) -> None:
        self._heads[batch_id] = stored
        if len(self._heads) > _HEADS_MAX:
            del self._heads[next(iter(self._heads))]


def _ms(time_to_live: timedelta) -> int:
    return int(time_to_live.total_seconds() * 1000)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
