"""Health and limits across workers: each worker here is a Traffic with connections of its own, on one real Valkey."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from promptmill import keys
from promptmill.rates import RateInfo, RateWindow
from promptmill.routing import Route
from promptmill.settings import ModelConfig, ModelLimits
from promptmill.store import Store
from promptmill.traffic import Admission, Rules, Traffic, wire
from tests.support.processes import PATIENCE_S
from tests.support.store import running_store

QUICK = Rules(backoff_s=0.2, backoff_max_s=1.0, lease_s=60, renew_s=0.3, refresh_s=0.3, cut_every_s=600)
"""No lease runs out, and no burst is over, because the machine holds the test up."""
STEADY = replace(QUICK, backoff_s=30, backoff_max_s=60)
"""What broke stays broken until the test has seen it."""
Fleet = Callable[..., Awaitable[list[Traffic]]]


def route(name: str | None = None, *, host: str | None = None, **limits: Any) -> Route:
    """A model that no other test knows, at a host that no other test knows."""
    config = ModelConfig(
        type="local_openai",
        model_name="m",
        api_url=f"http://{host or keys.new_token().lower()}/v1",
        limits=ModelLimits(**limits),
    )
    return Route(name or f"m{keys.new_token()}", config)


async def end(traffic: Traffic, admission: Admission, code: str | None = None, **more: Any) -> None:
    await traffic.report(admission, **{"code": code, "retry_after_s": None, "tokens": None, "rate": None, **more})


async def call(traffic: Traffic, to: Route, code: str | None = None, user: str = "u", **more: Any) -> Admission:
    admission = await traffic.admit(to, user, tokens=10)
    if admission.granted:
        await end(traffic, admission, code, **more)
    return admission


async def until(what: Callable[[], Awaitable[Any]], name: str, within_s: float = PATIENCE_S) -> Any:
    try:
        async with asyncio.timeout(within_s):
            while not (found := await what()):  # noqa: ASYNC110 - it is in Redis that something happens
                await asyncio.sleep(0.002)
            return found
    except TimeoutError:
        raise AssertionError(f"not within {within_s} s: {name}") from None


async def refuses(traffic: Traffic, to: Route) -> bool:
    return not (await traffic.admit(to, "u", tokens=1)).granted


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine holds the whole test up: that Redis is away is not to be concluded from it."""
    monkeypatch.setattr(wire, "_ANSWER_S", PATIENCE_S)


@pytest.fixture
async def fleet(redis_url: str) -> AsyncGenerator[Fleet]:
    """Starts workers; answers when all of them listen."""
    async with contextlib.AsyncExitStack() as stack:
        started = 0

        async def start(count: int, *, run: bool = True, **options: Any) -> list[Traffic]:
            nonlocal started
            made: list[Traffic] = []
            for _ in range(count):
                store = await Store.connect(redis_url)
                stack.push_async_callback(store.aclose)
                traffic = Traffic(store, f"w{keys.new_token()}", **{"rules": QUICK, **options})
                made.append(traffic)
                if run:
                    started += 1
                    stack.push_async_callback(stop, asyncio.create_task(traffic.run()))

            async def listening() -> bool:
                return (await store.redis.pubsub_numsub(keys.TRAFFIC))[0][1] >= started

            await until(listening, "all workers listen")
            return made

        yield start


async def renewed(score: Callable[[], Awaitable[float]]) -> None:
    """Until what says how long a lease lasts went up: by itself it only goes down, or stays."""
    before = await score()

    async def more() -> bool:
        nonlocal before
        seen, before = before, await score()
        return before > seen

    await until(more, "the lease is renewed")


async def stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


# -- health ---------------------------------------------------------------------------------------------------------


async def test_a_healthy_model_without_limits_never_asks_redis(store: Store) -> None:
    traffic = Traffic(store, "w")
    await store.aclose()  # nothing could be asked
    for _ in range(100):
        assert (await call(traffic, route())).granted


async def test_a_cooldown_that_one_worker_learned_is_told_to_all(fleet: Fleet) -> None:
    # Nobody reads again: what the other one knows, it was told.
    first, second = await fleet(2, rules=replace(QUICK, refresh_s=600))
    to = route()
    assert (await call(first, to, "rate_limited", retry_after_s=30)).granted
    refused = await first.admit(to, "u", tokens=1)
    assert (refused.granted, refused.reason) == (False, "cooldown")
    await until(partial(refuses, second, to), "the other worker holds back too")
    refused = await second.admit(to, "u", tokens=1)
    assert 15 < refused.wait_s < 33
    assert (await second.admit(route(), "u", tokens=1)).granted, "another model is not concerned"
    (cooldown,) = [c for c in await second.cooldowns() if c.name == to.name and c.state == "held"]
    assert (cooldown.kind, cooldown.code, cooldown.reason) == ("model", "rate_limited", "cooldown")
    assert 15 < cooldown.for_s <= 30


