"""The ledger: every attempt once, whoever books it, and whoever died before."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest

from promptmill import AsyncProducer, keys
from promptmill.contract import Done, Progress, Token
from promptmill.enqueue import Enqueuer
from promptmill.errors import StoreUnavailable
from promptmill.registry import Registry
from promptmill.settings import ModelConfig, Price
from promptmill.store import Claimed, Store, scripts
from promptmill.usage import Booker, add_late_try, book, booking, keep_try, sweep_unbooked, tell_asking
from promptmill.usage.report import Sums, read_usage
from promptmill.usage.verify import verify_usage
from promptmill.watch import Watcher
from tests.support.processes import PATIENCE_S, wait_until

RETENTION_S = 90 * 24 * 3600.0
REGISTRY = Registry(
    {
        "echo": ModelConfig(type="echo"),
        "paid": ModelConfig(type="echo", price=Price(input=1, output=10, cache_read=0.1, cache_write=2)),
    }
)
USAGE = {"input_tokens": 7, "output_tokens": 5, "cache_read_tokens": 3, "cache_write_tokens": 2, "estimated": False}


@pytest.fixture
def user() -> str:
    return f"u-{keys.new_job_id()}"


@pytest.fixture
def day() -> str:
    """A UTC day that no other test uses."""
    return (datetime(1990, 1, 1, tzinfo=UTC) + timedelta(days=random.randrange(10_000))).date().isoformat()


@pytest.fixture
async def claim(store: Store, producer: AsyncProducer, user: str):
    """Submit a job of the test's user and claim it; answers its id and the claim's token."""

    async def submit_and_claim(**fields: Any) -> tuple[str, str]:
        job = await producer.submit(**{"prompt": "x" * 40, "model": "echo", "user": user, **fields})
        return job.id, await claim_again(store, job.id)

    return submit_and_claim


async def claim_again(store: Store, job_id: str, worker: str = "w") -> str:
    token = keys.new_token()
    assert isinstance(await store.claim(job_id, token, worker, Progress(phase="started")), Claimed)
    return token


def a_try(token: str, day: str, attempt: int = 1, **fields: Any) -> dict[str, Any]:
    return {
        "attempt": attempt,
        "claim": token,
        "model": "paid",
        "backend": "echo",
        "outcome": "succeeded",
        "started_at": f"{day}T10:00:00+00:00",
        "finished_at": f"{day}T10:00:01+00:00",
        "usage": USAGE,
        **fields,
    }


async def finish(store: Store, job_id: str, token: str, tries: list[dict[str, Any]]) -> None:
    done = Done(text="hi", attempt=1)
    assert await store.finish(job_id, token, "succeeded", done.to_json(), {"text": "hi"}, tries)


async def sums(store: Store, day: str, user: str) -> Sums:
    return (await read_usage(store, day, day, "user", user)).total


async def entries(store: Store, day: str) -> dict[str, dict[str, Any]]:
    found = await store.redis.hgetall(keys.ledger(day))
    return {name.decode(): orjson.loads(raw) for name, raw in found.items()}


async def is_unbooked(store: Store, job_id: str) -> bool:
    return await store.redis.zscore(keys.UNBOOKED, job_id) is not None


def make_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep looks at everything, and waits for nobody."""
    monkeypatch.setattr(booking, "_GRACE_US", -1_000_000)
    monkeypatch.setattr(booking, "LATE_WAIT_MS", -1)


async def test_an_attempt_is_in_the_ledger_with_all_its_tokens_and_its_cost(store, claim, user, day) -> None:
    job_id, token = await claim()
    await finish(store, job_id, token, [a_try(token, day)])
    assert await book(store, REGISTRY, RETENTION_S, [job_id]) == 1
    assert await entries(store, day) == {
        f"{job_id}:{token[:8]}:1": {
            "user": user,
            "role": "",
            "model": "paid",
            "backend": "echo",
            "slot": "",
            "outcome": "succeeded",
            "in": 7,
            "out": 5,
            "cache_read": 3,
            "cache_write": 2,
            "cost": 7_000 + 50_000 + 300 + 4_000,
            "at": int(datetime.fromisoformat(f"{day}T10:00:01+00:00").timestamp() * 1000),
        }
    }
    assert await sums(store, day, user) == Sums(
        attempts=1, input_tokens=7, output_tokens=5, cache_read_tokens=3, cache_write_tokens=2, cost_nano_usd=61_300
    )
    assert not await is_unbooked(store, job_id)


