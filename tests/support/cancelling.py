"""A store, a provider and workers in which jobs are cancelled, and what must hold of each that was."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import psutil
from ops.bench.cancels import KEY_ENV, Models, configuration, names_in, program_models

from promptmill import AsyncJob, AsyncProducer, keys
from promptmill.contract import Cancelled, Event, parse_event
from promptmill.settings import Settings, load_settings
from promptmill.store import Store
from promptmill.store.ids import EventId
from promptmill.usage.verify import verify_usage
from tests.support.presence import MARK, Presence, presence
from tests.support.processes import wait_until
from tests.support.simulator import SimulatorHandle, running_simulator
from tests.support.store import keys_without_ttl, running_store
from tests.support.streams import check_whole, collect, text_of
from tests.support.worker import WorkerProcess, worker_process

SOON_S = 20.0
"""Long enough for any machine, and shorter than whatever would end these answers without a cancel."""


@dataclass
class Ground:
    """Everything that the tests share: a store, a provider, two API workers and one that runs programs."""

    config: Path
    settings: Settings
    simulator: SimulatorHandle
    presence: Presence
    workers: list[WorkerProcess] = field(default_factory=list[WorkerProcess])

    def checks(self) -> list[int]:
        """The processes that check an answer apart."""
        found: list[int] = []
        for worker in self.workers:
            for child in psutil.Process(worker.pid).children(recursive=True):
                try:
                    if any("schema_check" in word for word in child.cmdline()):
                        found.append(child.pid)
                except psutil.NoSuchProcess:
                    continue
        return found

    def asked(self, name: str) -> list[Any]:
        """The provider's records of what was asked for one job."""
        return [r for r in self.simulator.requests if name in names_in(r.body)]


@contextmanager
def cancelling_ground(directory: Path, models: Models, settings: str) -> Generator[Ground]:
    """All of it, ready; ends with the block. ``models`` on top of the two that run programs."""
    with ExitStack() as stack:
        server = stack.enter_context(running_store(directory, append_only=False))
        simulator = stack.enter_context(running_simulator())
        there = stack.enter_context(presence())
        config = directory / "promptmill.toml"
        config.write_text(
            configuration(server.url, simulator.url, {**models, **program_models(directory, there)}, settings)
        )
        made = Ground(config, load_settings(config), simulator, there)
        for name, family in (("one", "api"), ("two", "api"), ("three", "programs")):
            made.workers.append(stack.enter_context(worker_process(config, name, family, KEY_ENV)))
        for worker in made.workers:
            asyncio.run(worker.ready(server.url))
        yield made
        assert keys_without_ttl(server.url) == []
    assert there.here() == 0


async def submit(producer: AsyncProducer, model: str, **fields: Any) -> tuple[AsyncJob, str]:
    """A job whose prompt names it; answers the job and the name."""
    name = keys.new_token()
    return await producer.submit(f"{MARK}{name} please", model=model, **fields), name


async def entries(store: Store, job_id: str) -> list[dict[str, Any]]:
    """What the ledger has of a job."""
    found: list[dict[str, Any]] = []
    now = datetime.now(UTC)
    for day in {(now - timedelta(days=n)).date().isoformat() for n in (0, 1)}:
        rows = await store.redis.hgetall(keys.ledger(day))
        found += [orjson.loads(raw) for name, raw in rows.items() if name.decode().startswith(f"{job_id}:")]
    return found


async def check_ended(ground: Ground, producer: AsyncProducer, job: AsyncJob, name: str, seen: list[Event]) -> None:
    """The job ended once, by the cancel, and nothing goes on for it: no request, no program, no check."""
    check_whole(seen)
    assert isinstance(seen[-1], Cancelled)
    stored = await job.get()
    assert (stored.state, stored.text or "") == ("cancelled", text_of(seen))
    again = await collect(producer, job.id)
    assert [e.id for e in again] == [e.id for e in seen]

    def nothing_goes_on() -> bool:
        return not any(r.open for r in ground.asked(name)) and not ground.presence.here(name) and not ground.checks()

    await wait_until(nothing_goes_on, "its request, its program and its check are gone", SOON_S)


async def check_booked(store: Store, job: AsyncJob, outcomes: list[str]) -> None:
    """Each attempt is in the ledger once, the cut one too, which its worker told of."""

    async def all_there() -> bool:
        return len(await entries(store, job.id)) >= len(outcomes)

    await wait_until(all_there, f"{outcomes} are in the ledger", SOON_S)
    assert sorted(e["outcome"] for e in await entries(store, job.id)) == sorted(outcomes)
    assert (await verify_usage(store, "yesterday", "today")).ok


async def so_far(store: Store, job_id: str) -> list[Event]:
    """What a job's log has now."""
    found, _, _ = await store.read_log(job_id, EventId(0, 0))
    return [parse_event(data, str(event_id)) for event_id, data in found]
