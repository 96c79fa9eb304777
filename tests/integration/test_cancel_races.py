"""A cancel against everything else that can happen to a job in the same moment: the store decides, and once."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import pytest

from promptmill import AsyncProducer, keys
from promptmill.contract import Done, Event, Progress, parse_event
from promptmill.settings import Settings
from promptmill.store import Claimed, Store
from promptmill.store.ids import EventId
from promptmill.watch import MAX_CRASHES
from promptmill_workers.engine import Engine
from tests.support.processes import PATIENCE_S, wait_until
from tests.support.store import listeners_of
from tests.support.streams import check_whole
from tests.support.worker import worker_process

ROUNDS = 60
WORKER = "w-of-the-races"


@pytest.fixture
async def stores(redis_url: str) -> AsyncGenerator[list[Store]]:
    """Several, each with a connection of its own: whose script comes first is left to chance."""
    made = [await Store.connect(redis_url) for _ in range(3)]
    for store in made:
        await store.load_scripts()
    yield made
    for store in made:
        await store.aclose()


async def together(*acts: Callable[[], Awaitable[Any]]) -> list[Any]:
    """All at once, in a random order; answers in the order given."""
    order = list(range(len(acts)))
    random.shuffle(order)
    began: dict[int, asyncio.Future[Any]] = {}
    for place in order:
        began[place] = asyncio.ensure_future(acts[place]())
        if random.random() < 0.5:
            await asyncio.sleep(0)  # sometimes the first is in the store before the second is on its way
    return [await began[place] for place in range(len(acts))]


async def claimed_job(producer: AsyncProducer, store: Store) -> tuple[str, str]:
    """A job that runs, with one token; answers its id and its claim."""
    job = await producer.submit("x", model="echo")
    claim = keys.new_token()
    assert isinstance(await store.claim(job.id, claim, WORKER, Progress(phase="started")), Claimed)
    return job.id, claim


async def check(store: Store, job_id: str, state: str) -> list[Event]:
    """One end, of that state, in the log and in the record; answers the events."""
    found, _, _ = await store.read_log(job_id, EventId(0, 0))
    events = [parse_event(data, str(event_id)) for event_id, data in found]
    assert sum(event.ends for event in events) == 1
    assert events[-1].type == {"succeeded": "done"}.get(state, state)
    if state != "succeeded":
        check_whole(events)
    record = await store.find(job_id)
    assert record is not None
    assert record.state == state
    assert not await store.redis.hexists(keys.record(job_id), "claim")
    return events


async def finish(store: Store, job_id: str, claim: str) -> bool:
    return await store.finish(job_id, claim, "succeeded", Done(text="").to_json(), {"text": ""}, [])


async def test_against_the_finish_one_of_both_wins(producer: AsyncProducer, stores: list[Store]) -> None:
    won: Counter[str] = Counter()
    for _ in range(ROUNDS):
        job_id, claim = await claimed_job(producer, stores[0])
        finished, cancelled = await together(
            lambda: finish(stores[0], job_id, claim),  # noqa: B023 - awaited within the round
            lambda: stores[1].cancel(job_id, "x", keys.new_token()),  # noqa: B023
        )
        assert finished is not cancelled
        won["finish" if finished else "cancel"] += 1
        await check(stores[0], job_id, "succeeded" if finished else "cancelled")
    assert set(won) == {"finish", "cancel"}, "chance decided always alike: the race was not run"


@pytest.mark.parametrize("why", ["dead", "handback"])
async def test_against_a_requeue_the_cancel_always_holds(
    producer: AsyncProducer, stores: list[Store], why: str
) -> None:
    outcomes: Counter[str] = Counter()
    for _ in range(ROUNDS):
        job_id, claim = await claimed_job(producer, stores[0])
        mine: dict[str, Any] = {"dead_worker": WORKER} if why == "dead" else {"claim": claim}
        token = keys.new_token()

        async def requeue() -> str:
            return await stores[0].requeue(job_id, max_crashes=MAX_CRASHES, token=token, **mine)  # noqa: B023

        outcome, cancelled = await together(
            requeue,
            lambda: stores[1].cancel(job_id, "x", keys.new_token()),  # noqa: B023
        )
        assert cancelled
        outcomes[outcome] += 1
        before = await check(stores[0], job_id, "cancelled")
        # Its reply was lost, and its caller asks again; another watcher comes late.
        await requeue()
        assert await stores[2].requeue(job_id, max_crashes=MAX_CRASHES, **mine) == "not_running"
        assert await stores[2].claim(job_id, keys.new_token(), "other", Progress(phase="started")) == "not_queued"
        assert await check(stores[0], job_id, "cancelled") == before
    assert set(outcomes) == {"queued", "not_running"}, outcomes


async def test_against_the_claim_the_cancel_always_holds(producer: AsyncProducer, stores: list[Store]) -> None:
    claims: Counter[bool] = Counter()
    for _ in range(ROUNDS):
        job = await producer.submit("x", model="echo")
        claim = keys.new_token()
        claimed, cancelled = await together(
            lambda: stores[0].claim(job.id, claim, WORKER, Progress(phase="started")),  # noqa: B023
            lambda: stores[1].cancel(job.id, "x", keys.new_token()),  # noqa: B023
        )
        assert cancelled
        claims[isinstance(claimed, Claimed)] += 1
        await check(stores[0], job.id, "cancelled")
        # The claim's reply was lost: asked again, it must not hand out a job that has ended.
        assert await stores[0].claim(job.id, claim, WORKER, Progress(phase="started")) == "not_queued"
        assert not await finish(stores[0], job.id, claim)
        await check(stores[0], job.id, "cancelled")
    assert set(claims) == {True, False}, claims


async def test_of_two_cancels_one_ends_the_job_and_a_repeated_one_is_told_again(
    producer: AsyncProducer, stores: list[Store]
) -> None:
    for n in range(ROUNDS):
        job_id, _ = await claimed_job(producer, stores[0])
        tokens = [keys.new_token(), keys.new_token()]
        first, second = await together(
            lambda: stores[0].cancel(job_id, "first", tokens[0]),  # noqa: B023
            lambda: stores[1].cancel(job_id, "second", tokens[1]),  # noqa: B023
        )
        assert first is not second
        (end,) = [e for e in await check(stores[0], job_id, "cancelled") if e.ends]
        assert getattr(end, "reason") == ("first" if first else "second")  # noqa: B009 - only this kind has one
        winner = tokens[0] if first else tokens[1]
        assert await stores[2].cancel(job_id, f"again {n}", winner), "its reply was lost: it learns that it won"
        assert not await stores[2].cancel(job_id, "again", tokens[1] if first else tokens[0])
        await check(stores[0], job_id, "cancelled")


async def test_everything_at_once_ends_a_job_once(producer: AsyncProducer, stores: list[Store]) -> None:
    for _ in range(ROUNDS):
        job_id, claim = await claimed_job(producer, stores[0])
        again = keys.new_token()
        results = await together(
            lambda: finish(stores[0], job_id, claim),  # noqa: B023
            lambda: stores[1].cancel(job_id, "a", keys.new_token()),  # noqa: B023
            lambda: stores[2].cancel(job_id, "b", keys.new_token()),  # noqa: B023
            lambda: stores[0].requeue(job_id, dead_worker=WORKER, max_crashes=MAX_CRASHES),  # noqa: B023
            lambda: stores[1].requeue(job_id, claim=claim, max_crashes=MAX_CRASHES),  # noqa: B023
            lambda: stores[2].claim(job_id, again, "other", Progress(phase="started")),  # noqa: B023
            lambda: finish(stores[1], job_id, again),  # noqa: B023
        )
        ends = [results[0], results[1], results[2], results[6]]
        assert ends.count(True) == 1, results
        await check(stores[0], job_id, "cancelled" if results[1] or results[2] else "succeeded")


# -- in a worker ----------------------------------------------------------------------------------------------------

HANG = """
[models.hang]
type = "echo"
options = { fault = "hang" }
[models.paced]
type = "echo"
options = { tokens_per_s = 40 }
"""


async def test_a_cancel_that_comes_while_the_claims_reply_is_on_its_way_stops_the_job(
    write_config: Callable[[str], tuple[Any, Settings]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # No heartbeat for an hour: nothing but the control message can tell.
    _, settings = write_config("heartbeat_s = 3600\ndead_after_s = 7200\n" + HANG)
    engine = await Engine.start(settings, "race")
    try:
        heard: list[str] = []
        taken, claim = engine.runner.taken, engine.store.claim

        def hear(token: str) -> None:
            heard.append(token)
            taken(token)

        async def slow_claim(job_id: str, *rest: Any, **options: Any) -> Any:
            claimed = await claim(job_id, *rest, **options)
            await producer.cancel(job_id)
            await wait_until(lambda: bool(heard), "the worker was told")
            return claimed

        monkeypatch.setattr(engine.runner, "taken", hear)
        monkeypatch.setattr(engine.store, "claim", slow_claim)
        channel = keys.control(engine.worker_id)

        async def listens() -> bool:
            return await listeners_of(engine.store, channel) == 1

        await wait_until(listens, "the worker listens to its channel")
        async with AsyncProducer(settings) as producer:
            job = await producer.submit("x", model="hang")
            async with asyncio.timeout(PATIENCE_S):
                await engine.runner.run(job.id)
            assert engine.runner.running == {}
            assert (await job.get()).state == "cancelled"
    finally:
        await engine.aclose()


async def test_jobs_cancelled_at_any_moment_of_their_short_lives_end_once(
    write_config: Callable[[str], tuple[Any, Settings]],
) -> None:
    path, settings = write_config(HANG)
    with worker_process(path) as worker:
        async with AsyncProducer(settings) as producer:
            await worker.ready(settings.store_url)

            async def one(n: int) -> str:
                # However late the cancels are, those that hang have not ended by themselves.
                job = await producer.submit("one two three four five six", model="paced" if n % 6 else "hang")
                reading = asyncio.create_task(_read(producer, job.id))
                await asyncio.sleep(random.random() * 0.3)
                answered = await job.cancel(f"{n}")
                events = await reading
                check_whole(events)
                assert answered.state == (await job.get()).state == _state(events[-1])
                return answered.state

            states = Counter(await asyncio.gather(*(one(n) for n in range(60))))
    assert set(states) <= {"succeeded", "cancelled"}
    assert states["cancelled"], states


async def _read(producer: AsyncProducer, job_id: str) -> list[Event]:
    async with asyncio.timeout(60):
        return [event async for event in producer.events(job_id)]


def _state(end: Event) -> str:
    return "succeeded" if isinstance(end, Done) else end.type
