"""``producer.batch``: requests in and results out, both lazily, on a real worker."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from promptmill import AsyncProducer, BadRequest, BatchResult, JobRequest, Producer, PromptmillError
from promptmill.batch import BatchStatus
from promptmill.errors import Overloaded
from promptmill.settings import Settings, load_settings
from tests.support.processes import wait_until
from tests.support.store import StoreServer, keys_without_ttl, running_store
from tests.support.worker import QUICK, WorkerProcess, worker_process

MODELS = """
[models.fast]
type = "echo"
[models.slow]
type = "echo"
options = { tokens_per_s = 20, repeat = 1000 }
[models.dear]
type = "echo"
options = { tokens_per_s = 20 }
price = { input = 0, output = 10000 }
[models.broken]
type = "echo"
options = { fault = "cut", fault_after = 0 }
"""

LONG = "word " * 6
"""Minutes of ``slow``."""


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Generator[tuple[StoreServer, Path]]:
    """One store and one worker for the module."""
    directory = tmp_path_factory.mktemp("library")
    with running_store(directory) as server:
        path = directory / "library.toml"
        path.write_text(f'redis_url = "{server.url}"\n{QUICK}concurrency = 50\n{MODELS}')
        with worker_process(path):
            yield server, path
        assert keys_without_ttl(server.url) == []


@pytest.fixture
def settings(ground: tuple[StoreServer, Path]) -> Settings:
    return load_settings(ground[1])


@pytest.fixture
async def producer(settings: Settings) -> AsyncGenerator[AsyncProducer]:
    async with AsyncProducer(settings) as made:
        yield made


def texts(results: list[BatchResult]) -> dict[int, str | None]:
    return {result.index: result.job.text if result.job else None for result in results}


async def the_batch(producer: AsyncProducer, user: str) -> BatchStatus:
    (status,) = await producer.batches.list(user)
    return status


async def test_every_item_has_its_result_whatever_form_it_came_in(producer) -> None:
    items: list[Any] = [
        "a prompt",
        {"prompt": "fields", "id": "mine", "model": "fast"},
        {"messages": [{"role": "user", "content": "messages"}]},
        JobRequest.model_validate({"prompt": "a request", "model": "fast", "user": "forms"}),
    ]
    results = [r async for r in producer.batch(items, model="fast", user="forms", name="n")]
    assert texts(results) == {0: "a prompt", 1: "fields", 2: "messages", 3: "a request"}
    assert {r.index: r.id for r in results} == {0: "0", 1: "mine", 2: "2", 3: "3"}
    status = await the_batch(producer, "forms")
    assert (status.state, status.total, status.name) == ("completed", 4, "n")


async def test_more_items_than_are_taken_ahead(producer) -> None:
    taken = 0

    def source() -> Iterator[str]:
        nonlocal taken
        for i in range(230):
            taken = i + 1
            yield f"say {i}"

    results: list[BatchResult] = []
    async with aclosing(producer.batch(source(), model="fast", ahead=30)) as batch:
        async for result in batch:
            assert taken <= len(results) + 1 + 30 + 1, "the source runs ahead of who reads"
            results.append(result)
    assert texts(results) == {i: f"say {i}" for i in range(230)}


async def test_a_source_that_waits_for_results_gets_them(producer) -> None:
    """Each item is made of the result before it: nothing may wait for a chunk to be full."""
    answers: asyncio.Queue[str] = asyncio.Queue()

    async def source() -> AsyncGenerator[str]:
        yield "0"
        for _ in range(4):
            yield str(int(await answers.get()) + 1)

    results: list[BatchResult] = []
    async for result in producer.batch(source(), model="fast"):
        assert result.job
        answers.put_nowait(result.job.text)
        results.append(result)
    assert texts(results) == {i: str(i) for i in range(5)}


async def test_no_items_make_no_results(producer) -> None:
    assert [r async for r in producer.batch([], model="fast", user="nobody")] == []
    assert (await the_batch(producer, "nobody")).state == "cancelled"


async def test_a_failed_item_is_a_result_too(producer) -> None:
    items = [{"prompt": "well", "model": "fast"}, {"prompt": "ill", "model": "broken"}]
    results = {r.index: r async for r in producer.batch(items)}
    assert results[0].job
    assert results[1].job
    assert (results[0].job.state, results[1].job.state) == ("succeeded", "failed")
    assert results[1].job.error
    assert results[1].job.error.code == "cut"


async def test_equal_items_run_once_where_that_is_asked_for(producer) -> None:
    items = [f"say {i % 3}" for i in range(60)]
    results = [r async for r in producer.batch(items, model="fast", dedupe=True, user="twins")]
    assert texts(results) == {i: f"say {i % 3}" for i in range(60)}
    assert len({r.job.id for r in results if r.job}) == 3
    assert (await the_batch(producer, "twins")).usage.output_tokens == 3 * 2


@pytest.mark.parametrize(
    ("bad", "field", "code"),
    [
        ({"prompt": "x", "max_token": 3}, "items[60].max_token", "bad_request"),
        ({"prompt": " "}, "items[60].request", "bad_request"),
        ({"prompt": "x", "model": "nobody"}, None, "unknown_model"),
    ],
)
async def test_a_wrong_item_names_its_place_and_cancels_what_came_before(producer, bad, field, code) -> None:
    user = f"wrong-{code}-{field}"
    items = [*({"prompt": LONG, "model": "slow"} for _ in range(60)), bad]
    with pytest.raises(BadRequest) as caught:
        await anext(producer.batch(items, user=user))
    assert caught.value.code == code
    if field is not None:
        assert caught.value.field == field
    await until(producer, user, "cancelled")


async def until(producer: AsyncProducer, user: str, state: str) -> None:
    async def there() -> bool:
        return state in {status.state for status in await producer.batches.list(user)}

    await wait_until(there, f"the batch is {state}")


async def test_a_source_that_fails_fails_the_loop_with_its_own_error(producer) -> None:
    def source() -> Iterator[str]:
        yield "one"
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        async for _ in producer.batch(source(), model="slow", user="source"):
            pass
    await until(producer, "source", "cancelled")


async def test_leaving_the_loop_cancels_the_rest(producer) -> None:
    items = [{"prompt": "quick", "model": "fast"}, *({"prompt": LONG, "model": "slow"} for _ in range(99))]
    async with aclosing(producer.batch(items, user="leaver")) as batch:
        async for result in batch:
            assert result.index == 0
            break
    await until(producer, "leaver", "cancelled")
    assert (await the_batch(producer, "leaver")).succeeded == 1


async def test_a_batch_that_somebody_cancels_ends_the_loop_with_an_error(producer) -> None:
    batch = producer.batch([{"prompt": LONG, "model": "slow"}] * 30, user="stopped")
    waiting = asyncio.create_task(anext(batch))
    await until(producer, "stopped", "running")
    await producer.batches.cancel((await the_batch(producer, "stopped")).id)
    with pytest.raises(PromptmillError) as caught:
        await anything_more(waiting, batch)
    assert caught.value.code == "cancelled"


async def test_a_batch_that_costs_more_than_it_may_ends_the_loop_with_an_error(producer) -> None:
    batch = producer.batch([f"say {i}" for i in range(500)], model="dear", max_cost_usd=0.03)
    first = await anext(batch)
    assert first.job is not None
    assert first.job.text == f"say {first.index}"
    waiting = asyncio.create_task(anext(batch))
    with pytest.raises(Overloaded, match=r"over 0\.03") as caught:
        await anything_more(waiting, batch)
    assert caught.value.code == "budget_exceeded"


async def anything_more(first: asyncio.Task[BatchResult], batch: AsyncGenerator[BatchResult]) -> None:
    """What was running when it was cancelled has a result; behind those comes the error."""
    await first
    async for _ in batch:
        pass


@pytest.mark.parametrize("items", ["a prompt", {"prompt": "x"}])
async def test_one_value_is_not_taken_for_many(producer, items) -> None:
    with pytest.raises(BadRequest, match="list or a generator"):
        await anext(producer.batch(items, model="fast"))


def test_without_an_event_loop_it_is_a_generator(settings: Settings) -> None:
    with Producer(settings) as producer:
        results = list(producer.batch((f"say {i}" for i in range(120)), model="fast"))
        assert texts(results) == {i: f"say {i}" for i in range(120)}
        with contextlib.closing(producer.batch([LONG] * 10, model="slow", user="sync leaver")) as batch:
            assert batch is not None
        with pytest.raises(BadRequest):
            list(producer.batch([{"prompt": ""}], model="fast"))


async def test_a_loop_outlasts_a_restart_of_the_store(tmp_path: Path) -> None:
    with running_store(tmp_path) as server:
        path = tmp_path / "own.toml"
        path.write_text(
            f'redis_url = "{server.url}"\n{QUICK}concurrency = 5\n'
            '[models.steady]\ntype = "echo"\noptions = { tokens_per_s = 20 }\n'
        )
        worker: WorkerProcess
        with worker_process(path) as worker:
            async with AsyncProducer(load_settings(path)) as producer:
                results: list[BatchResult] = []
                async for result in producer.batch((f"say it {i}" for i in range(40)), model="steady", ahead=20):
                    results.append(result)
                    if len(results) == 10:
                        server.kill()
                        server.start()
                assert texts(results) == {i: f"say it {i}" for i in range(40)}
                assert len(results) == 40
            assert worker.process.poll() is None
