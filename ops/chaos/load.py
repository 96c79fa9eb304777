"""Submitting, cancelling and following the jobs of a run, whatever fails meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

import orjson
from ops.chaos.ledger import Ledger, essence, now_ms
from ops.chaos.plan import ROLES, PlannedJob, Reading
from ops.chaos.readers import Reader
from ops.chaos.system import System
from tests.support.web import request

from promptmill import AsyncJob, AsyncProducer
from promptmill.contract import END_TYPES
from promptmill.enqueue import Enqueuer
from promptmill.errors import PromptmillError, StoreUnavailable
from promptmill.store import START, EventId

_AGAIN_S: Final = 0.1
_LOOK_S: Final = 0.5
_COPIES: Final = {"sent": 1, "lost": 0, "doubled": 2}
T = TypeVar("T")


class Unanswered(Exception):
    """The gateway did not answer, or said that it could not: ask again."""


async def patiently(act: Callable[[], Awaitable[T]]) -> tuple[T, int]:
    """Repeat an idempotent act until it is answered; answers how often it was asked too."""
    tries = 1
    while True:
        try:
            return await act(), tries
        except (StoreUnavailable, Unanswered, OSError, EOFError):
            tries += 1
            await asyncio.sleep(_AGAIN_S)


class FaultyEnqueuer(Enqueuer):
    """Sends each message as often as told: not at all is what a broker does that loses it."""

    def __init__(self, broker_url: str, copies: int) -> None:
        super().__init__(broker_url)
        self._copies = copies

    async def send(self, messages: Sequence[tuple[str, str]]) -> int:
        """As a broker that took them all."""
        await super().send([m for m in messages for _ in range(self._copies)])
        return len(messages)


Producers = dict[str, AsyncProducer]
"""By what becomes of their messages; see :attr:`ops.chaos.plan.PlannedJob.message`."""


@asynccontextmanager
async def producers(system: System) -> AsyncGenerator[Producers]:
    """Producers of this process; they close with the block."""
    made = {fate: AsyncProducer(system.settings) for fate in _COPIES}
    for fate, copies in _COPIES.items():
        # The only place where a message can be lost on its way and nobody is told.
        made[fate]._enqueuer = FaultyEnqueuer(  # pyright: ignore[reportPrivateUsage]
            system.settings.queue_url, copies
        )
    try:
        yield made
    finally:
        for producer in made.values():
            await producer.aclose()


class Load:
    """All jobs of a run."""

    def __init__(self, system: System, producers: Producers, ledger: Ledger) -> None:
        self._system = system
        self._producers = producers
        self._ledger = ledger
        self.submitted: list[str] = []
        self.open: set[str] = set()
        """Jobs that have not ended yet, as far as this process knows."""

    async def run(self, jobs: Sequence[PlannedJob]) -> None:
        """Submit each at its time, and follow it to its end. Jobs that do not end in time stay in ``open``."""
        begin = asyncio.get_running_loop().time()
        async with asyncio.TaskGroup() as group:
            for job in jobs:
                group.create_task(self._one(job, begin))

    async def _one(self, job: PlannedJob, begin: float) -> None:
        options = self._system.options
        await asyncio.sleep(begin + job.at_s - asyncio.get_running_loop().time())
        try:
            async with asyncio.timeout_at(begin + options.seconds + options.settle_s):
                await self._live(job)
        except TimeoutError:
            # That it has no end, or a reader none, is what the ledger says then: the checks name it.
            return

    async def _live(self, job: PlannedJob) -> None:
        submit = self._by_gateway if job.via == "gateway" else self._by_library
        job_id, tries = await patiently(lambda: submit(job))
        facts = {"key": job.key, "prompt": job.prompt, "asked": job.asked, "via": job.via, "message": job.message}
        self._ledger.write("submitted", job=job_id, tries=tries, **facts)
        self.submitted.append(job_id)
        self.open.add(job_id)
        async with asyncio.TaskGroup() as group:
            for n, reading in enumerate(job.readings):
                group.create_task(self.reader(f"{job.number}.{n}", job_id, reading).run())
            if job.cancel_after_s is not None:
                group.create_task(self._cancel(job, job_id, job.cancel_after_s))
            group.create_task(self._keep_log(job_id))

    def reader(self, name: str, job_id: str, reading: Reading) -> Reader:
        """A reader of a job, not yet running."""
        producer = self._producers["sent"]
        return Reader(name, job_id, reading, ledger=self._ledger, producer=producer, ports=self._system.ports)

    # -- what is asked of the system ------------------------------------------------------------------------------

    async def _by_library(self, job: PlannedJob) -> str:
        submitted = await self._producers[job.message].submit(**_request(job))
        return submitted.id

    async def _by_gateway(self, job: PlannedJob) -> str:
        return (await self._post("/v1/jobs", _request(job), 202))["id"]

    async def _cancel(self, job: PlannedJob, job_id: str, after_s: float) -> None:
        await asyncio.sleep(after_s)
        asked_ms = 0

        async def cancel() -> str:
            nonlocal asked_ms
            asked_ms = now_ms()
            if job.via == "gateway":
                return (await self._post(f"/v1/jobs/{job_id}/cancel", {}, 200))["state"]
            return (await AsyncJob(self._producers["sent"], job_id).cancel()).state

        state, tries = await patiently(cancel)
        self._ledger.write("cancelled", job=job_id, asked_ms=asked_ms, state=state, tries=tries)

    async def _post(self, path: str, body: dict[str, Any], expected: int) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        port = self._system.ports["gateway"]
        async with request(port, path, method="POST", body=orjson.dumps(body), headers=headers) as answer:
            found = await answer.body()
            if answer.status == 503:
                raise Unanswered(found)
            if answer.status != expected:
                raise PromptmillError(f"POST {path} was answered with {answer.status}: {found[:300]!r}", code="cut")
            return orjson.loads(found)

    # -- what the store says --------------------------------------------------------------------------------------

    async def _keep_log(self, job_id: str) -> None:
        """Copy the job's log once it has ended, before the store deletes it."""
        store = self._system.direct
        while True:
            record, _ = await patiently(lambda: store.find(job_id))
            if record is None or record.ended:
                break
            await asyncio.sleep(_LOOK_S)
        events: list[tuple[EventId, bytes]] = []
        more = True
        while more:
            last = events[-1][0] if events else START
            (page, _, more), _ = await patiently(lambda last=last: store.read_log(job_id, last))
            events += page
        rows = [(str(event_id), orjson.loads(data)) for event_id, data in events]
        self._ledger.write("log", job=job_id, events=[(name, essence(event)) for name, event in rows])
        if any(event["type"] in END_TYPES for _, event in rows):
            self.open.discard(job_id)


def _request(job: PlannedJob) -> dict[str, Any]:
    name = "role" if job.asked in ROLES else "model"
    return {"prompt": job.prompt, name: job.asked, "priority": job.priority, "idempotency_key": job.key}
