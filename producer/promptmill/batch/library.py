"""A batch as a loop: requests in, results out as they come, both as lazily as the caller is."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
)
from contextlib import aclosing
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, TypeVar

import orjson

from promptmill import keys
from promptmill.batch.models import BatchHead, BatchLine, BatchResult, BatchStatus
from promptmill.contract import JobRequest, Limits, parse_request
from promptmill.errors import BadRequest, Overloaded, PromptmillError, StoreUnavailable

if TYPE_CHECKING:
    from promptmill.batch.client import BatchClient
    from promptmill.client.options import BatchOptions

logger = logging.getLogger(__name__)

BatchItem = str | dict[str, Any] | JobRequest
"""A prompt, the fields of a request (with ``id``, where results shall name it), or a request."""
BatchItems = Iterable[BatchItem] | AsyncIterable[BatchItem]

CHUNK_LINES: Final = 50
_TOGETHER_S: Final = 0.05
"""What a source gives within so little time is uploaded together."""
_POLL_MIN_S: Final = 0.02
_POLL_MAX_S: Final = 0.5
_PATIENCE_S: Final = 60.0
_AGAIN_MAX_S: Final = 1.0

T = TypeVar("T")


async def run_batch(
    batches: BatchClient,
    limits: Limits,
    items: BatchItems,
    options: BatchOptions,
) -> AsyncGenerator[BatchResult, None]:
    """Make a batch of ``items``, and yield each one's result as it ends, in that order.

    An item is a prompt, a dict with the fields of a request (and perhaps an ``id``, which its result has), or a
    request; ``items`` may be lazy, and asynchronous: no more than ``ahead`` of them are taken before their results are
    read. What failed is a result too; look at ``result.job.state``. Leaving the loop early cancels the batch (close the
    generator: ``contextlib.aclosing``). Where the store is away it is waited for, a minute at most.

    Raises
    ------
    BadRequest
        An item is wrong; ``field`` says which (``items[17].max_tokens``). What came before it is cancelled.
    Overloaded
        ``budget_exceeded``: the user's budget of the day is used up, and nothing was stored; or the lines that ended
        cost more than ``max_cost_usd``, and the others are cancelled.
    PromptmillError
        ``cancelled`` or ``expired``: somebody ended the batch, or it took longer than ``batch_expires_s``.
    """
    if isinstance(items, str | bytes | Mapping):
        raise BadRequest("items is one value: give a list or a generator of prompts or requests", field="items")
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    name, ahead, dedupe = (given.pop(key, usual) for key, usual in (("name", None), ("ahead", 1000), ("dedupe", False)))
    max_cost_usd = given.pop("max_cost_usd", None)
    batch_id = keys.new_job_id()
    head = BatchHead(user=given.get("user", "default"), name=name, max_cost_usd=max_cost_usd, chunk_lines=CHUNK_LINES)
    await batches.create(batch_id, head)
    upload = _Upload(batches, batch_id, _Lines(limits, given, dedupe=dedupe), max(1, ahead))
    task = asyncio.create_task(upload.run(items), name="batch upload")
    whole = False
    try:
        async with aclosing(_results(batches, batch_id, task, max_cost_usd)) as results:
            async for result in results:
                upload.read_one()
                yield result
        whole = True
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        if not whole:
            # Nobody is left to read them: lines that did not begin are not to be paid for.
            try:
                await batches.cancel(batch_id)
            except StoreUnavailable as err:
                logger.warning("batch %s goes on, it could not be cancelled: %s", batch_id, err)


async def _results(
    batches: BatchClient, batch_id: str, upload: asyncio.Task[int], max_cost_usd: float | None
) -> AsyncGenerator[BatchResult]:
    """Each line's result once, until all are there. Raises what the upload raised."""
    offset, pause_s = 0, _POLL_MIN_S
    seen = bytearray()
    while True:
        if upload.done() and not upload.result():
            return  # there was no item
        ended = await _ended(batches, batch_id) if upload.done() else None
        found, offset = await patiently(partial(batches.results, batch_id, offset))
        for result in found:
            if _new(seen, result.index):
                yield result
        if found:
            pause_s = _POLL_MIN_S
        elif ended is None:
            if upload.done():
                await asyncio.sleep(pause_s)
            else:
                # The wait ends with the upload, too: its failure is not to be noticed late.
                await asyncio.wait({upload}, timeout=pause_s)
            pause_s = min(pause_s * 1.5, _POLL_MAX_S)
        elif ended.state == "cancelled" and max_cost_usd is not None and ended.cost_usd > max_cost_usd:
            message = f"batch {batch_id} cost ${ended.cost_usd:.4f}, over {max_cost_usd:g}, and was cancelled"
            raise Overloaded(message, code="budget_exceeded", limit=max_cost_usd)
        elif ended.state != "completed":
            how = "was cancelled" if ended.state == "cancelled" else "expired"
            raise PromptmillError(f"batch {batch_id} {how}: {ended.succeeded} lines succeeded", code=ended.state)
        elif sum(byte.bit_count() for byte in seen) >= upload.result():
            return
        else:
            offset = 0  # a store that lost its last second counted some lines in another order


async def _ended(batches: BatchClient, batch_id: str) -> BatchStatus | None:
    """The batch, where it has ended: then all results are there."""
    status = await patiently(partial(batches.status, batch_id))
    return status if status.ended else None


async def patiently(act: Callable[[], Awaitable[T]]) -> T:
    """Repeat what may be repeated while the store is away, for a minute: a batch outlasts its restart."""
    deadline = time.monotonic() + _PATIENCE_S
    pause_s = _POLL_MIN_S
    while True:
        try:
            return await act()
        except StoreUnavailable as err:
            if time.monotonic() > deadline or not err.retryable:
                raise
            logger.info("waiting for the store: %s", err)
        await asyncio.sleep(pause_s)
        pause_s = min(pause_s * 2, _AGAIN_MAX_S)