async def test_a_provider_that_asks_for_a_day_is_asked_again_after_five_minutes(fleet: Fleet) -> None:
    (traffic,) = await fleet(1)
    to = route()
    await call(traffic, to, "rate_limited", retry_after_s=86_400)
    (cooldown,) = [c for c in await traffic.cooldowns() if c.name == to.name and c.state == "held"]
    assert 280 < cooldown.for_s <= 300


async def test_failures_in_a_row_open_the_breaker_for_all_and_successes_between_them_do_not(fleet: Fleet) -> None:
    first, second = await fleet(2, rules=STEADY)
    to, mixed = route(), route()
    for i in range(5):
        assert (await call((first, second)[i % 2], to, "overloaded")).granted, i
        await call(first, mixed, "overloaded")
        await call(first, mixed, "overloaded")
        await call(first, mixed)
        await call(first, mixed)
    for traffic in (first, second):
        await until(partial(refuses, traffic, to), "it knows")
        refused = await traffic.admit(to, "u", tokens=1)
        assert (refused.granted, refused.reason) == (False, "cooldown")
    # Ten of the last twenty is the other way to open it.
    assert not (await first.admit(mixed, "u", tokens=1)).granted
    healthy = route()
    for i in range(60):
        admitted = await call(first, healthy, "overloaded" if i % 3 == 0 else None)
        assert admitted.granted, i
    await call(first, healthy, "cut")
    await call(first, healthy, "cancelled")


async def test_a_refusal_of_content_and_a_cut_say_nothing_against_a_model(fleet: Fleet) -> None:
    (traffic,) = await fleet(1)
    to = route()
    for code in ("refused", "bad_request", "cut", "auth", "cancelled", "timeout_total") * 5:
        assert (await call(traffic, to, code)).granted
    assert [c for c in await traffic.cooldowns() if c.name == to.name] == []


async def test_a_host_that_cannot_be_reached_is_known_to_all_its_models(fleet: Fleet) -> None:
    first, second = await fleet(2, rules=STEADY)
    host = f"{keys.new_token().lower()}:8000"
    one, two, elsewhere = route(host=host), route(host=host), route()
    for _ in range(5):
        await call(first, one, "unreachable")

    await until(partial(refuses, second, two), "the other model of that host")
    assert (await second.admit(elsewhere, "u", tokens=1)).granted
    (cooldown,) = [c for c in await second.cooldowns() if c.name == host]
    assert (cooldown.kind, cooldown.state, cooldown.code) == ("host", "open", "unreachable")


async def opened(traffic: Traffic, to: Route, others: list[Traffic]) -> None:
    for _ in range(5):
        await call(traffic, to, "overloaded")

    async def all_know() -> bool:
        return not any([(await t.admit(to, "u", tokens=1, probe_ok=False)).granted for t in others])

    await until(all_know, "everybody knows that it is open")


async def probe_of(fleet: list[Traffic], to: Route, count: int = 50) -> tuple[Traffic, Admission]:
    """Asks with many at once until one is let through; exactly one is."""

    async def asked() -> list[tuple[Traffic, Admission]]:
        askers = [fleet[i % len(fleet)] for i in range(count)]
        got = await asyncio.gather(*(t.admit(to, f"u{i}", tokens=1) for i, t in enumerate(askers)))
        return [(t, a) for t, a in zip(askers, got, strict=True) if a.granted]

    through = await until(asked, "a probe is let through")
    assert len(through) == 1
    assert through[0][1].probe
    return through[0]


async def test_one_probe_of_fifty_is_let_through_and_its_success_closes_the_breaker_for_all(fleet: Fleet) -> None:
    workers = await fleet(3)
    to = route()
    await opened(workers[0], to, workers)
    traffic, probe = await probe_of(workers, to)
    for other in workers:
        refused = await other.admit(to, "u", tokens=1)
        assert (refused.granted, refused.reason) == (False, "cooldown")
        assert 0 < refused.wait_s < 1
    await traffic.alive(probe)  # the first token; the call itself goes on

    async def all_admit() -> bool:
        return all([(await t.admit(to, "u", tokens=1)).granted for t in workers])

    await until(all_admit, "the breaker is closed for all")
    await end(traffic, probe)
    assert [c for c in await traffic.cooldowns() if c.name == to.name] == []


