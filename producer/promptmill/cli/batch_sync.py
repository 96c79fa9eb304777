"""Bringing the lines of an input to a batch, and its results into files: each step may be interrupted and repeated."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

from promptmill.batch import BatchClient
from promptmill.batch.files.checking import batch_lines, ids_of
from promptmill.batch.files.ordering import put_in_order
from promptmill.batch.files.outcomes import (
    answer_of,
    error_of,
    error_without_result,
    failure_of,
    failure_of_bad_line,
)
from promptmill.batch.files.sidecar import Sidecar
from promptmill.batch.files.writing import OutputFiles, skipped_id
from promptmill.batch.models import BatchHead, BatchLine, BatchResult, BatchStatus
from promptmill.errors import BadRequest, StoreUnavailable
from promptmill.traffic import Cooldown

from .batch_prepare import Prepared
from .batch_progress import Display, View

FLUSH_LINES: Final = 200
FLUSH_S: Final = 0.5
SAVE_S: Final = 5.0
"""How often the place among the results is noted; what came after it is asked for again after an interruption."""
_PAGE: Final = 200
_LOOK_S: Final = 0.2
_HELD_S: Final = 5.0
_AGAIN_MIN_S: Final = 0.25
_AGAIN_MAX_S: Final = 5.0

T = TypeVar("T")


class Patience:
    """Asks a store that is away again, however long it is, and lets the user see it."""

    def __init__(self, display: Display, view: View) -> None:
        self._display = display
        self._view = view

    async def ask(self, call: Callable[[], Awaitable[T]]) -> T:
        """The answer to a call that may be repeated."""
        pause_s = _AGAIN_MIN_S
        while True:
            try:
                answer = await call()
            except StoreUnavailable as err:
                self._away(err)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _AGAIN_MAX_S)
            else:
                if self._view.trouble is not None:
                    self._view.trouble = None
                    self._display.tell("store_back", "the store answers again")
                return answer

    def _away(self, error: StoreUnavailable) -> None:
        if self._view.trouble is None:
            self._display.tell("store_away", f"waiting for the store: {error}", error=error.to_dict())
        self._view.trouble = str(error)
        self._display.show(self._view)


@dataclass(slots=True)
class Upload:
    """Gives a batch its lines, from where it has them, and seals it."""

    batches: BatchClient
    batch_id: str
    head: BatchHead
    prepared: Prepared
    view: View
    display: Display
    patience: Patience
    done: bool = False

    async def create(self) -> None:
        """Make the batch; nothing happens where it is there."""
        await self.batches.create(self.batch_id, self.head)

    async def run(self) -> None:
        """Until the batch has all lines, or takes no more.

        Raises BadRequest where the input was changed meanwhile; the batch is then cancelled.
        """
        while True:
            status = await self.patience.ask(lambda: self.batches.status(self.batch_id))
            self.view.take(status)
            if status.state != "uploading":
                self.done = True
                return
            try:
                await self._from(status.uploaded_lines // self.head.chunk_lines)
            except BadRequest as err:
                if err.field not in {"chunk", "total", "state"}:
                    await self.patience.ask(lambda: self.batches.cancel(self.batch_id))
                    self.display.tell("cancelled", f"batch {self.batch_id} was cancelled")
                    raise
                # A store that came back with fewer lines than it had, or a batch that somebody ended: look again.
                await asyncio.sleep(_AGAIN_MIN_S)

    async def _from(self, first: int) -> None:
        size, plan = self.head.chunk_lines, self.prepared.plan
        for chunk in range(first, -(-len(plan) // size)):
            start = chunk * size
            lines = batch_lines(self.prepared.source, self.prepared.reader, plan, start, start + size)
            await self._add(chunk, lines)
            self.display.show(self.view)
        self.prepared.source.check_unchanged()
        await self.patience.ask(lambda: self.batches.seal(self.batch_id, len(plan)))

    async def _add(self, chunk: int, lines: list[BatchLine]) -> None:
        await self.patience.ask(lambda: self.batches.add(self.batch_id, chunk, lines))


@dataclass(slots=True)
class Collection:
    """Brings a batch's results into its files until every line stands in one of them."""

    batches: BatchClient
    upload: Upload
    sidecar: Sidecar
    sidecar_path: Path
    files: OutputFiles
    prepared: Prepared
    view: View
    display: Display
    patience: Patience
    cooldowns: Callable[[], Awaitable[list[Cooldown]]]
    max_cost_usd: float | None = None
    over_cost: bool = False
    _cursor: int = 0
    _flushed_at: float = field(default_factory=time.monotonic)
    _saved_at: float = field(default_factory=time.monotonic)
    _held_at: float = 0.0

    async def run(self) -> BatchStatus:
        """Until the batch is over and all of it is written. Raises ``cannot_write``."""
        sidecar, files = self.sidecar, self.files
        whole = files.results.size >= sidecar.results_bytes and files.failures.size >= sidecar.failures_bytes
        self._cursor = sidecar.cursor if whole else 0
        self._write_bad_lines()
        try:
            status = await self._all()
            await self._write_missing(status)
        finally:
            await self._flush(save=True)
        return status

    async def _all(self) -> BatchStatus:
        """Take over every result that there is. Answers the batch, which is over."""
        while True:
            status = await self._follow()
            # Lines that were never fed have no result.
            if self._written >= min(status.done, status.fed):
                return status
            # A store that lost its last second counts lines again, in another order: look through all of them.
            self._cursor = 0
            while await self._take_page():
                await self._flush()
            now = await self.patience.ask(lambda: self.batches.status(self.sidecar.batch_id))
            if now.ended and now.done == status.done:
                return now

    @property
    def _written(self) -> int:
        return self.files.succeeded + self.files.failed - len(self.prepared.plan.bad)

    def _write_bad_lines(self) -> None:
        for bad in self.prepared.plan.bad:
            if not self.files.has(skipped_id(bad.number)):
                raw = b"" if bad.code == "too_large" else self.prepared.source.read(bad.offset, bad.size)
                self.files.add_failure(skipped_id(bad.number), failure_of_bad_line(bad, raw))

    async def _follow(self) -> BatchStatus:
        batch_id = self.sidecar.batch_id
        status = await self.patience.ask(lambda: self.batches.status(batch_id))
        while True:
            ended = status.ended
            while await self._take_page():
                await self._flush()
                if time.monotonic() - self._flushed_at >= FLUSH_S:
                    break
            else:
                if ended:
                    return status
                await self._flush()
                # A page for each line that ends would be one round trip for each.
                await asyncio.sleep(_LOOK_S)
            status = await self.patience.ask(lambda: self.batches.status(batch_id))
            if status.state == "uploading" and self.upload.done:
                await self.upload.run()  # the store came back without the end of the upload
            await self._show(status)

    async def _take_page(self) -> bool:
        """Take over the next results; False where there are none."""
        batch_id, offset = self.sidecar.batch_id, self._cursor
        results, self._cursor = await self.patience.ask(lambda: self.batches.results(batch_id, offset, _PAGE))
        for result in results:
            self._write(result)
        return bool(results)

    def _write(self, result: BatchResult) -> None:
        form = self.prepared.form
        error = error_of(result)
        if error is None and result.job is not None:
            self.files.add_result(result.id, answer_of(form, result, result.job))
        elif error is not None and not self.files.has(result.id):
            record = self.prepared.plan.record(self.prepared.source, result.index)
            is_json = form.name not in {"text", "csv"}
            self.files.add_failure(result.id, failure_of(result.id, error, result.job, record, is_json=is_json))

    async def _write_missing(self, status: BatchStatus) -> None:
        """Lines that never ran, because the batch was cancelled or expired, fail; so do those that the store lost."""
        prepared = self.prepared
        if self._written >= len(prepared.plan):
            return
        error = error_without_result(status.state)
        is_json = prepared.form.name not in {"text", "csv"}
        for index, line_id in ids_of(prepared.source, prepared.reader, prepared.plan):
            if not self.files.has(line_id):
                record = prepared.plan.record(prepared.source, index)
                self.files.add_failure(line_id, failure_of(line_id, error, None, record, is_json=is_json))
                if self.files.waiting >= FLUSH_LINES:
                    await self._flush()

    async def _show(self, status: BatchStatus) -> None:
        now = time.monotonic()
        if now - self._held_at >= _HELD_S:
            self._held_at = now
            self.view.held = await self.patience.ask(self.cooldowns)
        self.view.take(status)
        self.view.written = self._written
        self.display.show(self.view)
        if self.max_cost_usd is not None and status.cost_usd > self.max_cost_usd and not self.over_cost:
            self.over_cost = True
            if not status.ended:
                await self.patience.ask(lambda: self.batches.cancel(self.sidecar.batch_id))
                self.display.tell("over_cost", f"over --max-cost {self.max_cost_usd:g}: the batch is cancelled")

    async def _flush(self, *, save: bool = False) -> None:
        now = time.monotonic()
        if save or self.files.waiting >= FLUSH_LINES or (now - self._flushed_at >= FLUSH_S and self.files.waiting):
            await _in_thread(self.files.flush)
            self._flushed_at = now
        if (save or now - self._saved_at >= SAVE_S) and not self.files.waiting:
            self.sidecar.cursor = self._cursor
            self.sidecar.results_bytes = self.files.results.size
            self.sidecar.failures_bytes = self.files.failures.size
            await _in_thread(lambda: self.sidecar.save(self.sidecar_path))
            self._saved_at = now

    async def finish(self, *, ordered: bool) -> None:
        """Sort the results where that was asked for, and note that all is done."""
        if ordered:
            await _in_thread(lambda: sort_results(self.files, self.prepared))
            self.sidecar.ordered = True
        self.sidecar.stage = "complete"
        await _in_thread(lambda: self.sidecar.save(self.sidecar_path))


def sort_results(files: OutputFiles, prepared: Prepared) -> None:
    """Put the results in the order of the input. Raises ``cannot_write``."""
    ids = (line_id for _, line_id in ids_of(prepared.source, prepared.reader, prepared.plan))
    put_in_order(files.results, prepared.form.id_key, ids)


async def _in_thread(work: Callable[[], None]) -> None:
    """Write while the loop goes on; a writer that was begun is waited for, also by who is cancelled."""
    writing = asyncio.create_task(asyncio.to_thread(work))
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        await asyncio.wait({writing})
        writing.exception()  # what failed still waits to be written, and is told by the last flush
        raise
