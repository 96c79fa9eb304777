"""``python -m ops.bench.rolling``: what does restarting everything under load lose, and what does a reader see?

Jobs are submitted and read the whole time, while each worker, the gateway and the relay are told to end by TERM and a
new one takes their place, one after another, round after round. Half of the readers use the library; half read over
HTTP and come back, as a page does, with the id of the last event that they saw. Told is what was restarted, how many
jobs changed hands, and the longest time for which each reader saw nothing between two events. Exit code 1 where a job
did not end well, a reader missed an event, or an attempt was lost to a restart.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import aiohttp
from ops.bench.report import number, table
from ops.bench.stats import percentile
from tests.support.event_source import EventSourceParser
from tests.support.processes import tree, wait_gone
from tests.support.server import Module, ServerProcess
from tests.support.simulator import spawned_simulator
from tests.support.store import keys_without_ttl, running_store
from tests.support.streams import check_whole, phases
from tests.support.worker import WorkerProcess

from promptmill import AsyncProducer, keys
from promptmill.contract import Done, Event, parse_event
from promptmill.settings import load_settings
from promptmill.store import Store

CONFIG = """
redis_url = "{redis}"
drain_s = {drain_s}
[models.sim]
type = "local_openai"
api_url = "{url}/v1"
model_name = "sim:tokens={tokens},rate={rate}"
"""
SERVERS: tuple[Module, Module] = ("promptmill_gateway", "promptmill_relay")
_RECONNECT_S = 1.0
"""As a browser does it, told by the stream's ``retry``."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to run. A job takes ``tokens / rate`` seconds; ``drain_s`` below that makes workers hand jobs back."""

    workers: int = 3
    rounds: int = 3
    jobs_per_s: float = 15.0
    tokens: int = 60
    rate: float = 20.0
    drain_s: float = 1.0
    seed: int = 1
    timeout_s: float = 120.0
    """For one job and its readers."""


@dataclass
class View:
    """What one reader saw, when, and what befell it."""

    job_id: str
    over_http: bool
    events: list[Event] = field(default_factory=list[Event])
    at_s: list[float] = field(default_factory=list[float])
    connections: int = 0

    def add(self, event: Event) -> None:
        self.events.append(event)
        self.at_s.append(time.monotonic())

    @property
    def handed_back(self) -> int:
        return phases(self.events).count("requeued")

    @property
    def gap(self) -> tuple[float, str]:
        """The longest time between two events in ms, and between which: the wait in the queue is not counted."""
        told = [p for p, event in enumerate(self.events) if event.type == "progress"]
        first = told[1] if len(told) > 1 else 0
        gaps = [(b - a) * 1000 for a, b in pairwise(self.at_s[first:])]
        if not gaps:
            return 0.0, ""
        place = first + gaps.index(max(gaps))
        a, b = self.events[place], self.events[place + 1]
        way = "HTTP" if self.over_http else "the library"
        return max(gaps), f"job {self.job_id} over {way}, between {a.type} {a.id} and {b.type} {b.id}"

    @property
    def gap_ms(self) -> float:
        return self.gap[0]


@dataclass
class Outcome:
    """What came of it: in words, all that must not be."""

    views: list[View] = field(default_factory=list[View])
    jobs: int = 0
    restarts: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    """By what was restarted: seconds from the signal to the end of each process."""
    problems: list[str] = field(default_factory=list[str])

    @property
    def handed_back(self) -> int:
        return sum(view.handed_back for view in self.views if not view.over_http)

    @property
    def reconnected(self) -> int:
        return sum(view.connections > 1 for view in self.views)


