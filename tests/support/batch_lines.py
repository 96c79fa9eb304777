"""Batches in a real store for tests: lines, a worker that needs no process, and readers of all that ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import orjson

from promptmill import keys
from promptmill.batch import BatchClient, BatchHead, BatchLine, BatchResult
from promptmill.batch.ends import ended_line
from promptmill.batch.feeder import Feeder
from promptmill.batch.store import count
from promptmill.client.routes import Routes
from promptmill.contract import Done, Progress, parse_request
from promptmill.queues import API_FAMILY, queue_for
from promptmill.settings import Settings
from promptmill.store import Claimed, Store

QUEUE = queue_for("batch", API_FAMILY)
USAGE = {"input_tokens": 3, "output_tokens": 5}


def line(index: int, *, same: int | None = None, **fields: Any) -> BatchLine:
    """A line called ``line-<index>`` that asks ``say <index>``, or what an earlier one asks."""
    asked = {"prompt": f"say {index if same is None else same}", "model": "echo", **fields}
    return BatchLine(f"line-{index}", orjson.loads(parse_request(asked).to_json()), same)


def client_of(store: Store, settings: Settings | None = None) -> BatchClient:
    """A client on a store that is there already."""

    async def there() -> Store:
        return store

    settings = settings or Settings()
    return BatchClient(there, settings, Routes(settings))


async def made(batches: BatchClient, lines: Sequence[BatchLine], *, seal: bool = True, **head: Any) -> str:
    """A batch with some lines."""
    batch_id = keys.new_job_id()
    about = BatchHead(**head)
    await batches.create(batch_id, about)
    for start in range(0, len(lines), about.chunk_lines):
        await batches.add(batch_id, start // about.chunk_lines, lines[start : start + about.chunk_lines])
    if seal:
        await batches.seal(batch_id, len(lines))
    return batch_id


async def all_results(batches: BatchClient, batch_id: str, page: int = 200) -> list[BatchResult]:
    """Everything that ended so far."""
    found: list[BatchResult] = []
    offset = 0
    while True:
        part, offset = await batches.results(batch_id, offset, page)
        if not part:
            return found
        found += part


class FakeWorker:
    """Takes ready jobs, one after the other, and ends them at once. Counts how often each was run."""

    def __init__(self, store: Store, queue: str = QUEUE, *, hints: bool = True) -> None:
        self._store = store
        self._queue = queue
        self._hints = hints
        self.ran: Counter[str] = Counter()
        self.fail: Callable[[str], bool] = lambda _: False
        """Whether a prompt's job fails, as ``cut``."""

    async def pop(self) -> str | None:
        """The next job's id, as a worker takes it."""
        raw: bytes | None = await self._store.redis.lpop(keys.ready(self._queue))
        return raw.decode() if raw else None

    async def claim(self, job_id: str) -> Claimed | None:
        """The claim of a job, if it can be had."""
        token = f"claim-{job_id}"
        claimed = await self._store.claim(job_id, token, "fake-worker", Progress(phase="started"))
        return None if isinstance(claimed, str) else claimed

    async def end(self, job_id: str, claimed: Claimed) -> None:
        """Finish a job that was claimed, and tell that it ended."""
        request = orjson.loads(claimed.request)
        prompt: str = request["messages"][0]["content"]
        self.ran[prompt] += 1
        attempt = {"attempt": 1, "outcome": "succeeded", "claim": f"claim-{job_id}"[:8]}
        tries = [{**attempt, "usage": USAGE, "cost_usd": 0.001}]
        state, end = "succeeded", {"text": prompt.upper(), "model": "echo", "usage": USAGE, "cost_usd": 0.001}
        event = Done(text=prompt.upper()).to_json()
        if self.fail(prompt):
            error = {"code": "cut", "message": "the answer ended without its end", "retryable": True}
            state, end = "failed", {"error": error, "model": "echo"}
            event = orjson.dumps({"type": "error", **error})
        assert await self._store.finish(job_id, f"claim-{job_id}", state, event, end, tries)
        self._store.forget_claim(job_id, "fake-worker")
        batch = claimed.record.batch
        if self._hints and batch is not None:
            await count(self._store, batch[0], [ended_line(batch[1], state, end, tries)])

    async def drain(self) -> int:
        """Run everything that is ready; answers how many jobs."""
        done = 0
        while (job_id := await self.pop()) is not None:
            claimed = await self.claim(job_id)
            if claimed is not None:
                await self.end(job_id, claimed)
                done += 1
        return done


async def feed_once(*feeders: Feeder) -> None:
    """Let each feeder do all that it can do now."""
    for feeder in feeders:
        while await feeder.round() == 0.0:
            pass


async def run_to_end(batches: BatchClient, batch_id: str, feeder: Feeder, worker: FakeWorker) -> None:
    """Feed and work until the batch has ended."""
    for _ in range(10_000):
        await feed_once(feeder)
        await worker.drain()
        if (await batches.status(batch_id)).ended:
            return
    raise AssertionError(f"it does not end: {await batches.status(batch_id)}")