async def test_booking_twice_books_once(store, claim, user, day) -> None:
    job_id, token = await claim()
    await finish(store, job_id, token, [a_try(token, day, outcome="cut"), a_try(token, day, 2)])
    assert await book(store, REGISTRY, RETENTION_S, [job_id]) == 2
    assert await book(store, REGISTRY, RETENTION_S, [job_id]) == 0
    total = await sums(store, day, user)
    assert (total.attempts, total.failed, total.input_tokens) == (2, 1, 14)


async def test_many_book_at_once_and_each_attempt_is_booked_once(store, redis_url, claim, user, day) -> None:
    job_ids = []
    for _ in range(10):
        job_id, token = await claim()
        await finish(store, job_id, token, [a_try(token, day)])
        job_ids.append(job_id)
    other = await Store.connect(redis_url)
    try:
        counts = await asyncio.gather(
            *(book(which, REGISTRY, RETENTION_S, job_ids) for _ in range(4) for which in (store, other))
        )
    finally:
        await other.aclose()
    assert sum(counts) == 10
    assert (await sums(store, day, user)).output_tokens == 50
    assert (await verify_usage(store, day, day)).ok


async def test_a_lost_reply_of_the_booking_script_loses_and_doubles_nothing(
    store, claim, user, day, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, token = await claim()
    await finish(store, job_id, token, [a_try(token, day)])
    ask, lost = store.ask, 0

    async def lose_the_first_of_the_script(commands: Any, **options: Any) -> Any:
        nonlocal lost
        replies = await ask(commands, **options)  # raises where the server does not know the script yet
        if not lost and any(str(command[0]).startswith("EVAL") for command in commands):
            lost += 1
            raise ConnectionResetError("the reply is lost")
        return replies

    monkeypatch.setattr(store, "ask", lose_the_first_of_the_script)
    with pytest.raises(StoreUnavailable):
        await book(store, REGISTRY, RETENTION_S, [job_id])
    assert await is_unbooked(store, job_id)
    assert await book(store, REGISTRY, RETENTION_S, [job_id]) == 0
    assert not await is_unbooked(store, job_id)
    assert (await sums(store, day, user)).attempts == 1


async def test_the_script_is_loaded_where_the_server_forgot_it(store, claim, user, day) -> None:
    job_id, token = await claim()
    await finish(store, job_id, token, [a_try(token, day)])
    await store.redis.script_flush()
    assert await book(store, REGISTRY, RETENTION_S, [job_id]) == 1
    assert (await sums(store, day, user)).attempts == 1
    await store.load_scripts()


async def test_the_booker_books_in_the_background(store, claim, user, day) -> None:
    booker = Booker(store, lambda: REGISTRY, RETENTION_S)
    for _ in range(5):
        job_id, token = await claim()
        await finish(store, job_id, token, [a_try(token, day)])
        booker.soon(job_id)

    async def booked() -> bool:
        return (await sums(store, day, user)).attempts == 5

    await wait_until(booked, "all is booked, before anybody waits for it")
    await booker.aclose()
    assert await booked()


async def test_what_the_booker_is_told_while_the_store_is_away_is_told_when_it_is_back(
    store, claim, user, day, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, token = await claim()
    ask, failures = store.ask, 3

    async def away_for_a_while(commands: Any, **options: Any) -> Any:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise ConnectionRefusedError("away")
        return await ask(commands, **options)

    monkeypatch.setattr(store, "ask", away_for_a_while)
    booker = Booker(store, lambda: REGISTRY, RETENTION_S)
    booker.keep(job_id, a_try(token, day, 1, outcome="cut"))
    booker.lost(job_id, a_try(token, day, 2, outcome="cancelled"))
    await booker.aclose()
    assert failures < 0
    assert (await sums(store, day, user)).attempts == 2
    assert [a.outcome for a in (await store.get(job_id)).attempts] == ["cut", "cancelled"]


async def test_the_booker_does_not_hold_a_worker_up_whose_store_stays_away(
    store, day, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def away(commands: Any, **options: Any) -> Any:
        raise ConnectionRefusedError("away")

    monkeypatch.setattr(store, "ask", away)
    booker = Booker(store, lambda: REGISTRY, RETENTION_S)
    booker.lost(keys.new_job_id(), a_try("t", day))
    async with asyncio.timeout(PATIENCE_S):
        await booker.aclose(0.2)
    assert "the usage of 1 attempts could not be told" in caplog.text


async def test_the_sweep_books_what_a_dead_runner_finished_but_did_not_book(
    store, settings, claim, user, day, monkeypatch
) -> None:
    job_id, token = await claim()
    await finish(store, job_id, token, [a_try(token, day)])
    assert await is_unbooked(store, job_id)
    make_old(monkeypatch)
    enqueuer = Enqueuer(settings.queue_url)
    try:
        await store.redis.delete(keys.SWEEP_LOCK)
        await Watcher(store, settings, enqueuer).sweep()
    finally:
        await enqueuer.aclose()
    assert (await sums(store, day, user)).attempts == 1
    assert not await is_unbooked(store, job_id)


async def test_the_sweep_leaves_a_running_job_for_later_and_drops_one_whose_record_is_gone(
    store, claim, user, day, monkeypatch
) -> None:
    make_old(monkeypatch)
    running, token = await claim()
    gone, _ = await claim()
    await store.redis.delete(keys.record(gone), keys.log(gone))
    await sweep_unbooked(store, REGISTRY, RETENTION_S)
    assert await is_unbooked(store, running)
    assert not await is_unbooked(store, gone)
    await finish(store, running, token, [a_try(token, day)])
    assert await book(store, REGISTRY, RETENTION_S, [running]) == 1
    assert not await is_unbooked(store, running)


async def test_a_dead_workers_attempt_is_estimated_from_the_text_that_readers_got(store, claim, user) -> None:
    job_id, token = await claim(prompt="x" * 40, model="echo")
    epoch = (await store.find(job_id)).st["epoch"]
    text = "y" * 400
    await store.run(scripts.APPEND, job_id, token, epoch, 2, Token(text=text).to_json())
    today = datetime.now(UTC).date().isoformat()
    assert await store.requeue(job_id, dead_worker="w", max_crashes=3) == "queued"
    second = await claim_again(store, job_id)
    await finish(store, job_id, second, [*(await store.find(job_id)).tries, a_try(second, today, 2)])
    assert await book(store, REGISTRY, RETENTION_S, [job_id]) == 2
    total = await sums(store, today, user)
    assert (total.attempts, total.failed, total.estimated) == (2, 1, 1)
    assert total.input_tokens == 10 + 7
    assert total.output_tokens == pytest.approx(100 + 5, rel=0.01)
    lost = (await entries(store, today))[f"{job_id}:{token[:8]}:lost"]
    assert lost["model"] == "echo"
    assert lost["presumed"]


async def test_a_dead_workers_attempt_counts_for_the_model_that_it_said_it_would_ask(store, claim, user) -> None:
    job_id, token = await claim()
    assert not await tell_asking(store, job_id, "a-claim-that-does-not-hold", {"model": "echo"})
    asked = {"attempt": 3, "model": "paid", "backend": "echo", "slot": "backup_1", "bytes_per_token": 8.0}
    asked["text_before"] = 80
    await tell_asking(store, job_id, token, asked)
    epoch = (await store.find(job_id)).st["epoch"]
    await store.run(scripts.APPEND, job_id, token, epoch, 2, Token(text="y" * 400).to_json())
    await store.requeue(job_id, dead_worker="w", max_crashes=1)
    today = datetime.now(UTC).date().isoformat()
    assert await book(store, REGISTRY, RETENTION_S, [job_id]) == 1
    entry = (await entries(store, today))[f"{job_id}:{token[:8]}:lost"]
    assert (entry["model"], entry["slot"], entry["outcome"]) == ("paid", "backup_1", "crashed")
    assert entry["out"] == pytest.approx(40, abs=1)
    assert entry["cost"] == entry["in"] * 1_000 + entry["out"] * 10_000
    assert not await is_unbooked(store, job_id)


async def test_a_worker_that_died_between_two_attempts_lost_none(store, claim, user, day) -> None:
    job_id, token = await claim()
    await tell_asking(store, job_id, token, {"attempt": 1, "model": "paid", "backend": "echo"})
    await keep_try(store, job_id, a_try(token, day, 1, outcome="cut"))
    await store.requeue(job_id, dead_worker="w", max_crashes=1)
    assert await book(store, REGISTRY, RETENTION_S, [job_id]) == 1
    assert list(await entries(store, day)) == [f"{job_id}:{token[:8]}:1"]


async def test_an_attempt_that_began_is_not_taken_for_the_one_before_it_by_a_late_repeat(
    store, claim, user, day
) -> None:
    job_id, token = await claim()
    first = {"attempt": 1, "model": "paid", "backend": "echo"}
    assert await tell_asking(store, job_id, token, first)
    await keep_try(store, job_id, a_try(token, day, 1, outcome="cut"))
    for asked in ({**first, "attempt": 2, "model": "echo"}, first):
        assert await tell_asking(store, job_id, token, asked)
    await store.requeue(job_id, dead_worker="w", max_crashes=1)
    await book(store, REGISTRY, RETENTION_S, [job_id])
    assert list(await entries(store, day)) == [f"{job_id}:{token[:8]}:1"]
    lost = (await entries(store, datetime.now(UTC).date().isoformat()))[f"{job_id}:{token[:8]}:lost"]
    assert lost["model"] == "echo"


async def test_a_hint_for_a_job_that_is_gone_makes_no_record(store) -> None:
    job_id = keys.new_job_id()
    assert not await tell_asking(store, job_id, "token", {"model": "paid"})
    await store.wire.call("PING")
    assert not await store.redis.exists(keys.record(job_id))


async def test_what_a_presumed_dead_worker_tells_takes_the_place_of_the_estimate(store, claim, user, day) -> None:
    job_id, token = await claim()
    epoch = (await store.find(job_id)).st["epoch"]
    await store.run(scripts.APPEND, job_id, token, epoch, 2, Token(text="y" * 400).to_json())
    await store.requeue(job_id, dead_worker="w", max_crashes=3)
    second = await claim_again(store, job_id)
    today = datetime.now(UTC).date().isoformat()
    await finish(store, job_id, second, [*(await store.find(job_id)).tries, a_try(second, today, 2)])
    await book(store, REGISTRY, RETENTION_S, [job_id])
    # It was only frozen; its attempt went on, and even ended on another day.
    assert await add_late_try(store, job_id, a_try(token, day, 1, outcome="cut"))
    assert await is_unbooked(store, job_id)
    assert await book(store, REGISTRY, RETENTION_S, [job_id]) == 1
    assert not await is_unbooked(store, job_id)
    total = await sums(store, today, user)
    assert (total.attempts, total.failed, total.estimated) == (2, 1, 0)
    assert (total.input_tokens, total.output_tokens) == (14, 10)
    assert (await sums(store, day, user)).attempts == 0
    assert (await verify_usage(store, today, today)).ok
    assert [a.attempt for a in (await store.get(job_id)).attempts] == [1, 2]


async def test_a_late_attempt_after_a_cancellation_is_booked(store, claim, user, day) -> None:
    job_id, token = await claim()
    await store.cancel(job_id, "enough", keys.new_token())
    # The worker has not told yet: what is owed keeps the job on the list.
    assert await book(store, REGISTRY, RETENTION_S, [job_id]) == 0
    assert await is_unbooked(store, job_id)
    partial = {"input_tokens": 11, "output_tokens": 3, "estimated": True}
    late = a_try(token, day, outcome="cancelled", usage=partial)
    assert await add_late_try(store, job_id, late)
    assert not await add_late_try(store, job_id, late)
    assert await book(store, REGISTRY, RETENTION_S, [job_id]) == 1
    assert not await is_unbooked(store, job_id)
    total = await sums(store, day, user)
    assert (total.attempts, total.failed, total.estimated, total.input_tokens) == (1, 1, 1, 11)
    (shown,) = (await store.get(job_id)).attempts
    assert shown.outcome == "cancelled"


async def test_a_late_attempt_that_comes_while_somebody_books_is_not_forgotten(
    store, claim, user, day, monkeypatch
) -> None:
    job_id, token = await claim()
    await finish(store, job_id, token, [a_try(token, day)])
    write = booking._write

    async def tell_first(*args: Any) -> int:
        monkeypatch.setattr(booking, "_write", write)
        await add_late_try(store, job_id, a_try("other-claim", day, 9))
        return await write(*args)

    monkeypatch.setattr(booking, "_write", tell_first)
    assert await book(store, REGISTRY, RETENTION_S, [job_id]) == 1
    assert await is_unbooked(store, job_id)
    assert await book(store, REGISTRY, RETENTION_S, [job_id]) == 1
    assert not await is_unbooked(store, job_id)
    assert (await sums(store, day, user)).attempts == 2


async def test_a_cancelled_job_whose_worker_never_tells_is_estimated_from_its_text(
    store, claim, user, monkeypatch
) -> None:
    job_id, token = await claim(prompt="x" * 40)
    epoch = (await store.find(job_id)).st["epoch"]
    await store.run(scripts.APPEND, job_id, token, epoch, 2, Token(text="y" * 80).to_json())
    await store.cancel(job_id, "enough", keys.new_token())
    make_old(monkeypatch)
    await sweep_unbooked(store, REGISTRY, RETENTION_S)
    await sweep_unbooked(store, REGISTRY, RETENTION_S)
    await book(store, REGISTRY, RETENTION_S, [job_id])
    today = datetime.now(UTC).date().isoformat()
    total = await sums(store, today, user)
    assert (total.attempts, total.input_tokens, total.output_tokens, total.estimated) == (1, 10, 20, 1)
    assert not await is_unbooked(store, job_id)
    # It was alive after all.
    await add_late_try(store, job_id, a_try(token, today, outcome="cancelled"))
    await book(store, REGISTRY, RETENTION_S, [job_id])
    total = await sums(store, today, user)
    assert (total.attempts, total.input_tokens, total.output_tokens, total.estimated) == (1, 7, 5, 0)


async def test_an_attempt_kept_while_its_claim_goes_on_survives_the_worker_and_counts_once(
    store, claim, user, day
) -> None:
    job_id, token = await claim()
    first = a_try(token, day, 1, outcome="cut")
    assert await keep_try(store, job_id, first)
    assert not await keep_try(store, job_id, first)
    await finish(store, job_id, token, [first, a_try(token, day, 2)])
    assert await book(store, REGISTRY, RETENTION_S, [job_id]) == 2
    assert (await sums(store, day, user)).attempts == 2
    assert len((await store.get(job_id)).attempts) == 2


async def test_a_job_cancelled_between_two_attempts_is_booked_once_and_leaves_the_list(
    store, claim, user, day, monkeypatch
) -> None:
    job_id, token = await claim(prompt="x" * 40)
    epoch = (await store.find(job_id)).st["epoch"]
    await store.run(scripts.APPEND, job_id, token, epoch, 2, Token(text="y" * 80).to_json())
    # Its worker told of the attempt that failed, and the job was cancelled before the next one began.
    assert await keep_try(store, job_id, a_try(token, day, 1, outcome="cut"))
    await store.cancel(job_id, "enough", keys.new_token())
    make_old(monkeypatch)
    for _ in range(3):
        await sweep_unbooked(store, REGISTRY, RETENTION_S)
        await book(store, REGISTRY, RETENTION_S, [job_id])
    assert not await is_unbooked(store, job_id)
    assert (await sums(store, day, user)).attempts == 1


@pytest.mark.parametrize("text", ["y" * 80, ""])
async def test_a_later_attempt_of_a_claim_is_missed_by_nobody_where_it_was_cancelled_and_its_worker_is_dead(
    store, claim, user, day, monkeypatch, text: str
) -> None:
    job_id, token = await claim(prompt="x" * 40)
    epoch = (await store.find(job_id)).st["epoch"]
    # As by a fallback: two attempts failed and were told, the third was under way.
    for number in (1, 2):
        await tell_asking(store, job_id, token, {"attempt": number, "model": "echo", "backend": "echo"})
        await keep_try(store, job_id, a_try(token, day, number, outcome="cut"))
    await tell_asking(store, job_id, token, {"attempt": 3, "model": "paid", "backend": "echo", "bytes_per_token": 4.0})
    if text:
        await store.run(scripts.APPEND, job_id, token, epoch, 2, Token(text=text).to_json())
    await store.cancel(job_id, "enough", keys.new_token())
    make_old(monkeypatch)
    for _ in range(3):
        await sweep_unbooked(store, REGISTRY, RETENTION_S)
        await book(store, REGISTRY, RETENTION_S, [job_id])
    assert not await is_unbooked(store, job_id)
    assert (await sums(store, day, user)).attempts == 2
    lost = (await entries(store, datetime.now(UTC).date().isoformat()))[f"{job_id}:{token[:8]}:lost"]
    assert (lost["model"], lost["outcome"], lost["presumed"]) == ("paid", "cancelled", True)
    assert (lost["in"], lost["out"]) == ((10, 20) if text else (0, 0))


async def test_the_end_of_another_claim_does_not_take_a_late_attempt_with_it(store, claim, user, day) -> None:
    job_id, token = await claim()
    await store.requeue(job_id, claim=token, max_crashes=3)
    second = await claim_again(store, job_id)
    await add_late_try(store, job_id, a_try(token, day, 1, outcome="overloaded"))
    await finish(store, job_id, second, [a_try(second, day, 1)])
    assert await book(store, REGISTRY, RETENTION_S, [job_id]) == 2
    assert (await sums(store, day, user)).attempts == 2


async def test_a_late_attempt_of_a_job_that_is_gone_makes_no_record(store, day) -> None:
    job_id = keys.new_job_id()
    assert not await add_late_try(store, job_id, a_try("t", day))
    assert not await store.redis.exists(keys.record(job_id))
    await book(store, REGISTRY, RETENTION_S, [job_id])
    assert not await is_unbooked(store, job_id)


async def test_an_attempt_that_nothing_was_sent_for_counts_without_tokens(store, claim, user, day) -> None:
    job_id, token = await claim()
    tries = [
        {k: v for k, v in a_try(token, day, n, outcome=code).items() if k != "usage"}
        for n, code in enumerate(("unreachable", "timeout_connect", "auth", "rate_limited", "overloaded"), 1)
    ]
    await finish(store, job_id, token, tries)
    await book(store, REGISTRY, RETENTION_S, [job_id])
    assert await sums(store, day, user) == Sums(attempts=5, failed=5)


async def test_tokens_without_a_price_are_counted_as_unpriced_and_a_providers_own_cost_wins(
    store, claim, user, day
) -> None:
    job_id, token = await claim()
    tries = [a_try(token, day, 1, model="echo"), a_try(token, day, 2, cost_usd=0.25)]
    await finish(store, job_id, token, tries)
    await book(store, REGISTRY, RETENTION_S, [job_id])
    total = await sums(store, day, user)
    assert (total.unpriced, total.cost_nano_usd, total.cost_usd) == (1, 250_000_000, 0.25)


async def test_a_record_that_cannot_be_read_stops_nobody_elses_books(store, claim, user, day, monkeypatch) -> None:
    bad, bad_token = await claim()
    good, token = await claim()
    await finish(store, bad, bad_token, [a_try(bad_token, day, usage={"input_tokens": -1})])
    await finish(store, good, token, [a_try(token, day)])
    make_old(monkeypatch)
    await sweep_unbooked(store, REGISTRY, RETENTION_S)
    assert (await sums(store, day, user)).attempts == 1
    assert await is_unbooked(store, bad)
    await store.redis.zrem(keys.UNBOOKED, bad)


async def test_verify_finds_a_tampered_sum_and_a_lost_entry(store, claim, user, day) -> None:
    for _ in range(3):
        job_id, token = await claim()
        await finish(store, job_id, token, [a_try(token, day)])
        await book(store, REGISTRY, RETENTION_S, [job_id])
    right = await verify_usage(store, day, day)
    assert (right.ok, right.entries) == (True, 3)
    cell = orjson.dumps([user, "paid", "echo", ""]).decode()
    await store.redis.hincrby(keys.ledger_sums(day), f"out:{cell}", 1)
    (wrong,) = (await verify_usage(store, day, day)).differences
    assert (wrong.day, wrong.field, wrong.expected, wrong.found) == (day, f"out:{cell}", 15, 16)
    await store.redis.hincrby(keys.ledger_sums(day), f"out:{cell}", -1)
    await store.redis.hdel(keys.ledger(day), next(iter(await entries(store, day))))
    found = {d.field: (d.expected, d.found) for d in (await verify_usage(store, day, day)).differences}
    assert found[f"attempts:{cell}"] == (2, 3)
    assert found[f"user_tokens:{user}"] == (34, 51)


async def test_verify_agrees_while_others_book(store, claim, user, day) -> None:
    async def booked() -> None:
        for _ in range(30):
            job_id, token = await claim()
            await finish(store, job_id, token, [a_try(token, day)])
            await book(store, REGISTRY, RETENTION_S, [job_id])

    booking_on = asyncio.create_task(booked())
    looks = 0
    while not booking_on.done():
        assert (await verify_usage(store, day, day)).ok
        looks += 1
    await booking_on
    assert looks > 3


async def test_names_with_every_kind_of_character_are_summed_and_verified(store, producer, day) -> None:
    user = f'é/"\\日本:|{keys.new_job_id()}'
    job = await producer.submit("x", model="echo", user=user)
    token = await claim_again(store, job.id)
    await finish(store, job.id, token, [a_try(token, day)])
    await book(store, REGISTRY, RETENTION_S, [job.id])
    (row,) = (await read_usage(store, day, day, "user")).rows
    assert row.group == {"user": user}
    assert (await verify_usage(store, day, day)).ok


async def test_both_hashes_of_a_day_live_as_long_as_the_settings_say(store, claim, day) -> None:
    job_id, token = await claim()
    await finish(store, job_id, token, [a_try(token, day)])
    await book(store, REGISTRY, 100.0, [job_id])
    for name in (keys.ledger(day), keys.ledger_sums(day)):
        assert 90 <= await store.redis.ttl(name) <= 100


async def test_random_orders_of_telling_and_booking_end_in_the_same_sums(store, claim, user, day) -> None:
    """Kept, late, finished, presumed, booked in between: whatever the order, each attempt once."""
    chance = random.Random(7)
    expected = Sums()
    for _ in range(40):
        job_id, token = await claim()
        number, held = 1, [token]
        tries: list[dict[str, Any]] = []
        for _ in range(chance.randrange(4)):
            if chance.random() < 0.3:
                await book(store, REGISTRY, RETENTION_S, [job_id])
            failed = a_try(held[-1], day, number, outcome="cut")
            number += 1
            expected = replace(expected, attempts=expected.attempts + 1, failed=expected.failed + 1)
            if chance.random() < 0.5:
                tries.append(failed)
                if chance.random() < 0.5:
                    await keep_try(store, job_id, failed)
            else:
                # The claim is taken away; its worker tells late, perhaps after others booked.
                await store.requeue(job_id, claim=held[-1], max_crashes=3, tries=tries)
                held.append(await claim_again(store, job_id))
                await add_late_try(store, job_id, failed)
                if chance.random() < 0.5:
                    await add_late_try(store, job_id, failed)
        if chance.random() < 0.3:
            await store.cancel(job_id, "enough", keys.new_token())
            await book(store, REGISTRY, RETENTION_S, [job_id])
            for failed in [*tries, a_try(held[-1], day, number, outcome="cancelled")]:
                await add_late_try(store, job_id, failed)
            expected = replace(expected, attempts=expected.attempts + 1, failed=expected.failed + 1)
        else:
            await finish(store, job_id, held[-1], [*tries, a_try(held[-1], day, number)])
            expected = replace(expected, attempts=expected.attempts + 1)
        await asyncio.gather(*(book(store, REGISTRY, RETENTION_S, [job_id]) for _ in range(3)))
        assert not await is_unbooked(store, job_id)
    total = await sums(store, day, user)
    assert (total.attempts, total.failed) == (expected.attempts, expected.failed)
    assert total.output_tokens == 5 * expected.attempts
    assert (await verify_usage(store, day, day)).ok