class Fleet:
    """The processes, and how they are replaced."""

    def __init__(self, plan: Plan, config: Path, store_url: str, out: Outcome) -> None:
        self._plan = plan
        self._config = config
        self._store_url = store_url
        self._out = out
        self._count = 0
        self.workers: list[WorkerProcess] = []
        self.servers: dict[Module, ServerProcess] = {}

    def ports(self) -> list[int]:
        """Of the servers that take connections; one that is to end is taken off first, as a proxy is told to do."""
        return [server.port for server in self.servers.values()]

    async def start(self) -> None:
        for _ in range(self._plan.workers):
            self.workers.append(self._new_worker())
        for module in SERVERS:
            self.servers[module] = await self._new_server(module)
        for worker in self.workers:
            await worker.ready(self._store_url)

    def _new_worker(self) -> WorkerProcess:
        self._count += 1
        return WorkerProcess(self._config, f"w{self._count}", self._config.with_suffix(f".w{self._count}.log"))

    async def _new_server(self, module: Module) -> ServerProcess:
        server = ServerProcess(module, self._config)
        try:
            await server.until_ready(200)
        except BaseException:
            server.stop()
            raise
        return server

    async def restart_all(self) -> None:
        """Each once, one after another."""
        for place, worker in enumerate(self.workers):
            await self._end("worker", worker)
            self.workers[place] = self._new_worker()
            await self.workers[place].ready(self._store_url)
        for module in SERVERS:
            await self._end(module.removeprefix("promptmill_"), self.servers.pop(module))
            self.servers[module] = await self._new_server(module)

    async def _end(self, what: str, process: WorkerProcess | ServerProcess) -> None:
        below = tree(process.process.pid) if process.process.poll() is None else set[int]()
        began = time.monotonic()
        code = await asyncio.to_thread(process.stop)
        self._out.restarts.setdefault(what, []).append(time.monotonic() - began)
        if code:
            self._out.problems.append(f"a {what} ended with {code}:\n{process.log.read_text()[-2000:]}")
        try:
            await asyncio.to_thread(wait_gone, below)
        except AssertionError as err:
            self._out.problems.append(f"a {what} left something: {err}")

    async def close(self) -> None:
        """End all that is left."""
        async with AsyncExitStack() as stack:  # each, also where another does not end well
            for server in self.servers.values():
                stack.push_async_callback(self._end, "server", server)
            for worker in self.workers:
                stack.push_async_callback(self._end, "worker", worker)


async def follow_over_http(
    view: View, ports: Callable[[], Sequence[int]], session: aiohttp.ClientSession | None = None
) -> None:
    """Read a job to its end from any of the servers that ``ports`` names now, as ``EventSource`` does it."""
    if session is None:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
        async with aiohttp.ClientSession(timeout=timeout) as own:
            return await follow_over_http(view, ports, own)
    parser = EventSourceParser()
    while not (view.events and view.events[-1].ends):
        if view.connections or not ports():
            await asyncio.sleep(_RECONNECT_S)
        if not (open_now := ports()):
            continue
        headers = {"Last-Event-ID": parser.last_event_id} if parser.last_event_id else {}
        with suppress(aiohttp.ClientError):
            url = f"http://127.0.0.1:{random.choice(open_now)}/v1/jobs/{view.job_id}/stream"
            async with session.get(url, headers=headers) as answer:
                assert answer.status == 200, f"EventSource gives up at {answer.status}"
                view.connections += 1
                async for chunk in answer.content.iter_any():
                    for message in parser.feed(chunk):
                        view.add(parse_event(message.data, message.last_event_id))
        parser = EventSourceParser(last_event_id=parser.last_event_id)  # what a cut left half is no event
    return None


class Load:
    """Submits jobs at a steady pace until told to stop, and follows each with one reader of either kind."""

    def __init__(self, plan: Plan, producer: AsyncProducer, fleet: Fleet, out: Outcome) -> None:
        self._plan = plan
        self._producer = producer
        self._fleet = fleet
        self._out = out
        self._chance = random.Random(plan.seed)
        self.over = asyncio.Event()

    async def run(self) -> None:
        """Until :attr:`over` is set and every job was read to its end."""
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session, asyncio.TaskGroup() as group:
            while not self.over.is_set():
                job = await self._producer.submit("please", model="sim")
                self._out.jobs += 1
                for over_http in (False, True):
                    view = View(job.id, over_http)
                    self._out.views.append(view)
                    group.create_task(self._follow(view, session))
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._chance.expovariate(self._plan.jobs_per_s)):
                        await self.over.wait()

    async def _follow(self, view: View, session: aiohttp.ClientSession) -> None:
        try:
            async with asyncio.timeout(self._plan.timeout_s):
                if view.over_http:
                    await follow_over_http(view, self._fleet.ports, session)
                else:
                    async for event in self._producer.events(view.job_id):
                        view.add(event)
            check_whole(view.events)
            self._check_end(view)
        except TimeoutError:
            self._out.problems.append(f"job {view.job_id} did not end: {[e.id for e in view.events][-3:]}")
        except AssertionError as err:
            self._out.problems.append(f"job {view.job_id}{' over HTTP' if view.over_http else ''}: {err}")

    def _check_end(self, view: View) -> None:
        end = view.events[-1]
        assert isinstance(end, Done), end
        assert end.text == "".join(f"tok{n} " for n in range(self._plan.tokens)), end.text
        assert end.attempt == 1, f"it took {end.attempt} attempts"


