"""Budgets at the door, usage over HTTP, from the library and at the terminal."""

from __future__ import annotations

import asyncio
import csv
import io
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pytest

from promptmill import AsyncProducer, Producer, keys
from promptmill.cli import exits
from promptmill.cli.app import run
from promptmill.contract import Done, Progress
from promptmill.errors import BadRequest, Overloaded
from promptmill.registry import Registry
from promptmill.settings import Budget, ModelConfig, Price, Settings, UserConfig
from promptmill.store import Claimed, Store
from promptmill.usage import book
from promptmill.usage.budgets import check_budget
from tests.support.gateway import running_gateway

REGISTRY = Registry(
    {"paid": ModelConfig(type="echo", price=Price(input=1, output=1)), "free": ModelConfig(type="echo")}
)


@pytest.fixture
def user() -> str:
    return f"u-{keys.new_job_id()}"


@pytest.fixture
async def use(store: Store, producer: AsyncProducer):
    """Have a user use tokens of a model, some of them at an early day."""

    async def used(user: str, tokens: int, model: str = "paid", day: str | None = None) -> None:
        job = await producer.submit("x", model="echo", user=user)
        token = keys.new_token()
        assert isinstance(await store.claim(job.id, token, "w", Progress(phase="started")), Claimed)
        at = f"{day}T12:00:00+00:00" if day else datetime.now(UTC).isoformat()
        usage = {"input_tokens": tokens, "output_tokens": 0, "estimated": False}
        one = {"attempt": 1, "claim": token, "model": model, "backend": "echo", "outcome": "succeeded", "usage": usage}
        one |= {"started_at": at, "finished_at": at}
        await store.finish(job.id, token, "succeeded", Done(text="x", attempt=1).to_json(), {"text": "x"}, [one])
        await book(store, REGISTRY, 1e6, [job.id])

    return used


def limited(redis_url: str, user: str, **limits: Any) -> Settings:
    return Settings(redis_url=redis_url, users={user: UserConfig(budget=Budget(**limits))})


@pytest.mark.parametrize("limits", [{"hard_usd": 0.001}, {"hard_tokens": 1000}])
async def test_past_a_hard_limit_a_job_is_refused_until_midnight(store, redis_url, use, user, limits) -> None:
    settings = limited(redis_url, user, **limits)
    await use(user, 999)
    assert await check_budget(store, settings, user) is None
    await use(user, 1)
    async with AsyncProducer(settings) as producer:
        with pytest.raises(Overloaded) as caught:
            await producer.submit("x", model="echo", user=user)
        await producer.submit("x", model="echo", user="somebody-else")
    error = caught.value
    assert (error.code, error.limit, error.retryable) == ("budget_exceeded", next(iter(limits.values())), False)
    assert error.retry_after_s is not None
    assert 0 < error.retry_after_s <= 24 * 3600
    assert user in error.message
    assert "UTC" in error.message or "Z" in error.message


async def test_a_job_that_is_stored_already_is_answered_whatever_the_budget_says(redis_url, use, user) -> None:
    async with AsyncProducer(limited(redis_url, user, hard_tokens=10)) as producer:
        first = await producer.submit("x", model="echo", user=user, idempotency_key="k")
        await use(user, 10)
        assert (await producer.submit("x", model="echo", user=user, idempotency_key="k")).id == first.id
        with pytest.raises(Overloaded):
            await producer.submit("x", model="echo", user=user, idempotency_key="another")


async def test_past_a_soft_limit_readers_are_warned_each_time_and_operators_once(store, redis_url, use, user) -> None:
    await use(user, 10)
    listener = store.redis.pubsub()
    await listener.subscribe(keys.OPERATORS)
    assert (await listener.get_message(timeout=60))["type"] == "subscribe"
    async with AsyncProducer(limited(redis_url, user, soft_tokens=10)) as producer:
        jobs = [await producer.submit("x", model="echo", user=user) for _ in range(2)]
        for job in jobs:
            async for event in job.events():
                assert isinstance(event, Progress)
                assert event.phase == "queued"
                assert event.message is not None
                assert "10 of 10 tokens" in event.message
                break
    await store.redis.publish(keys.OPERATORS, b'{"event":"last"}')
    told = []
    async with asyncio.timeout(60):
        while not told or told[-1]["event"] != "last":
            message = await listener.get_message(ignore_subscribe_messages=True, timeout=1)
            told += [orjson.loads(message["data"])] if message else []
    await listener.aclose()
    mine = [event for event in told if event.get("user") == user]
    assert [event["event"] for event in mine] == ["budget_soft"]