async def clock_us(store: Store) -> int:
    """Redis's."""
    seconds, micros = await store.redis.time()
    return seconds * 1_000_000 + micros


async def test_a_probe_that_fails_doubles_the_wait(fleet: Fleet, store: Store) -> None:
    workers = await fleet(2, rules=replace(QUICK, backoff_s=0.5, backoff_max_s=3.0))
    to = route()
    await opened(workers[0], to, workers)
    for before_s, now_s in ((0.5, 1.0), (1.0, 2.0), (2.0, 3.0)):
        traffic, probe = await probe_of(workers, to, 10)
        before_us = await clock_us(store)
        await end(traffic, probe, "overloaded")
        after_us = await clock_us(store)
        (cooldown,) = [c for c in await traffic.cooldowns() if c.name == to.name]
        assert cooldown.state in {"open", "half-open"}
        until_us = int(await store.redis.hget(keys.traffic(f"model:{to.name}", "health"), "until"))
        # At a moment between the two, which may be far apart where the machine held one of us up.
        assert before_us + before_s * 1e6 < until_us <= after_us + now_s * 1e6


async def test_who_may_not_probe_waits_and_a_probe_that_says_nothing_leaves_it_to_the_next(fleet: Fleet) -> None:
    workers = await fleet(2)
    to = route()
    await opened(workers[0], to, workers)
    traffic, probe = await probe_of(workers, to, 10)
    await end(traffic, probe, "cancelled")
    assert not (await workers[0].admit(to, "u", tokens=1, probe_ok=False)).granted
    await probe_of(workers, to, 10)


async def test_the_probe_of_a_dead_worker_is_somebody_elses_in_the_end(fleet: Fleet, store: Store) -> None:
    workers = await fleet(2)
    (brief,) = await fleet(1, rules=replace(QUICK, lease_s=1.0))
    to = route()
    await opened(workers[0], to, [*workers, brief])
    # A worker that renews keeps its probe for longer than a lease lasts.
    holder, probe = await probe_of(workers, to, 4)
    await renewed(lambda: store.redis.pttl(keys.traffic(f"model:{to.name}", "probe")))
    assert not any([(await t.admit(to, "u", tokens=1)).granted for t in workers])
    await end(holder, probe, "overloaded")

    del probe  # who forgets an admission does not keep it
    _, forgotten = await probe_of([brief], to, 4)
    del forgotten
    await probe_of(workers, to, 4)


async def test_a_message_that_was_missed_is_made_up_for_by_reading_again(fleet: Fleet) -> None:
    first, second = await fleet(2)
    to = route()
    await call(first, to, "rate_limited", retry_after_s=30)

    await until(partial(refuses, second, to), "it is known")
    (late,) = await fleet(1)  # was not there when it was told

    await until(partial(refuses, late, to), "a worker that came later knows it too")


async def test_what_no_worker_understands_is_not_the_end_of_listening(fleet: Fleet, store: Store) -> None:
    first, second = await fleet(2)
    for nonsense in (b"\xff", b"[]", b"{}", b'{"subject":"model:x","now":"1","health":{"hold":"soon"}}'):
        await store.redis.publish(keys.TRAFFIC, nonsense)
    to = route()
    await call(first, to, "rate_limited", retry_after_s=30)

    await until(partial(refuses, second, to), "it still listens")


# -- limits ---------------------------------------------------------------------------------------------------------


Span = tuple[float, float]
"""When a call was asked for, and when it was granted: Redis granted it in between, at a moment nobody knows."""


async def jobs_of(
    traffic: Traffic,
    to: Route,
    user: str,
    *,
    goes_on: Callable[[], bool],
    got: list[Span],
    hold_s: float = 0,
    tokens: int = 1,
) -> None:
    """One caller that makes calls as long as the test goes on, waiting as it is told."""
    while goes_on():
        now = time.monotonic()
        admission = await traffic.admit(to, user, tokens=tokens)
        if not admission.granted:
            await asyncio.sleep(admission.wait_s)
            continue
        got.append((now, time.monotonic()))
        if hold_s:
            await asyncio.sleep(hold_s)
        await end(traffic, admission, tokens=tokens)