def _new(seen: bytearray, index: int) -> bool:
    """Note a line; False where it was noted before."""
    if index // 8 >= len(seen):
        seen.extend(bytes(index // 8 + 1 - len(seen)))
    bit = 1 << index % 8
    known = seen[index // 8] & bit
    seen[index // 8] |= bit
    return not known


class _Lines:
    """Makes lines of what a caller gives. Raises BadRequest, naming the item."""

    def __init__(self, limits: Limits, options: dict[str, Any], *, dedupe: bool) -> None:
        self._limits = limits
        self._options = options
        self._known: dict[bytes, int] | None = {} if dedupe else None

    def make(self, index: int, item: BatchItem) -> tuple[JobRequest, BatchLine]:
        line_id = str(index)
        try:
            if isinstance(item, JobRequest):
                request = parse_request(item, self._limits)
            else:
                fields = {"prompt": item} if isinstance(item, str) else dict(item)
                line_id = str(fields.pop("id", line_id))
                request = parse_request({**self._options, **fields}, self._limits)
        except BadRequest as err:
            field = f"items[{index}]" + (f".{err.field}" if err.field else "")
            raise BadRequest(f"item {index}: {err.message}", code=err.code, field=field, limit=err.limit) from None
        stored = request.to_json()
        return request, BatchLine(line_id, orjson.loads(stored), self._same(index, stored))

    def _same(self, index: int, stored: bytes) -> int | None:
        if self._known is None:
            return None
        first = self._known.setdefault(hashlib.blake2b(stored, digest_size=16).digest(), index)
        return None if first == index else first


class _Upload:
    """Gives lines to a batch, but never more than ``ahead`` that are not read yet."""

    def __init__(self, batches: BatchClient, batch_id: str, lines: _Lines, ahead: int) -> None:
        self._batches = batches
        self._batch_id = batch_id
        self._lines = lines
        self._ahead = ahead
        self._given = 0
        self._read = 0
        self._room = asyncio.Event()

    def read_one(self) -> None:
        """The caller took one more result."""
        self._read += 1
        self._room.set()

    async def run(self, items: BatchItems) -> int:
        """Upload everything; answers how many lines."""
        chunk: list[BatchLine] = []
        async with aclosing(_portions(items, self._wanted)) as portions:
            async for portion in portions:
                made = [self._lines.make(self._given + place, item) for place, item in enumerate(portion)]
                # A budget that is used up later holds the batch up, and fails nothing.
                await self._batches.check([request for request, _ in made], budgets=not self._given)
                for _, line in made:
                    chunk.append(line)
                    self._given += 1
                    if len(chunk) == CHUNK_LINES:
                        await self._add(chunk)
                        chunk = []
                if chunk:
                    # It grows when more comes; what is there already runs.
                    await self._add(chunk)
        if not self._given:
            await patiently(partial(self._batches.cancel, self._batch_id))
            return 0
        await patiently(partial(self._batches.seal, self._batch_id, self._given))
        return self._given

    async def _add(self, chunk: list[BatchLine]) -> None:
        number = (self._given - 1) // CHUNK_LINES
        await patiently(partial(self._batches.add, self._batch_id, number, chunk))

    async def _wanted(self) -> int:
        """How many items may be taken from the source now; waits until there is one."""
        while (room := self._ahead - (self._given - self._read)) < 1:
            self._room.clear()
            await self._room.wait()
        return min(room, CHUNK_LINES)


async def _portions(items: BatchItems, wanted: Callable[[], Awaitable[int]]) -> AsyncGenerator[list[BatchItem]]:
    """What the source gives, some at a time and no more than is ``wanted``."""
    if isinstance(items, AsyncIterable):
        async with aclosing(_async_portions(aiter(items), wanted)) as portions:
            async for portion in portions:
                yield portion
        return
    iterator = iter(items)
    while True:
        # In a thread: a source that reads a file or waits for something must not hold the event loop up.
        portion = await asyncio.to_thread(_take, iterator, await wanted())
        if not portion:
            return
        yield portion


def _take(iterator: Iterator[BatchItem], most: int) -> list[BatchItem]:
    """Up to ``most`` items, but no longer than :data:`_TOGETHER_S` after the first; none at the end."""
    taken: list[BatchItem] = []
    until = None
    for item in islice(iterator, most):
        taken.append(item)
        now = time.monotonic()
        until = now + _TOGETHER_S if until is None else until
        if now >= until:
            break
    return taken


async def _async_portions(
    iterator: AsyncIterator[BatchItem], wanted: Callable[[], Awaitable[int]]
) -> AsyncGenerator[list[BatchItem]]:
    async def one() -> BatchItem:
        return await anext(iterator)

    next_one: asyncio.Task[BatchItem] | None = None
    try:
        while True:
            most = await wanted()
            taken: list[BatchItem] = []
            until: float | None = None
            while len(taken) < most:
                next_one = next_one or asyncio.create_task(one(), name="batch source")
                left_s = None if until is None else max(0.0, until - time.monotonic())
                # Not wait_for: what the source is at must go on.
                if not (await asyncio.wait({next_one}, timeout=left_s))[0]:
                    break
                done, next_one = next_one, None
                try:
                    taken.append(done.result())
                except StopAsyncIteration:
                    if taken:
                        yield taken
                    return
                until = time.monotonic() + _TOGETHER_S if until is None else until
            yield taken
    finally:
        if next_one is not None:
            next_one.cancel()
            await asyncio.gather(next_one, return_exceptions=True)
