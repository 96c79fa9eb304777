"""A server of batches that is none: at each question a few lines end, and on cue goes wrong what may at a real one."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from promptmill.batch.models import BatchHead, BatchLine, BatchResult, BatchStatus
from promptmill.contract import ErrorInfo, Job, JobRequest, Usage, parse_request
from promptmill.errors import BadRequest, NotFound

AT = datetime(2026, 1, 2, tzinfo=UTC)
COST_USD = 0.001


@dataclass
class FakeBatch:
    """One batch. ``runs`` counts how often each line's job really ran."""

    head: BatchHead
    lines: list[BatchLine] = field(default_factory=list[BatchLine])
    total: int | None = None
    fed: int = 0
    ended: list[int] = field(default_factory=list[int])
    runs: Counter[str] = field(default_factory=Counter[str])
    state: str = "uploading"
    ran: set[int] = field(default_factory=set[int])


class FakeBatches:
    """Has the methods of :class:`promptmill.batch.BatchClient` that commands use.

    ``step`` is called before and after each act; what it raises is what the caller sees. A line whose prompt contains
    ``refuse`` fails. ``known_models``: others are refused; None: all are known.
    """

    def __init__(self, seed: int = 0, at_once: int = 7) -> None:
        self.batches: dict[str, FakeBatch] = {}
        self.step: Callable[[], None] = lambda: None
        self.known_models: set[str] | None = None
        self.calls: Counter[str] = Counter()
        self.at_once = at_once
        self._random = random.Random(seed)

    @property
    def only(self) -> FakeBatch:
        """The one batch that there is."""
        (batch,) = self.batches.values()
        return batch

    async def check(self, requests: Sequence[JobRequest]) -> None:
        self._act("check")
        for request in requests:
            if self.known_models is not None and request.model not in self.known_models:
                raise BadRequest(f"there is no model {request.model!r}", code="unknown_model", field="model")

    async def create(self, batch_id: str, head: BatchHead) -> None:
        self._act("create")
        known = self.batches.setdefault(batch_id, FakeBatch(head))
        assert known.head == head
        self.step()

    async def add(self, batch_id: str, chunk: int, lines: Sequence[BatchLine]) -> None:
        self._act("add")
        batch, first = self._batch(batch_id), chunk * self._batch(batch_id).head.chunk_lines
        if first > len(batch.lines):
            raise BadRequest("the chunk is not the next one", field="chunk")
        if batch.state != "uploading" and first + len(lines) > len(batch.lines):
            raise BadRequest(f"it is {batch.state}", field="state")
        for place, line in enumerate(lines, first):
            if place < len(batch.lines):
                assert batch.lines[place] == line
            else:
                parse_request(line.request)
                batch.lines.append(line)
        self._advance(batch)
        self.step()

    async def seal(self, batch_id: str, total: int) -> None:
        self._act("seal")
        batch = self._batch(batch_id)
        if total != len(batch.lines):
            raise BadRequest("it has another number of lines", field="total")
        if batch.state == "uploading":
            batch.state, batch.total = "running", total
        self.step()

    async def status(self, batch_id: str) -> BatchStatus:
        self._act("status")
        batch = self._batch(batch_id)
        self._advance(batch)
        return self._status(batch_id, batch)

    async def wait_change(self, batch_id: str, known: BatchStatus | None, timeout_s: float | None) -> BatchStatus:
        return await self.status(batch_id)

    async def results(self, batch_id: str, offset: int, count: int = 200) -> tuple[list[BatchResult], int]:
        self._act("results")
        batch = self._batch(batch_id)
        found = [self._result(batch, index) for index in batch.ended[offset : offset + min(count, 5)]]
        return found, offset + len(found)

    async def cancel(self, batch_id: str) -> BatchStatus:
        self._act("cancel")
        batch = self._batch(batch_id)
        batch.state, batch.total = "cancelled", len(batch.lines)
        return self._status(batch_id, batch)

    def lose(self, ended: int, lines: int) -> None:
        """The store came back without the last that it was told: jobs' records stay, counts are made anew."""
        for batch in self.batches.values():
            if batch.state == "cancelled":
                continue
            del batch.ended[max(0, len(batch.ended) - ended) :]
            if lines and batch.total is not None:
                batch.state, batch.total = "uploading", None
                del batch.lines[max(0, len(batch.lines) - lines) :]
                batch.ended = [index for index in batch.ended if index < len(batch.lines)]
                batch.fed = min(batch.fed, len(batch.lines))

    def _act(self, name: str) -> None:
        self.calls[name] += 1
        self.step()

    def _batch(self, batch_id: str) -> FakeBatch:
        if batch_id not in self.batches:
            raise NotFound(f"there is no batch {batch_id}", field="id")
        return self.batches[batch_id]

    def _advance(self, batch: FakeBatch) -> None:
        if batch.state not in {"uploading", "running"}:
            return
        waiting = sorted(set(range(len(batch.lines))) - set(batch.ended))
        chosen = self._random.sample(waiting, min(len(waiting), self.at_once))
        batch.fed = max([batch.fed, *(index + 1 for index in chosen)])
        for index in chosen:
            line = batch.lines[index]
            if line.same is None and index not in batch.ran:
                batch.runs[line.id] += 1
                batch.ran.add(index)
            batch.ended.append(index)
        if batch.total is not None and len(batch.ended) == batch.total:
            batch.state = "completed"

    def _job(self, batch: FakeBatch, index: int) -> Job:
        line = batch.lines[index]
        text = str(line.request["messages"][0]["content"])
        fields: dict[str, Any] = {"id": f"job-{index}", "user": batch.head.user, "created_at": AT, "model": "m"}
        if "refuse" in text:
            return Job(**fields, state="failed", error=ErrorInfo(code="refused", message="no"))
        usage = Usage(input_tokens=3, output_tokens=2)
        return Job(**fields, state="succeeded", text=f"re: {text}", usage=usage, cost_usd=COST_USD)

    def _result(self, batch: FakeBatch, index: int) -> BatchResult:
        line = batch.lines[index]
        return BatchResult(index, line.id, self._job(batch, index if line.same is None else line.same), line.same)

    def _status(self, batch_id: str, batch: FakeBatch) -> BatchStatus:
        jobs = [self._result(batch, index).job for index in batch.ended]
        failed = sum(job is not None and job.state == "failed" for job in jobs)
        total = len(batch.lines)
        return BatchStatus.model_validate(
            {
                "id": batch_id,
                "state": batch.state,
                "user": batch.head.user,
                "total": batch.total,
                "chunk_lines": batch.head.chunk_lines,
                "uploaded_chunks": -(-total // batch.head.chunk_lines),
                "uploaded_lines": total,
                "fed": batch.fed,
                "succeeded": len(jobs) - failed,
                "failed": failed,
                "cancelled": total - len(jobs) if batch.state == "cancelled" else 0,
                "usage": Usage(input_tokens=3 * len(jobs), output_tokens=2 * len(jobs)),
                "cost_usd": COST_USD * (len(jobs) - failed),
                "failures": {"refused": failed} if failed else {},
                "models": {"m": len(jobs)},
                "created_at": AT,
                "options": batch.head.options,
            }
        )
