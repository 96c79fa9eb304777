"""Readers against a real store: late, resumed, cut off, slow, and after the log was deleted."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from datetime import timedelta
from itertools import pairwise

import orjson
import pytest

from promptmill import keys
from promptmill.contract import Progress, Timeouts, parse_request
from promptmill.errors import BadRequest, NotFound
from promptmill.reading import Frame, Hub, Reader
from promptmill.reading.shards import One
from promptmill.store import Claimed, EventId, Store, Submission
from promptmill.store.scripts import APPEND
from tests.support.processes import PATIENCE_S, wait_until
from tests.support.store import cut_subscribers
from tests.support.streams import text_of_frames


@pytest.fixture
async def hub(store: Store) -> AsyncGenerator[Hub]:
    made = Hub(store, keepalive_s=5)
    await made.start()
    yield made
    await made.aclose()


class Job:
    """A job whose worker is the test."""

    def __init__(self, store: Store, job_id: str, epoch: int) -> None:
        self.store, self.id, self.epoch = store, job_id, epoch
        self.n = 1
        self.text = ""

    @classmethod
    async def start(cls, store: Store) -> Job:
        job = Submission(
            keys.new_job_id(),
            parse_request({"prompt": "hi"}),
            "promptmill.api",
            Timeouts(queue_s=60, total_s=60),
            3,
            timedelta(hours=1),
        )
        await store.submit([job])
        claimed = await store.claim(job.job_id, "c", "w", Progress(phase="started"))
        assert isinstance(claimed, Claimed)
        return cls(store, job.job_id, claimed.epoch)

    async def say(self, *texts: str) -> int:
        events = [orjson.dumps({"type": "token", "text": t}) for t in texts]
        receivers = await self.store.run(APPEND, self.id, "c", self.epoch, self.n + 1, *events)
        self.n += len(texts)
        self.text += "".join(texts)
        return receivers

    async def finish(self) -> None:
        done = orjson.dumps({"type": "done", "text": self.text})
        assert await self.store.finish(self.id, "c", "succeeded", done, {"text": self.text}, [])


async def read_all(reader: Reader) -> list[Frame]:
    async with asyncio.timeout(PATIENCE_S):
        return [frame async for batch in reader for frame in batch]


def check_order(frames: list[Frame]) -> None:
    ids = [EventId.read(f.id) for f in frames if f.id is not None]
    assert ids == sorted(set(ids))
    for a, b in pairwise(ids):
        assert b.n == 1 or (b.epoch == a.epoch and b.n == a.n + 1), f"gap between {a} and {b}"
    assert [f.ends for f in frames] == [False] * (len(frames) - 1) + [True]


async def test_a_reader_before_during_and_after_the_job_gets_the_same_events(store: Store, hub: Hub) -> None:
    job = await Job.start(store)
    early = asyncio.create_task(read_all(await hub.open(job.id)))
    await job.say("a", "b")
    middle = asyncio.create_task(read_all(await hub.open(job.id)))
    await job.say("c")
    await job.finish()
    late = await read_all(await hub.open(job.id))
    check_order(late)
    assert await early == late == await middle
    assert text_of_frames(late) == "abc"


async def test_every_resume_point_gets_exactly_the_rest(store: Store, hub: Hub) -> None:
    job = await Job.start(store)
    await job.say(*"abcdef")
    await job.finish()
    whole = await read_all(await hub.open(job.id))
    for i, frame in enumerate(whole[:-1]):
        assert frame.id is not None
        assert await read_all(await hub.open(job.id, frame.id.decode())) == whole[i + 1 :]
    end = whole[-1].id
    assert end is not None
    assert (await hub.open(job.id, end.decode())).finished
    assert await read_all(await hub.open(job.id, end.decode())) == []


@pytest.mark.parametrize("after", ["x", "1", "1-", "-1", "1-2-3", "1-x", "99999999999999999999999-1", "1 -1"])
async def test_a_malformed_resume_id_is_refused(store: Store, hub: Hub, after: str) -> None:
    job = await Job.start(store)
    with pytest.raises(BadRequest):
        await hub.open(job.id, after)


async def test_an_id_from_the_future_still_gets_an_end(store: Store, hub: Hub) -> None:
    job = await Job.start(store)
    reading = asyncio.create_task(read_all(await hub.open(job.id, "9999999999999-1")))
    await wait_until(lambda: hub.readers == 1, "the reader is subscribed")
    await wait_until(lambda: _subscribers(store, job.id), "the store knows it")
    await job.say("a")
    await job.finish()
    assert await reading == []


async def _subscribers(store: Store, job_id: str) -> bool:
    return (await store.listeners([job_id]))[0] > 0


async def test_an_unknown_job_is_refused(hub: Hub) -> None:
    with pytest.raises(NotFound):
        await hub.open(keys.new_job_id())
    with pytest.raises(BadRequest):
        await hub.open("*")


async def test_a_large_event_arrives_whole(store: Store, hub: Hub) -> None:
    job = await Job.start(store)
    reading = asyncio.create_task(read_all(await hub.open(job.id)))
    await wait_until(lambda: _subscribers(store, job.id), "the reader is subscribed")
    await job.say("x" * 20_000, "y")
    await job.finish()
    assert text_of_frames(await reading) == "x" * 20_000 + "y"


async def test_a_cut_pubsub_connection_loses_nothing(store: Store, hub: Hub) -> None:
    job = await Job.start(store)
    reading = asyncio.create_task(read_all(await hub.open(job.id)))
    for i in range(30):
        if i % 10 == 5:
            await wait_until(lambda: _subscribers(store, job.id), "the reader is subscribed")
            await cut_subscribers(store)
        await job.say(f"{i} ")
    await job.finish()
    frames = await reading
    check_order(frames)
    assert text_of_frames(frames) == job.text


async def test_a_reader_that_is_not_read_is_bounded_and_misses_nothing(store: Store, hub: Hub) -> None:
    job = await Job.start(store)
    reader = await hub.open(job.id)
    frames = await anext(reader)
    await wait_until(lambda: _subscribers(store, job.id), "the reader is subscribed")
    for _ in range(30):
        await job.say(*["word "] * 100)
    await store.wire.call("PING")
    assert len(reader._queue) <= 512
    await job.finish()
    async for batch in reader:
        frames += batch
    check_order(frames)
    assert text_of_frames(frames) == job.text


async def test_after_the_log_is_deleted_the_text_comes_whole(store: Store, hub: Hub) -> None:
    job = await Job.start(store)
    await job.say("a", "b")
    await job.finish()
    whole = await read_all(await hub.open(job.id))
    await store.redis.delete(keys.log(job.id))
    late = await read_all(await hub.open(job.id))
    assert [f.type for f in late] == [b"token", b"done"]
    assert text_of_frames(late) == "ab"
    assert late[-1].id == whole[-1].id
    middle = whole[-3].id
    assert middle is not None
    resumed = await read_all(await hub.open(job.id, middle.decode()))
    assert [f.type for f in resumed] == [b"restart", b"token", b"done"]
    assert text_of_frames(resumed) == "ab"
    token_id = late[0].id
    assert token_id is not None
    assert [f.type for f in await read_all(await hub.open(job.id, token_id.decode()))] == [b"done"]
    last = whole[-2].id
    assert last is not None
    assert [f.type for f in await read_all(await hub.open(job.id, last.decode()))] == [b"done"]


async def test_the_log_lives_a_minute_after_the_end(store: Store) -> None:
    job = await Job.start(store)
    await job.finish()
    assert 50_000 < await store.redis.pttl(keys.log(job.id)) <= 60_000
    assert await store.redis.pttl(keys.record(job.id)) > 3_000_000


async def test_a_silent_job_is_kept_alive(store: Store) -> None:
    quick = Hub(store, keepalive_s=0.1)
    job = await Job.start(store)
    reader = await quick.open(job.id)
    # Until the store answers, however long it takes, there is silence as well.
    while not (first := await anext(reader)):
        continue
    assert len(first) == 2
    assert await anext(reader) == []
    assert await anext(reader) == []
    await quick.aclose()


async def test_a_lost_last_message_is_found_at_the_keepalive(store: Store) -> None:
    quick = Hub(store, keepalive_s=0.3)
    job = await Job.start(store)
    reading = asyncio.create_task(read_all(await quick.open(job.id)))
    await wait_until(lambda: _subscribers(store, job.id), "the reader is subscribed")
    # As if the channel had dropped it: the event stands in the log and nobody was told.
    await store.redis.xadd(keys.log(job.id), {"e": b'{"type":"done","text":""}'}, id=f"{job.epoch}-2")
    assert (await reading)[-1].type == b"done"
    await quick.aclose()


async def test_closing_the_hub_ends_its_readers(store: Store) -> None:
    closing = Hub(store)
    job = await Job.start(store)
    reading = asyncio.create_task(read_all(await closing.open(job.id)))
    await wait_until(lambda: _subscribers(store, job.id), "the reader is subscribed")
    await closing.aclose()
    assert len(await reading) == 2


async def test_the_last_reader_unsubscribes_and_a_new_one_subscribes_again(store: Store, hub: Hub) -> None:
    job = await Job.start(store)
    for _ in range(20):
        reader = await hub.open(job.id)
        await anext(reader)
        await reader.aclose()
    await wait_until(lambda: _none(store, job.id), "nobody is subscribed")
    reading = asyncio.create_task(read_all(await hub.open(job.id)))
    await job.say("a")
    await job.finish()
    assert text_of_frames(await reading) == "a"


async def _none(store: Store, job_id: str) -> bool:
    return not await _subscribers(store, job_id)


@pytest.mark.parametrize("seed", range(25))
async def test_any_interleaving_of_publish_subscribe_and_reconnect(store: Store, seed: int) -> None:
    """Readers that come, leave and resume at random, while connections are killed: every token once, in order."""
    dice = random.Random(seed)
    hub = Hub(store, keepalive_s=0.5)
    job = await Job.start(store)

    async def write() -> None:
        for i in range(dice.randrange(20, 60)):
            await job.say(*(f"{i}.{k} " for k in range(dice.randrange(1, 4))))
            if dice.random() < 0.1:
                await cut_subscribers(store)
            await asyncio.sleep(dice.choice([0, 0, 0.001, 0.005]))
        await job.finish()

    async def read(leave: float) -> list[Frame]:
        frames: list[Frame] = []
        while True:
            await asyncio.sleep(dice.random() * 0.02)
            last = next((f.id for f in reversed(frames) if f.id), None)
            reader = await hub.open(job.id, last.decode() if last else None)
            async for batch in reader:
                for frame in batch:
                    frames.append(frame)
                    if dice.random() < leave and not frame.ends:
                        break
                else:
                    continue
                break
            await reader.aclose()
            if frames and frames[-1].ends:
                return frames

    async with asyncio.timeout(2 * PATIENCE_S):
        readings = [asyncio.create_task(read(dice.choice([0, 0.02, 0.2]))) for _ in range(8)]
        await write()
        for frames in await asyncio.gather(*readings):
            check_order(frames)
            assert text_of_frames(frames) == job.text
    await hub.aclose()


async def test_a_hub_without_readers_keeps_its_connection(store: Store, hub: Hub) -> None:
    job = await Job.start(store)
    reader = await hub.open(job.id)
    await anext(reader)
    assert isinstance(hub.subscribers, One)
    subscriber = hub.subscribers.subscriber
    link = subscriber.link
    assert link is not None
    await reader.aclose()
    await wait_until(lambda: _none(store, job.id), "nobody is subscribed")
    heard = subscriber.heard_at
    link.send([(b"PING",)])
    await wait_until(lambda: subscriber.heard_at > heard, "the server answered the ping")
    assert link.open
