"""``cache``: a request that was answered before is answered from the store, for its user only, and costs nothing."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from promptmill import AsyncProducer, Job
from promptmill.contract import Done
from promptmill.store import Store
from tests.support.batch_lines import all_results, line, made
from tests.support.processes import PATIENCE_S, wait_until
from tests.support.simulator import SimulatorHandle, running_simulator
from tests.support.store import running_store
from tests.support.streams import check_whole, collect, text_of
from tests.support.worker import QUICK, worker_process


@pytest.fixture
async def asker(tmp_path: Path, write_config: Any) -> AsyncGenerator[tuple[AsyncProducer, SimulatorHandle]]:
    """A producer with a worker, and the provider that it asks.

    With a store of their own: what other tests left in the queues would be asked here too, and be counted.
    """
    with running_simulator() as simulator, running_store(tmp_path, append_only=False) as server:
        model = f'[models.sim]\ntype = "local_openai"\napi_url = "{simulator.url}/v1"\nmodel_name = "sim:tokens=7"\n'
        path, settings = write_config(QUICK + model + model.replace("models.sim", "models.twin"), url=server.url)
        with worker_process(path):
            async with AsyncProducer(settings) as producer:
                yield producer, simulator


async def answer(producer: AsyncProducer, prompt: str = "hello", **fields: Any) -> Job:
    fields = {"model": "sim", "cache": True, **fields}
    return await (await producer.submit(prompt, **fields)).result(PATIENCE_S)


async def kept(producer: AsyncProducer, count: int) -> None:
    """Until so many answers are kept: a worker tells of them behind the end of the job."""
    store: Store = await producer.store()

    async def there() -> bool:
        return len([key async for key in store.redis.scan_iter("pm:cache:*")]) == count

    await wait_until(there, f"{count} answers are kept")


async def test_the_second_answer_comes_from_the_store_whole_and_for_nothing(asker) -> None:
    producer, simulator = asker
    first = await answer(producer)
    await kept(producer, 1)
    second = await answer(producer, metadata={"other": "facts"}, priority="batch")
    assert (first.cached, second.cached) == (False, True)
    assert (second.text, second.finish_reason, second.model) == (first.text, first.finish_reason, "sim")
    assert second.usage is not None
    assert (second.usage.input_tokens, second.usage.output_tokens, second.cost_usd) == (0, 0, 0)
    assert second.attempts == []
    assert len(simulator.requests) == 1
    events = await collect(producer, second.id)
    check_whole(events)
    assert text_of(events) == first.text
    end = events[-1]
    assert isinstance(end, Done)
    assert end.cached is True


@pytest.mark.parametrize(
    "other",
    [
        {"user": "somebody else"},
        {"system": "be brief"},
        {"temperature": 0.5},
        {"max_tokens": 50},
        {"model": "twin"},
        {"prompt": "hello."},
        {"cache": None},
    ],
    ids=lambda other: next(iter(other)),
)
async def test_nothing_is_taken_from_the_store_for_what_could_have_another_answer(asker, other) -> None:
    producer, simulator = asker
    await answer(producer)
    await kept(producer, 1)
    assert not (await answer(producer, **other)).cached
    assert len(simulator.requests) == 2


async def test_what_failed_or_did_not_ask_for_it_is_not_kept(asker) -> None:
    producer, _ = asker
    await answer(producer, cache=None)
    await answer(producer, "another")
    await kept(producer, 1)


async def test_lines_of_a_batch_are_answered_from_what_an_earlier_one_kept(asker) -> None:
    producer, simulator = asker
    lines = [line(i, model="sim", cache=True) for i in range(20)]
    for _ in range(2):
        batch_id = await made(producer.batches, lines)
        await wait_until(lambda: ended(producer, batch_id), "the batch has ended")  # noqa: B023 - awaited at once
        await kept(producer, 20)
    assert len(simulator.requests) == 20
    status = await producer.batches.status(batch_id)
    assert (status.succeeded, status.usage.output_tokens, status.cost_usd) == (20, 0, 0)
    assert all(r.job.cached for r in await all_results(producer.batches, batch_id) if r.job)


async def ended(producer: AsyncProducer, batch_id: str) -> bool:
    return (await producer.batches.status(batch_id)).ended