async def test_who_has_no_budget_is_not_looked_up(redis_url, user) -> None:
    class Nowhere:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"the store was asked: {name}")

    assert await check_budget(Nowhere(), Settings(redis_url=redis_url), user) is None  # type: ignore[arg-type]


async def test_the_library_reads_usage_in_both_ways(redis_url, settings, use, user) -> None:
    await use(user, 5)
    await use(user, 7, model="free")
    async with AsyncProducer(settings) as producer:
        report = await producer.usage(user=user)
        with pytest.raises(BadRequest, match="by"):
            await producer.usage(by="colour")
    assert [(row.group["model"], row.sums.input_tokens) for row in report.rows] == [("paid", 5), ("free", 7)]
    assert (report.total.tokens, report.total.unpriced, report.total.cost_usd) == (12, 1, 5e-6)

    def read() -> Any:
        with Producer(settings) as producer:
            return producer.usage("today", "today", ["user"], user)

    assert (await asyncio.to_thread(read)).rows[0].sums.tokens == 12


async def test_days_are_kept_apart_and_added_up(settings, use, user) -> None:
    await use(user, 3, day="1975-05-01")
    await use(user, 4, day="1975-05-02")
    async with AsyncProducer(settings) as producer:
        both = await producer.usage("1975-05-01", "1975-05-02", "day", user)
        one = await producer.usage("1975-05-02", "1975-05-02", "", user)
    assert [(row.group["day"], row.sums.tokens) for row in both.rows] == [("1975-05-01", 3), ("1975-05-02", 4)]
    assert (both.total.tokens, one.total.tokens, one.rows[0].group) == (7, 4, {})


# -- HTTP -----------------------------------------------------------------------------------------------------------


async def test_usage_over_http_is_that_of_the_library(settings, use, user) -> None:
    await use(user, 5, day="1976-01-01")
    async with running_gateway(settings) as front:
        answer = await front.http.get(
            "/v1/usage", params={"from": "1976-01-01", "to": "1976-01-01", "by": "user,day", "user": user}
        )
        bad = [
            await front.http.get("/v1/usage", params=p) for p in ({"from": "never"}, {"by": "x"}, {"to": "1976-13-01"})
        ]
    sums = {
        "attempts": 1,
        "failed": 0,
        "input_tokens": 5,
        "output_tokens": 0,
        "cache_read_tokens": 0,
        "cache_write_tokens": 0,
        "estimated": 0,
        "unpriced": 0,
        "cost_usd": 5e-6,
    }
    assert answer.status_code == 200
    assert answer.json() == {
        "from": "1976-01-01",
        "to": "1976-01-01",
        "by": ["user", "day"],
        "rows": [{"user": user, "day": "1976-01-01", **sums}],
        "total": sums,
    }
    assert [(b.status_code, b.json()["code"], b.json()["field"]) for b in bad] == [
        (400, "bad_request", "from"),
        (400, "bad_request", "by"),
        (400, "bad_request", "to"),
    ]


async def test_with_keys_a_user_sees_their_own_usage_only(redis_url, use, monkeypatch) -> None:
    ann, bob = f"ann-{keys.new_job_id()}", f"bob-{keys.new_job_id()}"
    monkeypatch.setenv("TEST_KEY_ANN", "key-ann")
    settings = Settings(redis_url=redis_url, api_keys={ann: {"key_env": "TEST_KEY_ANN"}})  # type: ignore[dict-item]
    await use(ann, 3)
    await use(bob, 4)
    async with running_gateway(settings) as front:
        mine = {"authorization": "Bearer key-ann"}
        own = (await front.http.get("/v1/usage", params={"by": "user"}, headers=mine)).json()
        others = await front.http.get("/v1/usage", params={"user": bob}, headers=mine)
        nobody = await front.http.get("/v1/usage")
    assert [row["user"] for row in own["rows"]] == [ann]
    assert own["total"]["input_tokens"] == 3
    assert (others.status_code, nobody.status_code) == (403, 401)


