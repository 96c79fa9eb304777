"""Each act on a job, its reply lost on the network, or repeated after others went on: done once, undone by none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import orjson
import pytest

from promptmill import keys
from promptmill.contract import Progress, Timeouts, Token, parse_request
from promptmill.errors import StoreUnavailable
from promptmill.store import START, Store, Submission
from promptmill.store.scripts import APPEND
from promptmill.watch import MAX_CRASHES
from tests.support.cutting import cutting_proxy
from tests.support.processes import wait_until

TRY = {"attempt": 1, "claim": "claim-1", "outcome": "succeeded"}
Act = Callable[["Life"], Awaitable[Any]]


@dataclass
class Life:
    """One job and those who act on it, each always with the same token."""

    store: Store
    job_id: str
    queue_s: float = 60
    epochs: dict[int, int] = field(default_factory=dict)

    async def submit(self) -> bool:
        request = parse_request({"prompt": "hi", "user": "u"})
        timeouts = Timeouts(queue_s=self.queue_s, total_s=60)
        job = Submission(self.job_id, request, "promptmill.api", timeouts, 3, timedelta(hours=1))
        return (await self.store.submit([job]))[0]

    async def _claim(self, number: int) -> str:
        got = await self.store.claim(self.job_id, f"claim-{number}", f"w{number}", Progress(phase="started"))
        if isinstance(got, str):
            return got
        self.epochs[number] = got.epoch
        return "claimed"

    async def claim(self) -> str:
        return await self._claim(1)

    async def claim_elsewhere(self) -> str:
        return await self._claim(2)

    async def _append(self, claim: int) -> int:
        events = [Token(text=f"{claim}{n} ").to_json() for n in range(3)]
        epoch = self.epochs.get(claim, 1)
        return await self.store.run(APPEND, self.job_id, f"claim-{claim}", epoch, 2, *events)

    async def append(self) -> int:
        return await self._append(1)

    async def append_elsewhere(self) -> int:
        return await self._append(2)

    async def _finish(self, claim: int) -> bool:
        done = orjson.dumps({"type": "done", "text": "x"})
        tries = [TRY | {"claim": f"claim-{claim}"}]
        return await self.store.finish(self.job_id, f"claim-{claim}", "succeeded", done, {"text": "x"}, tries)

    async def finish(self) -> bool:
        return await self._finish(1)

    async def finish_elsewhere(self) -> bool:
        return await self._finish(2)

    async def cancel(self) -> bool:
        return await self.store.cancel(self.job_id, "enough", "cancel-1")

    async def cancel_elsewhere(self) -> bool:
        return await self.store.cancel(self.job_id, "too much", "cancel-2")

    async def expire(self) -> bool:
        return await self.store.expire(self.job_id, "expire-1")

    async def settle(self) -> str:
        return await self.store.requeue(self.job_id, dead_worker="w1", max_crashes=MAX_CRASHES, token="settle-1")

    async def settle_elsewhere(self) -> str:
        return await self.store.requeue(self.job_id, dead_worker="w2", max_crashes=MAX_CRASHES, token="settle-2")

    async def hand_back(self) -> str:
        return await self.store.requeue(self.job_id, claim="claim-1", max_crashes=MAX_CRASHES, token="back-1")

    async def put_off(self) -> str:
        return await self.store.requeue(
            self.job_id,
            claim="claim-1",
            max_crashes=MAX_CRASHES,
            token="off-1",
            tries=[TRY],
            wait_ms=1,
            phase="waiting",
        )

    async def hand_on(self) -> str:
        return await self.store.requeue(
            self.job_id, claim="claim-1", max_crashes=MAX_CRASHES, token="on-1", queue="promptmill.b", chain=["m"]
        )

    async def snapshot(self) -> dict[str, Any]:
        """All that the store keeps of the job, times to live aside."""
        await self.store.ask([("PING",)])  # behind what was told
        entries, _, _ = await self.store.read_log(self.job_id, START)
        return {"record": await self.store.redis.hgetall(keys.record(self.job_id)), "log": entries}


@pytest.fixture
async def life(store: Store) -> AsyncGenerator[Life]:
    job = Life(store, keys.new_job_id())
    yield job
    await store.redis.delete(keys.record(job.job_id), keys.log(job.job_id))
    await store.redis.zrem(keys.OUTBOX, job.job_id)
    await store.redis.zrem(keys.UNBOOKED, job.job_id)


BEFORE: dict[Act, list[Act]] = {
    Life.submit: [],
    Life.claim: [Life.submit],
    Life.append: [Life.submit, Life.claim],
    Life.finish: [Life.submit, Life.claim, Life.append],
    Life.cancel: [Life.submit, Life.claim, Life.append],
    Life.expire: [Life.submit],
    Life.settle: [Life.submit, Life.claim, Life.append],
    Life.hand_back: [Life.submit, Life.claim, Life.append],
    Life.put_off: [Life.submit, Life.claim, Life.append],
    Life.hand_on: [Life.submit, Life.claim, Life.append],
}
"""What must have happened before each act has its effect."""
ELSEWHERE = [Life.claim_elsewhere, Life.append_elsewhere]
OTHERS: dict[Act, list[list[Act]]] = {
    Life.submit: [[Life.claim], [Life.claim, Life.finish], [Life.claim, Life.settle], [Life.cancel]],
    Life.claim: [
        [Life.append],
        [Life.finish],
        [Life.cancel],
        [Life.settle, *ELSEWHERE],
        [Life.settle, *ELSEWHERE, Life.finish_elsewhere],
        [Life.hand_back, *ELSEWHERE],
        [Life.settle, Life.cancel],
    ],
    Life.append: [
        [Life.finish],
        [Life.cancel],
        [Life.settle],
        [Life.hand_back],
        [Life.settle, *ELSEWHERE],
        [Life.settle, *ELSEWHERE, Life.finish_elsewhere],
    ],
    Life.finish: [[Life.cancel], [Life.settle], [Life.append], [Life.claim_elsewhere]],
    Life.cancel: [[Life.finish], [Life.cancel_elsewhere], [Life.settle], [Life.claim_elsewhere], [Life.append]],
    Life.expire: [[Life.claim_elsewhere], [Life.cancel_elsewhere], [Life.settle]],
    **{
        requeue: [
            [Life.cancel],
            ELSEWHERE,
            [*ELSEWHERE, Life.finish_elsewhere],
            [*ELSEWHERE, Life.settle_elsewhere],
            [*ELSEWHERE, Life.cancel],
            [Life.append],
            [Life.finish],
        ]
        for requeue in (Life.settle, Life.hand_back, Life.put_off, Life.hand_on)
    },
}
"""What others may do after it, before its repetition arrives."""


def named(acts: list[Act]) -> str:
    return "+".join(act.__name__ for act in acts)


LATE = [
    pytest.param(act, others, id=f"{act.__name__}-after-{named(others)}")
    for act, sequences in OTHERS.items()
    for others in sequences
]


async def lead_up_to(life: Life, act: Act) -> None:
    if act is Life.expire:
        life.queue_s = 0.001
    for step in BEFORE[act]:
        await step(life)
    if act is Life.expire:
        await wait_until(lambda: overdue(life), "the job is past its time in the queue")


async def overdue(life: Life) -> bool:
    record = await life.store.find(life.job_id)
    seconds, micros = await life.store.redis.time()
    return record is not None and seconds * 1000 + micros // 1000 > record.st["deadline"]


@pytest.mark.parametrize(("act", "others"), LATE)
async def test_a_late_repetition_changes_nothing_that_others_did_since(life: Life, act: Act, others: list[Act]) -> None:
    await lead_up_to(life, act)
    await act(life)
    for other in others:
        await other(life)
    before = await life.snapshot()
    await act(life)
    assert await life.snapshot() == before


@pytest.mark.parametrize("act", [act for act in BEFORE if act is not Life.submit])
async def test_an_act_that_comes_for_the_first_time_after_the_end_changes_nothing(life: Life, act: Act) -> None:
    for step in (Life.submit, Life.claim_elsewhere, Life.append_elsewhere, Life.finish_elsewhere):
        await step(life)
    before = await life.snapshot()
    assert await act(life) in {False, "not_queued", "not_running", -1}
    assert await life.snapshot() == before


ANSWERS: dict[Act, Any] = {
    Life.submit: True,
    Life.claim: "claimed",
    Life.append: 0,
    Life.finish: True,
    Life.cancel: True,
    Life.expire: True,
    Life.settle: "queued",
    Life.hand_back: "queued",
    Life.put_off: "queued",
    Life.hand_on: "queued",
}


@pytest.mark.parametrize("act", list(BEFORE))
async def test_an_act_whose_reply_was_lost_is_done_once_and_answered_as_if_it_had_come(
    life: Life, redis_url: str, act: Act
) -> None:
    await lead_up_to(life, act)
    async with cutting_proxy(redis_url) as proxy, AsyncExitStack() as stack:
        store = await Store.connect(proxy.url)
        stack.push_async_callback(store.aclose)
        await store.load_scripts()
        await store.wire.connected()
        far = Life(store, life.job_id, life.queue_s, life.epochs)
        proxy.deafen()
        doing = asyncio.create_task(act(far))
        await wait_until(lambda: proxy.dropped_bytes > 0, "the reply is on its way")
        proxy.reset()
        with pytest.raises(StoreUnavailable):
            await doing
        proxy.mend()
        after = await life.snapshot()
        assert after["record"], "it was done all the same"
        again = await act(far)
        assert await life.snapshot() == after
    assert (type(again), again) == (type(ANSWERS[act]), ANSWERS[act])


async def test_a_claim_that_arrives_after_its_worker_was_given_up_is_an_attempt_of_its_own(life: Life) -> None:
    for step in (Life.submit, Life.claim, Life.append, Life.settle):
        await step(life)
    assert await life.claim() == "claimed"
    assert (await life.store.get(life.job_id)).attempt == 2
    texts = [data for _, data in (await life.snapshot())["log"]]
    assert b'"restart"' in texts[-2], "what the first attempt said is void"
    assert await life.finish()
    entries = (await life.snapshot())["log"]
    epochs = [event_id.epoch for event_id, _ in entries]
    assert epochs == sorted(epochs)
