"""Each script of a batch: once, repeated after a lost reply, and too late; over every kind of store.

Beside :mod:`tests.conformance.test_event_log`: what another store must show is that it passes both unchanged.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import orjson
import pytest

from promptmill import keys
from promptmill.batch import scripts
from promptmill.batch.ends import ended_line, gone_line
from promptmill.batch.store import count, names, run
from promptmill.batch.view import FIELDS, View
from promptmill.store import Store
from promptmill.usage.booking import run_all
from tests.support.fake_store import fake_store

HOUR_MS = 3_600_000
OK = {"text": "x", "model": "m"}
USED = [{"usage": {"input_tokens": 2, "output_tokens": 7}, "cost_usd": 0.5}]


@pytest.fixture(params=["valkey", "fakeredis"])
async def store(request: pytest.FixtureRequest) -> AsyncGenerator[Store]:
    """Each kind of store, connected."""
    made = fake_store() if request.param == "fakeredis" else await Store.connect(request.getfixturevalue("redis_url"))
    yield made
    await made.aclose()


async def created(store: Store, *, lines: int = 0, sealed: bool = False, expires_ms: int = HOUR_MS) -> str:
    batch_id = keys.new_job_id()
    assert await run(store, scripts.CREATE, batch_id, b'{"a":1}', expires_ms, HOUR_MS) == [b"created"]
    for first in range(0, lines, 100):
        many = min(100, lines - first)
        assert (await run(store, scripts.ADD, batch_id, first // 100, first, many, b"data"))[0] == b"ok"
    if sealed:
        assert await run(store, scripts.SEAL, batch_id, lines) == [b"ok", lines]
    return batch_id


async def fed(store: Store, lines: int, *, sealed: bool = True) -> str:
    """A batch all of whose lines have jobs."""
    batch_id = await created(store, lines=lines, sealed=sealed)
    assert await run(store, scripts.TAKE, batch_id, "t") in {b"running", b"uploading"}
    assert await run(store, scripts.RESERVE, batch_id, "t", 0, lines) == 1
    assert await run(store, scripts.SENT, batch_id, "t", lines) == 1
    return batch_id


async def view(store: Store, batch_id: str) -> View:
    found = View.read(await store.wire.call("HMGET", keys.batch(batch_id), *FIELDS))
    assert found is not None
    return found


async def numbers(store: Store, batch_id: str, *fields: str) -> list[int]:
    return [int(n or 0) for n in await store.wire.call("HMGET", keys.batch(batch_id), *fields)]


async def ended(store: Store, batch_id: str) -> list[bytes]:
    return await store.wire.call("LRANGE", keys.batch_ended(batch_id), 0, -1)


def succeeded(index: int) -> bytes:
    return ended_line(index, "succeeded", OK, USED)


async def test_a_batch_that_is_there_is_not_made_again(store: Store) -> None:
    batch_id = await created(store, lines=3)
    assert await run(store, scripts.CREATE, batch_id, b'{"b":2}', 1, 1) == [b"exists", b'{"a":1}']
    assert (await view(store, batch_id)).lines == 3


async def test_chunks_come_in_order_and_each_once(store: Store) -> None:
    batch_id = await created(store)
    assert await run(store, scripts.ADD, batch_id, 1, 100, 100, b"later") == [b"gap", 0]
    assert await run(store, scripts.ADD, batch_id, 0, 0, 100, b"first") == [b"ok", 100]
    assert await run(store, scripts.ADD, batch_id, 0, 0, 100, b"other") == [b"ok", 100]
    assert await store.wire.call("HGET", keys.batch_lines(batch_id), 0) == b"first"


async def test_the_last_chunk_may_grow_and_never_shrinks(store: Store) -> None:
    batch_id = await created(store)
    assert await run(store, scripts.ADD, batch_id, 0, 0, 3, b"three") == [b"ok", 3]
    assert await run(store, scripts.ADD, batch_id, 0, 0, 5, b"five") == [b"ok", 5]
    assert await run(store, scripts.ADD, batch_id, 0, 0, 3, b"three") == [b"ok", 5]
    assert await store.wire.call("HGET", keys.batch_lines(batch_id), 0) == b"five"


async def test_a_sealed_batch_takes_no_more_lines_but_answers_repetitions(store: Store) -> None:
    batch_id = await created(store, lines=5)
    assert await run(store, scripts.SEAL, batch_id, 4) == [b"wrong", 5]
    assert await run(store, scripts.SEAL, batch_id, 5) == [b"ok", 5]
    assert await run(store, scripts.SEAL, batch_id, 5) == [b"ok", 5]
    assert await run(store, scripts.ADD, batch_id, 0, 0, 5, b"data") == [b"ok", 5]
    assert await run(store, scripts.ADD, batch_id, 0, 0, 6, b"data") == [b"sealed", 5]


async def test_nothing_is_made_of_a_batch_that_is_gone(store: Store) -> None:
    batch_id = keys.new_job_id()
    assert (await run(store, scripts.ADD, batch_id, 0, 0, 1, b"x"))[0] == b"missing"
    assert (await run(store, scripts.SEAL, batch_id, 1))[0] == b"missing"
    assert await run(store, scripts.TAKE, batch_id, "t") == b""
    assert await run(store, scripts.RESERVE, batch_id, "t", 0, 1) == 0
    assert await run(store, scripts.SENT, batch_id, "t", 1) == 0
    assert await run(store, scripts.LINK, batch_id, "t", 0, 1) == [scripts.NOT_YOURS]
    assert await count(store, batch_id, [succeeded(0)]) == (0, "")
    assert await run(store, scripts.STOP, batch_id, "cancelled") == b""
    assert await run(store, scripts.FREED, batch_id, 1) == 0
    assert await run(store, scripts.RETRY, batch_id, "new") == b""
    assert await store.wire.call("EXISTS", *names(batch_id)) == 0


async def test_only_who_took_a_batch_last_feeds_it(store: Store) -> None:
    batch_id = await created(store, lines=10, sealed=True)
    await run(store, scripts.TAKE, batch_id, "old")
    assert await run(store, scripts.RESERVE, batch_id, "old", 0, 4) == 1
    await run(store, scripts.TAKE, batch_id, "new")
    assert await run(store, scripts.SENT, batch_id, "old", 4) == 0
    assert await run(store, scripts.RESERVE, batch_id, "old", 4, 8) == 0
    assert await run(store, scripts.LINK, batch_id, "old", 0, 5) == [scripts.NOT_YOURS]
    assert (await view(store, batch_id)).sent == 0


async def test_no_line_is_reserved_twice_or_before_those_below_it_were_sent(store: Store) -> None:
    batch_id = await created(store, lines=10, sealed=True)
    await run(store, scripts.TAKE, batch_id, "t")
    assert await run(store, scripts.RESERVE, batch_id, "t", 0, 4) == 1
    assert await run(store, scripts.RESERVE, batch_id, "t", 0, 4) == 0
    assert await run(store, scripts.RESERVE, batch_id, "t", 4, 8) == 0, "0 to 4 were not noted as sent"
    assert await run(store, scripts.SENT, batch_id, "t", 4) == 1
    assert await run(store, scripts.SENT, batch_id, "t", 2) == 1, "a late repetition takes nothing back"
    assert await run(store, scripts.RESERVE, batch_id, "t", 4, 11) == 0, "there are 10"
    assert await run(store, scripts.RESERVE, batch_id, "t", 4, 10) == 1
    assert (await view(store, batch_id)).fed == 10


async def test_a_line_is_counted_once_however_often_it_is_told(store: Store) -> None:
    batch_id = await fed(store, 3)
    assert await count(store, batch_id, [succeeded(1), succeeded(1)]) == (1, "running")
    assert await count(store, batch_id, [succeeded(1), gone_line(1)]) == (0, "running")
    assert await numbers(store, batch_id, "succeeded", "failed", "output_tokens", "cost_nano", "model:m") == [
        *(1, 0, 7, 500_000_000, 1)
    ]
    assert await ended(store, batch_id) == [b"1"]


async def test_many_who_count_the_same_lines_at_once_count_each_once(store: Store) -> None:
    batch_id = await fed(store, 50)
    lines = [succeeded(index) for index in range(50)]
    counted = await asyncio.gather(*(count(store, batch_id, lines) for _ in range(8)))
    assert sum(new for new, _ in counted) == 50
    assert sorted(await ended(store, batch_id), key=int) == [b"%d" % index for index in range(50)]


async def test_a_batch_ends_with_its_last_line_and_then_counts_nothing_more(store: Store) -> None:
    batch_id = await fed(store, 2)
    assert await count(store, batch_id, [succeeded(0)]) == (1, "running")
    assert await count(store, batch_id, [gone_line(1)]) == (1, "completed")
    assert await count(store, batch_id, [gone_line(0), gone_line(1)]) == (0, "completed")
    assert await numbers(store, batch_id, "succeeded", "failed", "code:not_found") == [1, 1, 1]


async def test_a_batch_whose_lines_ended_before_it_was_sealed_ends_when_it_is(store: Store) -> None:
    batch_id = await fed(store, 2, sealed=False)
    assert await count(store, batch_id, [succeeded(0), succeeded(1)]) == (2, "uploading")
    assert await run(store, scripts.SEAL, batch_id, 2) == [b"ok", 2]
    assert (await view(store, batch_id)).state == "completed"


async def test_an_equal_line_ends_with_the_first_one_and_costs_nothing(store: Store) -> None:
    batch_id = await fed(store, 4)
    link: list[Any] = [0, 1, 0, 3]
    assert await run(store, scripts.LINK, batch_id, "t", *link) == [1, 1]
    assert await run(store, scripts.LINK, batch_id, "t", *link) == [1, 1], "repeated it changes nothing"
    assert (await view(store, batch_id)).in_flight == 2
    assert await count(store, batch_id, [succeeded(0)]) == (3, "running")
    assert await ended(store, batch_id) == [b"0", b"1:0", b"3:0"]
    fields = ("succeeded", "linked", "output_tokens", "model:m")
    assert await numbers(store, batch_id, *fields) == [3, 0, 7, 3]
    assert await run(store, scripts.LINK, batch_id, "t", *link) == [1, 1], "a late repetition too"
    assert await count(store, batch_id, [succeeded(2)]) == (1, "completed")


async def test_an_equal_line_behind_the_end_of_the_first_one_is_to_be_counted_by_itself(store: Store) -> None:
    batch_id = await fed(store, 2)
    await count(store, batch_id, [succeeded(0)])
    assert await run(store, scripts.LINK, batch_id, "t", 0, 1) == [scripts.COUNT_NOW]


async def test_no_more_lines_wait_for_an_equal_one_than_one_script_can_end(store: Store) -> None:
    many = scripts.LINKED_MAX + 2
    batch_id = await fed(store, many)
    pairs = [part for index in range(1, many) for part in (0, index)]
    outcomes = await run(store, scripts.LINK, batch_id, "t", *pairs)
    assert outcomes == [scripts.LINKED] * scripts.LINKED_MAX + [scripts.LINKS_FULL]
    assert await count(store, batch_id, [succeeded(0)]) == (many - 1, "running")


async def test_cancelling_counts_what_never_ran_at_once_and_the_rest_when_it_ended(store: Store) -> None:
    batch_id = await created(store, lines=10)
    await run(store, scripts.TAKE, batch_id, "t")
    await run(store, scripts.RESERVE, batch_id, "t", 0, 2)
    await run(store, scripts.SENT, batch_id, "t", 2)
    assert await run(store, scripts.STOP, batch_id, "cancelled") == b"cancelling"
    assert await run(store, scripts.STOP, batch_id, "cancelled") == b"cancelling"
    assert await run(store, scripts.STOP, batch_id, "expired") == b"cancelling", "the first reason stays"
    assert await numbers(store, batch_id, "cancelled", "total", "code:cancelled") == [8, 10, 8]
    assert await run(store, scripts.RESERVE, batch_id, "t", 2, 4) == 0
    assert (await run(store, scripts.ADD, batch_id, 0, 0, 11, b"x"))[0] == b"cancelling"
    assert await count(store, batch_id, [succeeded(5)]) == (0, "cancelling"), "it was counted with the others"
    assert await count(store, batch_id, [succeeded(0)]) == (1, "cancelling")
    assert await count(store, batch_id, [ended_line(1, "cancelled", {}, [])]) == (1, "cancelled")
    assert await numbers(store, batch_id, "succeeded", "cancelled") == [1, 9]
    assert await run(store, scripts.STOP, batch_id, "cancelled") == b"cancelled"


async def test_a_batch_without_lines_that_run_is_cancelled_at_once(store: Store) -> None:
    assert await run(store, scripts.STOP, await created(store), "cancelled") == b"cancelled"
    assert await run(store, scripts.STOP, await created(store, lines=3, sealed=True), "cancelled") == b"cancelled"


async def test_a_batch_expires_at_its_deadline_and_not_before(store: Store) -> None:
    batch_id = await created(store, lines=3)
    assert await run(store, scripts.STOP, batch_id, "expired") == b"early"
    overdue = await created(store, lines=3, expires_ms=0)
    assert await run(store, scripts.STOP, overdue, "expired") == b"expired"
    assert await numbers(store, overdue, "expired", "code:expired", "cancelled") == [3, 3, 0]


async def test_a_completed_batch_is_neither_cancelled_nor_expired(store: Store) -> None:
    batch_id = await fed(store, 1)
    await count(store, batch_id, [succeeded(0)])
    assert await run(store, scripts.STOP, batch_id, "cancelled") == b"completed"
    assert await numbers(store, batch_id, "cancelled") == [0]


async def test_the_retry_of_a_batch_has_one_id_and_only_once_the_batch_has_ended(store: Store) -> None:
    batch_id = await fed(store, 1)
    assert await run(store, scripts.RETRY, batch_id, "early") == b""
    await count(store, batch_id, [gone_line(0)])
    assert await run(store, scripts.RETRY, batch_id, "first") == b"first"
    assert await run(store, scripts.RETRY, batch_id, "second") == b"first"


async def test_every_key_of_a_batch_lives_as_long_as_the_batch(store: Store) -> None:
    batch_id = await fed(store, 4)
    await run(store, scripts.LINK, batch_id, "t", 0, 1)
    await count(store, batch_id, [succeeded(2)])
    running = [await store.wire.call("PTTL", name) for name in names(batch_id)]
    assert all(2 * HOUR_MS < ttl <= 27 * HOUR_MS for ttl in running), running
    await run(store, scripts.LINK, batch_id, "t", 3, 1)
    await count(store, batch_id, [succeeded(0), succeeded(3)])
    assert (await view(store, batch_id)).state == "completed"
    left = [await store.wire.call("PTTL", name) for name in names(batch_id)]
    there = [ttl for ttl in left if ttl != -2]  # the last equal line took its key with it
    assert len(there) == 4
    assert all(0 < ttl <= HOUR_MS for ttl in there), there


async def test_a_lease_is_held_by_one_token_and_given_up_by_it_alone(store: Store) -> None:
    lease = keys.new_token()

    async def act(script: Any, *args: str) -> int:
        return (await run_all(store, script, [((lease,), args)]))[0]

    assert await act(scripts.LEASE, "a", "60000") == 1
    assert await act(scripts.LEASE, "a", "60000") == 1
    assert await act(scripts.LEASE, "b", "60000") == 0
    assert await act(scripts.RELEASE, "b") == 0
    assert await act(scripts.RELEASE, "a") == 1
    assert await act(scripts.RELEASE, "a") == 0
    assert await act(scripts.LEASE, "b", "60000") == 1
    assert await act(scripts.RELEASE, "b") == 1


def test_the_argument_of_the_count_sums_what_all_attempts_used() -> None:
    tries = [*USED, {"usage": {"input_tokens": 1, "estimated": True}}, {"outcome": "unreachable"}]
    fields = orjson.loads(ended_line(7, "failed", {"error": {"code": "cut"}, "model": "m"}, tries))
    assert fields == [7, "failed", 3, 7, 0, 0, 500_000_000, 1, 1, "cut", "m", -1]