async def test_a_spent_budget_is_a_429_with_the_time_to_come_back(redis_url, use, user) -> None:
    await use(user, 10)
    async with running_gateway(limited(redis_url, user, hard_tokens=10)) as front:
        answer = await front.http.post("/v1/jobs", json={"prompt": "x", "model": "echo", "user": user})
    assert answer.status_code == 429
    assert answer.json()["code"] == "budget_exceeded"
    assert answer.json()["limit"] == 10
    assert 0 < int(answer.headers["retry-after"]) <= 24 * 3600


# -- the terminal ---------------------------------------------------------------------------------------------------


@pytest.fixture
def terminal(redis_url, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Run a command line; answers its exit code and what it wrote."""
    config = tmp_path / "promptmill.toml"
    config.write_text(f'redis_url = "{redis_url}"\n')

    async def ran(*arguments: str) -> tuple[int, str, str]:
        code = await asyncio.to_thread(run, [*arguments, "--config", str(config)])
        written = capsys.readouterr()
        return code, written.out, written.err

    return ran


async def test_the_terminal_shows_a_table_json_csv_and_a_chart(terminal, use) -> None:
    day, span = "1977-07-07", ("--from", "1977-07-07", "--to", "1977-07-07")
    await use("[red]ann", 3_000_000, day=day)
    await use("bob", 1_000_000, day=day)
    await use("bob", 9, model="free", day=day)
    code, text, _ = await terminal("usage", *span)
    assert code == exits.OK
    lines = [line.split() for line in text.splitlines() if line.strip(" ─")]
    heading = "user model attempts failed input output cache read cache write estimated dollars"
    assert " ".join(lines[0]) == heading
    assert lines[1:] == [
        ["[red]ann", "paid", "1", "0", "3000000", "0", "0", "0", "0", "3.000000"],
        ["bob", "paid", "1", "0", "1000000", "0", "0", "0", "0", "1.000000"],
        ["bob", "free", "1", "0", "9", "0", "0", "0", "0", "?"],
        ["total", "3", "0", "4000009", "0", "0", "0", "0", "4.000000+?"],
    ]
    _, text, _ = await terminal("usage", *span, "--by", "user", "--json")
    assert [(row["user"], row["cost_usd"]) for row in json.loads(text)["rows"]] == [("[red]ann", 3.0), ("bob", 1.0)]
    _, text, _ = await terminal("usage", *span, "--by", "model,user", "--csv", "--user", "bob")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [(row["model"], row["user"], row["input_tokens"]) for row in rows] == [
        ("paid", "bob", "1000000"),
        ("free", "bob", "9"),
    ]
    _, text, _ = await terminal("usage", *span, "--by", "user", "--chart")
    bars = {line.split()[0]: line.count("█") for line in text.splitlines()}
    assert bars == {"[red]ann": 40, "bob": 13}


async def test_the_terminal_verifies_and_exits_with_1_where_a_sum_was_changed(terminal, store, use) -> None:
    day = "1978-08-08"
    await use("ann", 3, day=day)
    code, text, _ = await terminal("usage", "verify", "--from", day, "--to", day)
    assert (code, text) == (exits.OK, f"the sums match the ledger: {day}, 1 entry\n")
    await store.redis.hincrby(keys.ledger_sums(day), "user_tokens:ann", 1)
    code, text, _ = await terminal("usage", "verify", "--from", day, "--to", day)
    assert code == exits.FAILED
    assert text.splitlines()[1:] == [f"{day} user_tokens:ann: 4, but the entries make 3"]
    code, text, _ = await terminal("usage", "verify", "--from", day, "--to", day, "--json")
    assert code == exits.FAILED
    assert json.loads(text)["differences"] == [{"day": day, "field": "user_tokens:ann", "expected": 3, "found": 4}]
    await store.redis.hincrby(keys.ledger_sums(day), "user_tokens:ann", -1)


async def test_the_terminal_says_what_is_wrong_with_a_day_a_group_or_two_forms_at_once(terminal) -> None:
    code, _, error = await terminal("usage", "--from", "2026-02-30")
    assert (code, error.startswith("error [bad_request]: from:")) == (exits.USAGE, True)
    code, _, error = await terminal("usage", "--by", "x")
    assert (code, error.startswith("error [bad_request]: by:")) == (exits.USAGE, True)
    code, _, error = await terminal("usage", "--json", "--csv")
    assert (code, "--chart" in error) == (exits.USAGE, True)
    code, text, _ = await terminal("usage", "--from", "1971-01-01", "--to", "1971-01-01")
    assert (code, text) == (exits.OK, "no usage\n")