def lasting(span_s: float, enough: Callable[[], bool]) -> Callable[[], bool]:
    """For so long, and on until there was enough: while the machine holds the test up nothing is granted.

    What is granted far too slowly is still not enough when a patient test's time is over.
    """
    ends, gives_up = time.monotonic() + span_s, time.monotonic() + PATIENCE_S

    def goes_on() -> bool:
        now = time.monotonic()
        return now < ends or (now < gives_up and not enough())

    return goes_on


def most_within(spans: list[Span], window_s: float) -> int:
    """The largest number of calls that were certainly granted within one window.

    However long the machine held the test up: what was asked for before the window may have been granted before it.
    """
    return max(sum(asked >= start and at <= start + window_s for asked, at in spans) for start, _ in spans)


@pytest.mark.parametrize(("callers", "what"), [(12, "requests"), (12, "tokens")])
async def test_limits_are_held_within_5_percent_by_four_workers_at_once(fleet: Fleet, callers: int, what: str) -> None:
    window_s, limit, each = 2.0, 200, 10
    workers = await fleet(4, window_s=window_s)
    limits = {"requests_per_minute": limit} if what == "requests" else {"tokens_per_minute": limit * each}
    to = route(**limits)
    got: list[Span] = []
    used = limit * 2.5 * 0.5
    on = lasting(2.5 * window_s, lambda: len(got) >= used)
    await asyncio.gather(
        *(jobs_of(workers[i % 4], to, f"u{i % 3}", goes_on=on, got=got, tokens=each) for i in range(callers))
    )
    assert most_within(got, window_s) <= limit * 1.05
    assert len(got) >= used, "and what is allowed is used"


async def test_a_minute_is_a_minute_and_its_calls_are_spread_over_it(fleet: Fleet) -> None:
    workers = await fleet(4)
    a_second, at_once = 4, 240 * 0.04 + 1
    to = route(requests_per_minute=60 * a_second, tokens_per_minute=1_000_000)
    got: list[Span] = []
    seconds = 6
    used = a_second * seconds * 0.5
    on = lasting(seconds, lambda: len(got) >= used)
    await asyncio.gather(*(jobs_of(workers[i % 4], to, f"u{i}", goes_on=on, got=got) for i in range(8)))
    # What holds for each span holds for a whole minute, which then has 5 % too many at the most.
    for span_s in (0.5, 1, 2, 4, seconds):
        assert most_within(got, span_s) <= a_second * span_s + at_once
    assert len(got) >= used


async def test_tokens_are_charged_as_they_were_used_and_not_as_they_were_guessed(fleet: Fleet) -> None:
    (traffic,) = await fleet(1, window_s=60.0)
    to = route(tokens_per_minute=1000)
    guessed = await traffic.admit(to, "u", tokens=1000)
    assert guessed.granted
    refused = await traffic.admit(to, "u", tokens=1)
    assert (refused.granted, refused.reason) == (False, "tokens")
    assert refused.wait_s > 30
    await end(traffic, guessed, tokens=20)
    (fresh,) = await fleet(1, window_s=60.0)  # without the first one's memory of the refusal
    assert (await fresh.admit(to, "other", tokens=1)).granted
    # The other way round: what used more than was guessed is owed.
    second = route(tokens_per_minute=1000)
    cheap = await traffic.admit(second, "u", tokens=1)
    await end(traffic, cheap, tokens=500)
    owed = await traffic.admit(second, "u", tokens=1)
    assert (owed.granted, owed.reason) == (False, "tokens")
    assert 6 < owed.wait_s < 36


async def test_no_more_calls_run_at_once_than_are_allowed_and_no_fewer(fleet: Fleet) -> None:
    workers = await fleet(4)
    to = route(concurrency=7)
    running, most, done = 0, 0, 0

    async def caller(traffic: Traffic, user: str, goes_on: Callable[[], bool]) -> None:
        nonlocal running, most, done
        while goes_on():
            admission = await traffic.admit(to, user, tokens=1)
            if not admission.granted:
                assert admission.reason == "concurrency"
                await asyncio.sleep(admission.wait_s)
                continue
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.2)
            running -= 1
            done += 1
            await end(traffic, admission)

    turns = 7 * 2 / 0.2 * 0.2
    on = lasting(2, lambda: done >= turns)
    await asyncio.gather(*(caller(workers[i % 4], f"u{i % 2}", on) for i in range(28)))
    assert most == 7
    assert done >= turns