async def experiment(plan: Plan) -> Outcome:
    """Run it, with everything that it needs, and end all that was started."""
    out = Outcome()
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="promptmill-rolling-")))
        server = stack.enter_context(running_store(directory))
        simulator = stack.enter_context(spawned_simulator())
        config = directory / "rolling.toml"
        config.write_text(
            CONFIG.format(redis=server.url, url=simulator.url, tokens=plan.tokens, rate=plan.rate, drain_s=plan.drain_s)
        )
        fleet = Fleet(plan, config, server.url, out)
        stack.push_async_callback(fleet.close)
        await fleet.start()
        producer = await stack.enter_async_context(AsyncProducer(load_settings(config)))
        load = Load(plan, producer, fleet, out)
        loading = asyncio.create_task(load.run())
        try:
            for _ in range(plan.rounds):
                await fleet.restart_all()
        finally:
            load.over.set()
            await loading
        await _check_stored(producer, server.url, out)
    return out


async def _check_stored(producer: AsyncProducer, url: str, out: Outcome) -> None:
    """No attempt was lost to a restart, and no worker that ended is still on the list."""
    for job_id in {view.job_id for view in out.views}:
        job = await producer.get(job_id)
        outcomes = [attempt.outcome for attempt in job.attempts]
        if outcomes.count("succeeded") != 1 or "crashed" in outcomes:
            out.problems.append(f"job {job_id}: {outcomes}")
    store: Store = await producer.store()
    if await store.redis.zcard(keys.OUTBOX):
        out.problems.append("something is left in the outbox")
    out.problems += keys_without_ttl(url)


def show(plan: Plan, out: Outcome) -> str:
    """The tables."""
    restarts = [
        (what, str(len(took)), number(max(took), 1)) for what, took in sorted(out.restarts.items()) if what != "server"
    ]
    rows: list[tuple[str, ...]] = []
    kinds: Sequence[tuple[str, list[View]]] = (
        ("undisturbed", [v for v in out.views if not v.handed_back and v.connections < 2]),
        ("its job changed hands", [v for v in out.views if v.handed_back and v.connections < 2]),
        ("its server was restarted", [v for v in out.views if v.connections > 1]),
        ("all", out.views),
    )
    for name, views in kinds:
        gaps = sorted(view.gap_ms for view in views)
        rows.append((name, str(len(gaps)), *(number(percentile(gaps, percent)) for percent in (50, 95, 99, 100))))
    said = (
        f"{out.jobs} jobs of {plan.tokens / plan.rate:g} s, {len(out.views)} readers; {out.handed_back} hand-backs, "
        f"{out.reconnected} readers reconnected"
    )
    head = ("longest silence a reader saw, ms", "readers", "p50", "p95", "p99", "max")
    ends = table(("restarted", "times", "longest end, s"), restarts)
    slow = max((view.gap for view in out.views if not view.handed_back and view.connections < 2), default=(0.0, ""))
    where = f"longest of the undisturbed: {number(slow[0])} ms, {slow[1]}"
    return f"{said}\n{ends}\n{table(head, rows)}\n{where}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m ops.bench.rolling", description=__doc__)
    parser.add_argument("--workers", type=int, default=Plan.workers)
    parser.add_argument("--rounds", type=int, default=Plan.rounds, help="how often each is restarted")
    parser.add_argument("--jobs-per-s", type=float, default=Plan.jobs_per_s)
    parser.add_argument("--drain-s", type=float, default=Plan.drain_s)
    args = parser.parse_args(argv)
    plan = Plan(workers=args.workers, rounds=args.rounds, jobs_per_s=args.jobs_per_s, drain_s=args.drain_s)
    out = asyncio.run(experiment(plan))
    print(show(plan, out))
    for problem in out.problems:
        print("PROBLEM:", problem)
    return 1 if out.problems else 0


if __name__ == "__main__":
    sys.exit(main())
