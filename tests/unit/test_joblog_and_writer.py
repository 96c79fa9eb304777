"""The writer against a store that loses connections, replies and tails."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.exceptions import ConnectionError as RedisConnectionError

from promptmill import keys
from promptmill.contract import Progress, Timeouts, parse_request
from promptmill.store import START, Claimed, Store, Submission
from promptmill_workers.joblog import UNSENT_MAX_BYTES, JobLog
from promptmill_workers.writer import Writer
from tests.support.fake_store import FakeWire, fake_store

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=50), max_size=40)


def tokens(payloads: list[bytes]) -> str:
    """The text of token events, joined."""
    events = [orjson.loads(p) for p in payloads]
    return "".join(e["text"] for e in events if e["type"] == "token")


@given(TEXTS, st.integers(1, 5))
def test_pieces_merge_in_order_and_nothing_else_moves(texts: list[str], every: int) -> None:
    log = JobLog("j", "c", 7)
    for i, text in enumerate(texts):
        log.add_text(text)
        if i % every == 0:
            log.add_event(b'{"type":"progress","phase":"%d"}' % i)
    log.freeze()
    first, payloads = log.unsent()
    assert first == 2
    assert tokens(payloads) == "".join(texts)
    said, order = "", []
    for payload in payloads:
        event = orjson.loads(payload)
        if event["type"] == "token":
            said += event["text"]
        else:
            order.append((int(event["phase"]), said))
    assert order == [(i, "".join(texts[: i + 1])) for i in range(0, len(texts), every)]


@given(st.lists(st.tuples(TEXTS, st.integers(0, 3)), max_size=8))
def test_numbered_events_never_change(rounds: list[tuple[list[str], int]]) -> None:
    log = JobLog("j", "c", 7)
    seen: dict[int, bytes] = {}
    for texts, back in rounds:
        for text in texts:
            log.add_text(text)
        log.freeze()
        first, payloads = log.unsent()
        for n, payload in enumerate(payloads, first):
            assert seen.setdefault(n, payload) == payload
        if payloads:
            log.acknowledge(first + len(payloads) - 1)
        log.rewind(log.acked - back)
    assert sorted(seen) == list(range(2, 2 + len(seen)))


async def test_a_log_that_is_too_far_behind_has_no_room_until_the_store_took_enough() -> None:
    log = JobLog("j", "c", 7)
    log.add_text("x" * (UNSENT_MAX_BYTES + 1))
    assert log.full
    waiting = asyncio.create_task(log.wait_for_room())
    await asyncio.sleep(0)
    assert not waiting.done()
    log.freeze()
    log.acknowledge(log.last_n)
    await asyncio.wait_for(waiting, 60)
    assert not log.full


class BadWire(FakeWire):
    """Fails as told: before the store did anything, or after (the reply is lost)."""

    def __init__(self, good: FakeWire) -> None:
        super().__init__(good._raw)
        self.plan: list[str] = []

    async def many(self, commands: Sequence[Any], *, first: int = 0) -> list[Any]:
        fault = self.plan.pop(0) if self.plan else "ok"
        if fault == "before":
            raise RedisConnectionError("cut before")
        replies = await super().many(commands)
        if fault == "after":
            raise RedisConnectionError("cut after")
        return replies


async def claimed_log(store: Store, writer: Writer) -> JobLog:
    timeouts = Timeouts(queue_s=60, total_s=60)
    job = Submission(keys.new_job_id(), parse_request({"prompt": "x"}), "q", timeouts, 3, timedelta(hours=1))
    await store.submit([job])
    claimed = await store.claim(job.job_id, "c", "w", Progress(phase="started"))
    assert isinstance(claimed, Claimed)
    return writer.open(job.job_id, "c", claimed.epoch)


async def stored(store: Store, log: JobLog) -> list[bytes]:
    entries, _, _ = await store.read_log(log.job_id, START)
    ours = [(e, d) for e, d in entries if e.epoch == int(log.epoch)]
    assert [e.n for e, _ in ours] == list(range(1, len(ours) + 1))
    return [d for _, d in ours[1:]]


@pytest.mark.parametrize("plan", [["before"], ["after"], ["ok", "after", "before"], ["before"] * 3, ["after"] * 3])
async def test_lost_connections_and_lost_replies_neither_lose_nor_double(plan: list[str]) -> None:
    store = fake_store()
    wire = BadWire(store.wire)  # type: ignore[arg-type]
    writer = Writer(wire)  # type: ignore[arg-type]
    writer.start()
    log = await claimed_log(store, writer)
    wire.plan = list(plan)
    for i in range(20):
        log.add_text(f"{i} ")
        writer.mark(log)
        if i % 5 == 0:
            await asyncio.sleep(0.01)
    async with asyncio.timeout(60):
        await writer.settle(log)
    assert tokens(await stored(store, log)) == "".join(f"{i} " for i in range(20))
    await writer.aclose()
    await store.aclose()


async def test_a_store_that_lost_its_tail_gets_it_again() -> None:
    store = fake_store()
    wire = BadWire(store.wire)  # type: ignore[arg-type]
    writer = Writer(wire)  # type: ignore[arg-type]
    writer.start()
    log = await claimed_log(store, writer)
    for text in ("a", "b", "c"):
        log.add_text(text)
        writer.mark(log)
        await writer.settle(log)
    before = await stored(store, log)
    # As after a crash: the log ends earlier than what was acknowledged.
    entries, _, _ = await store.read_log(log.job_id, START)
    key = keys.log(log.job_id)
    await store.redis.delete(key)
    for event_id, data in entries[:-2]:
        await store.redis.xadd(key, {"e": data}, id=str(event_id))
    wire.plan = ["before"]
    log.add_text("d")
    writer.mark(log)
    async with asyncio.timeout(60):
        await writer.settle(log)
    after = await stored(store, log)
    assert tokens(after) == "abcd"
    assert after[: len(before)] == before
    await writer.aclose()
    await store.aclose()


async def test_a_tail_that_was_lost_while_nothing_waited_is_sent_again_before_the_end() -> None:
    store = fake_store()
    writer = Writer(store.wire)
    writer.start()
    log = await claimed_log(store, writer)
    for text in ("a", "b"):
        log.add_text(text)
        writer.mark(log)
        await writer.settle(log)
    entries, _, _ = await store.read_log(log.job_id, START)
    await store.redis.delete(keys.log(log.job_id))
    for event_id, data in entries[:-1]:
        await store.redis.xadd(keys.log(log.job_id), {"e": data}, id=str(event_id))
    writer.suspect()
    async with asyncio.timeout(60):
        await writer.settle(log)
    assert tokens(await stored(store, log)) == "ab"
    await writer.aclose()
    await store.aclose()


async def test_a_fenced_log_tells_who_writes_it_and_settles() -> None:
    store = fake_store()
    writer = Writer(store.wire)
    told: list[JobLog] = []
    writer.on_fenced = told.append
    writer.start()
    log = await claimed_log(store, writer)
    await store.cancel(log.job_id, "stop", "t")
    log.add_text("late")
    writer.mark(log)
    async with asyncio.timeout(60):
        await writer.settle(log)
    assert log.fenced
    assert told == [log]
    assert await stored(store, log) == []
    await writer.aclose()
    await store.aclose()


async def test_a_deleted_log_does_not_stop_its_job() -> None:
    store = fake_store()
    writer = Writer(store.wire)
    writer.start()
    log = await claimed_log(store, writer)
    await store.redis.delete(keys.log(log.job_id))
    log.add_text("x")
    writer.mark(log)
    async with asyncio.timeout(60):
        await writer.settle(log)
    assert log.lost
    assert not log.fenced
    await writer.aclose()
    await store.aclose()