async def test_the_places_of_a_dead_worker_are_free_again_and_those_of_a_living_one_are_not(
    fleet: Fleet, store: Store
) -> None:
    (dead,) = await fleet(1, run=False)
    living, other = await fleet(2)
    to = route(concurrency=2)
    lost = await dead.admit(to, "u", tokens=1)
    kept = await living.admit(to, "u", tokens=1)
    assert lost.granted
    assert kept.granted
    assert not (await other.admit(to, "v", tokens=1)).granted

    async def place() -> Admission | None:
        admission = await other.admit(to, "v", tokens=1)
        return admission if admission.granted else None

    places = keys.traffic(f"model:{to.name}", "running")
    dies_us = await store.redis.zscore(places, lost.lease)
    await renewed(lambda: store.redis.zscore(places, kept.lease))
    assert await store.redis.zscore(places, lost.lease) == dies_us, "nobody renews it"
    await store.redis.zadd(places, {lost.lease: 1}, xx=True)  # as if that moment had come
    mine = await until(place, "the dead worker's place")
    assert not (await other.admit(to, "w", tokens=1)).granted
    await end(living, kept)
    await end(other, mine)
    await end(dead, lost)  # it was dead to us only; nothing is given back twice
    assert await store.redis.hgetall(keys.traffic(f"model:{to.name}", "held")) == {}
    assert await store.redis.zcard(keys.traffic(f"model:{to.name}", "running")) == 0


# -- fairness -------------------------------------------------------------------------------------------------------


async def one_of_the_few(traffic: Traffic, to: Route, user: str) -> None:
    while True:
        admission = await traffic.admit(to, user, tokens=1)
        if admission.granted:
            await end(traffic, admission)
            return
        await asyncio.sleep(admission.wait_s)


@pytest.mark.parametrize("limits", [{"concurrency": 4}, {"requests_per_minute": 1200}])
async def test_a_user_with_one_job_does_not_wait_behind_a_thousand_of_another(
    fleet: Fleet, limits: dict[str, int]
) -> None:
    one, two = await fleet(2)
    to = route(**limits)
    got: list[Span] = []
    # Twenty calls a second for a thousand: alone in a queue, the other user would wait for most of a minute.
    many = [jobs_of(one, to, "many", goes_on=lambda: True, got=got, hold_s=0.2) for _ in range(1000)]
    crowd = asyncio.gather(*many)
    await asyncio.sleep(0.7)
    before = len(got)
    passed: list[int] = []
    for traffic in (two, two, two, one):
        served_before = len(got)
        await one_of_the_few(traffic, to, "few")
        passed.append(len(got) - served_before)
    # About ten of the many each time. Counted, because the machine may hold all of us up.
    assert max(passed) < 300

    async def served() -> bool:
        return len(got) > before

    await until(served, "the many are served all the while")
    crowd.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await crowd


async def test_users_who_all_want_everything_get_the_same(fleet: Fleet) -> None:
    workers = await fleet(3, window_s=2.0)
    to = route(requests_per_minute=150)
    got: dict[str, list[Span]] = {"a": [], "b": [], "c": []}
    on = lasting(3, lambda: sum(map(len, got.values())) >= 150)
    # Not equal in numbers, nor in where they are.
    crowd = ["a"] * 60 + ["b"] * 10 + ["c"] * 3
    callers = [jobs_of(workers[i % 3], to, u, goes_on=on, got=got[u]) for i, u in enumerate(crowd)]
    await asyncio.gather(*callers)
    counts = Counter({user: len(times) for user, times in got.items()})
    assert min(counts.values()) > 0.5 * max(counts.values()), counts
    assert sum(counts.values()) > 150 * 1.5 * 0.3


# -- learned --------------------------------------------------------------------------------------------------------


async def test_a_429_halves_what_runs_at_once_in_the_whole_fleet_and_successes_raise_it(
    fleet: Fleet, store: Store
) -> None:
    workers = await fleet(2)
    to = route()
    running = [(t, await t.admit(to, "u", tokens=1)) for t in workers for _ in range(10)]
    assert all(a.granted for _, a in running)
    await end(*running.pop(), "rate_limited")

    async def learned(cap: int) -> bool:
        return cap in [c.concurrency for c in await workers[0].cooldowns() if c.name == to.name]

    # Half of the twenty of both workers, though only one of them met the refusal.
    await until(lambda: learned(10), "half of what runs in both")
    assert not any([(await t.admit(to, "u", tokens=1)).granted for t in workers])
    await store.redis.hset(keys.traffic(f"model:{to.name}", "health"), "cut", 0)  # as if that burst were long ago
    for _ in range(3):
        await end(*running.pop(), "rate_limited")
    await until(lambda: learned(5), "a burst of refusals counts once more")
    while running:
        await end(*running.pop())
    for _ in range(12):
        held = [await workers[0].admit(to, f"u{i}", tokens=1) for i in range(3)]
        assert all(a.granted for a in held)
        for admission in held:
            await end(workers[0], admission)
    assert await learned(5) is False
    caps = [c.concurrency for c in await workers[0].cooldowns() if c.concurrency and c.name == to.name]
    assert caps[0] in range(6, 10)


async def test_when_the_provider_says_that_nothing_is_left_all_wait_until_there_is(fleet: Fleet) -> None:
    first, second = await fleet(2)
    to = route()
    await call(first, to, rate=RateInfo(RateWindow(50, 7, 60.0), RateWindow(1000, 0, 8.0)))

    await until(partial(refuses, second, to), "the other worker waits too")
    refused = await first.admit(to, "u", tokens=1)
    assert (refused.granted, refused.reason) == (False, "tokens")
    assert 0 < refused.wait_s < 12, "the time told, and some more that spreads the callers"

    async def admitted() -> bool:
        return (await second.admit(to, "u", tokens=1)).granted

    await until(admitted, "until there is something left")


async def test_a_limit_that_is_not_reached_lets_everything_pass_and_a_second_report_changes_nothing(
    fleet: Fleet, store: Store
) -> None:
    (traffic,) = await fleet(1)
    to = route(concurrency=2)
    admission = await traffic.admit(to, "u", tokens=1)
    for _ in range(3):
        await end(traffic, admission)
    assert await store.redis.zcard(keys.traffic(f"model:{to.name}", "running")) == 0
    for _ in range(20):
        assert (await call(traffic, to)).granted
    refused = Admission(False, 1.0, "cooldown")
    await end(traffic, refused, "overloaded")


async def test_who_is_cancelled_while_asking_leaves_no_place_and_no_probe_behind(fleet: Fleet, store: Store) -> None:
    lasting = replace(QUICK, lease_s=600)
    (traffic,) = await fleet(1, rules=lasting)
    limited, broken = route(concurrency=1), route()
    # The server knows the scripts after a worker's first calls.
    await call(traffic, route(concurrency=1))
    await opened(traffic, broken, [traffic])
    _, probe = await probe_of([traffic], broken, 4)
    await end(traffic, probe, "cancelled")
    await asyncio.sleep(0.6)  # past the moment in which nobody here asks for the probe
    for to in (limited, broken):
        asking = asyncio.create_task(traffic.admit(to, "u", tokens=1))
        await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    async def nothing_left() -> bool:
        held = keys.traffic(f"model:{limited.name}", "running"), keys.traffic(f"model:{broken.name}", "probe")
        return await store.redis.exists(*held) == 0

    await until(nothing_left, "both are free, before they could have run out")


# -- without Redis --------------------------------------------------------------------------------------------------


async def test_jobs_go_on_without_redis_and_are_counted_again_with_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with running_store(tmp_path, append_only=False) as server:
        store = await Store.connect(server.url)
        traffic = Traffic(store, "w", rules=QUICK)
        task = asyncio.create_task(traffic.run())
        to = route(concurrency=1)
        before = await traffic.admit(to, "u", tokens=1)
        assert before.granted
        assert not (await traffic.admit(to, "u", tokens=1)).granted
        server.kill()
        async with asyncio.timeout(PATIENCE_S):
            going = [await call(traffic, to, user=f"u{i}") for i in range(50)]
        assert all(a.granted for a in going)
        assert "are not shared for now" in caplog.text
        server.start()

        async def limited_again() -> bool:
            admission = await traffic.admit(to, "late", tokens=1)
            if admission.granted:
                await end(traffic, admission)
            return not admission.granted

        # The call from before is renewed into the empty store, and fills the one place.
        await until(limited_again, "the limit holds again")
        await end(traffic, before)

        async def free_again() -> bool:
            return (await traffic.admit(to, "late", tokens=1)).granted

        await until(free_again, "and its place is given back")
        await stop(task)
        await store.aclose()
