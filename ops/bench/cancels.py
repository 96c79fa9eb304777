"""``python -m ops.bench.cancels``: how fast a cancel is, and what it leaves behind.

Jobs (1,000) over API backends, and some tens over programs that heed no signal, are cancelled at random moments: while
they wait in the queue, for a place, for a first token, between two attempts, in the midst of their text or of the check
of their answer. Two workers run the former, two the latter. Told is how long it took, from the call of ``cancel``,
until a reader had the end, until the provider saw its connection close, and until nothing of the program ran any more.
Exit code 1 where a job did not end once, or anything went on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import orjson
from ops.bench.report import number, table
from ops.bench.stats import percentile
from tests.support.presence import MARK, Presence, presence, present_program
from tests.support.processes import tree, wait_gone
from tests.support.simulator import spawned_simulator
from tests.support.store import running_store
from tests.support.streams import check_whole, collect, phases
from tests.support.worker import WorkerProcess, worker_process

from promptmill import AsyncProducer, keys
from promptmill.contract import Event
from promptmill.settings import load_settings
from promptmill.store import Store
from promptmill.usage.verify import verify_usage

Models = Mapping[str, Mapping[str, Any]]

KEY_ENV = {"SIMULATOR_KEY": "planted-key"}
URL_PATHS = {"local_openai": "/v1", "anthropic_api": "", "gemini_api": "/v1beta/openai"}
STREAM = "sim:tokens=60,rate=20"
# A regular expression that takes for ever on this answer; its check is ended after 5 s of CPU.
SLOW_ANSWER = '"' + "a" * 40 + '!"'
SLOW_SCHEMA = {"type": "string", "pattern": "^(a+)+$"}
MODELS: Models = {
    "openai": {"type": "local_openai", "model_name": STREAM},
    "anthropic": {"type": "anthropic_api", "model_name": "sim:tokens=30,rate=20"},
    "gemini": {"type": "gemini_api", "model_name": "sim:tokens=10,rate=20"},
    "silent": {"type": "local_openai", "model_name": "sim:fault=hang"},
    "stalled": {"type": "anthropic_api", "model_name": "sim:tokens=40,rate=100,fault=stall,after=20"},
    "retrying": {"type": "gemini_api", "model_name": "sim:fault=529,first=0.3"},
    "put_off": {"type": "local_openai", "model_name": "sim:fault=429,retry_after=20"},
    "narrow": {"type": "local_openai", "model_name": f"{STREAM},key=narrow", "limits": {"concurrency": 4}},
    "checked": {"type": "local_openai", "model_name": f"sim:text={SLOW_ANSWER},rate=100"},
}
API_KINDS = (*["openai", "anthropic", "gemini"] * 4, *["silent", "stalled", "retrying", "put_off", "narrow"] * 2)
PROGRAM_KINDS = ("claude", "gemini_program")
CONFIG = """
redis_url = "{redis}"
max_attempts = 50
{settings}
[families.programs]
concurrency = 16
"""


def configuration(redis: str, url: str, models: Models, settings: str = "") -> str:
    """A configuration file whose API models are asked at ``url``."""
    text = CONFIG.format(redis=redis, settings=settings)
    for name, fields in models.items():
        lines = dict(fields)
        if fields["type"] in URL_PATHS:
            lines["api_url"] = url + URL_PATHS[fields["type"]]
        if fields["type"] != "echo":
            lines["api_key_env"] = next(iter(KEY_ENV))
        text += f"[models.{name}]\n" + "".join(f"{key} = {_toml(value)}\n" for key, value in lines.items())
    return text


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        inner = cast("dict[str, Any]", value)
        return "{ " + ", ".join(f"{k} = {_toml(v)}" for k, v in inner.items()) + " }"
    return json.dumps(value)


def program_models(directory: Path, there: Presence, **behaviour: Any) -> Models:
    """One model that is the ``claude`` program's and one that is ``gemini``'s, both deaf to signals, in one family."""
    made: dict[str, dict[str, Any]] = {
        "claude": {"type": "claude_cli"},
        "gemini_program": {"type": "gemini_cli", "model_name": "sim"},
    }
    for name, fields in made.items():
        dialect = "claude" if name == "claude" else "gemini"
        program = present_program(directory, there, dialect, hostile=True, name=dialect, **behaviour)
        fields |= {"family": "programs", "options": {"program": program}}
    return made


def names_in(body: Any) -> list[str]:
    """The jobs that a request to a provider names in its prompt."""
    return re.findall(MARK + r"([\w-]+)", json.dumps(body))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to run. ``booked``: wait until every attempt is booked, which takes up to a minute."""

    jobs: int = 1000
    programs: int = 40
    checked: int = 10
    at_once: int = 150
    within_s: float = 3.0
    """A job is cancelled at a random moment of so many seconds after it was submitted."""
    seed: int = 1
    booked: bool = True


@dataclass(slots=True)
class Cancelled:
    """One job of the run; times are ``time.monotonic()``."""

    name: str
    kind: str
    job_id: str = ""
    state: str = ""
    phase: str = ""
    """The last that its reader was told of before the cancel."""
    called_s: float = 0.0
    ended_s: float = 0.0


@dataclass
class Outcome:
    """What came of it: latencies in ms, and in words all that must not be."""

    jobs: list[Cancelled] = field(default_factory=list[Cancelled])
    end_ms: list[float] = field(default_factory=list[float])
    provider_ms: list[float] = field(default_factory=list[float])
    program_ms: list[float] = field(default_factory=list[float])
    ping_ms: list[float] = field(default_factory=list[float])
    """A PING of the store, asked for meanwhile: what this machine makes of doing next to nothing."""
    problems: list[str] = field(default_factory=list[str])

    @property
    def states(self) -> Counter[str]:
        return Counter(job.state for job in self.jobs)


class Run:
    """One run against parts that are there."""

    def __init__(self, plan: Plan, producer: AsyncProducer, there: Presence) -> None:
        self.plan = plan
        self.out = Outcome()
        self._producer = producer
        self._there = there
        self._chance = random.Random(plan.seed)

    async def cancel_all(self) -> None:
        """Submit in the pace in which jobs end, and cancel each at its moment."""
        plan, places = self.plan, asyncio.Semaphore(self.plan.at_once)
        kinds = [*(PROGRAM_KINDS * plan.programs)[: plan.programs], *["checked"] * plan.checked]
        kinds += [self._chance.choice(API_KINDS) for _ in range(plan.jobs - len(kinds))]
        self._chance.shuffle(kinds)

        async def one(kind: str) -> None:
            try:
                await self._one(kind)
            finally:
                places.release()

        async with asyncio.TaskGroup() as group:
            for kind in kinds:
                await places.acquire()
                group.create_task(one(kind))

    async def _one(self, kind: str) -> None:
        job = Cancelled(f"{kind}-{keys.new_token()}", kind)
        self.out.jobs.append(job)
        form: dict[str, Any] = {}
        if kind == "checked":
            form["response_format"] = {"type": "json_schema", "json_schema": SLOW_SCHEMA}
        made = await self._producer.submit(f"{MARK}{job.name} please", model=kind, **form)
        job.job_id = made.id
        reading = asyncio.create_task(self._read(job))
        await asyncio.sleep(self._chance.random() * self.plan.within_s)
        job.called_s = time.monotonic()
        answered = await made.cancel("the benchmark")
        seen = await reading
        job.state = (await made.get()).state
        told = phases(seen)
        job.phase = "streaming" if any(e.type == "token" for e in seen) else (told[-1] if told else "")
        if answered.state != job.state:
            self.out.problems.append(f"{job.name}: cancel answered {answered.state}, and it is {job.state}")

    async def _read(self, job: Cancelled) -> list[Event]:
        seen = await collect(self._producer, job.job_id)
        job.ended_s = time.monotonic()
        try:
            check_whole(seen)
        except AssertionError as err:
            self.out.problems.append(f"{job.name}: {err}")
        return seen

    async def ping(self, store: Store) -> None:
        """Ask again and again, until cancelled."""
        while True:
            began = time.monotonic()
            await store.redis.ping()
            self.out.ping_ms.append((time.monotonic() - began) * 1000)
            await asyncio.sleep(0.05)

    # -- what is left ---------------------------------------------------------------------------------------------

    async def nothing_goes_on(self, simulator_url: str, timeout_s: float = 30.0) -> None:
        """Until the provider has no open request and no program runs; notes what does not end."""
        deadline = time.monotonic() + timeout_s
        while (requests := stats(simulator_url)["open_requests"]) or self._there.here():
            if time.monotonic() > deadline:
                self.out.problems.append(f"{requests} requests and {self._there.here()} programs go on")
                return
            await asyncio.sleep(0.1)

    def latencies(self, requests: Sequence[Mapping[str, Any]]) -> None:
        """From each cancel until its reader, its provider and its program had seen it."""
        jobs = {job.name: job for job in self.out.jobs if job.state == "cancelled"}
        self.out.end_ms = [(job.ended_s - job.called_s) * 1000 for job in jobs.values()]
        for record in requests:
            for name in set(names_in(record["body"])) & jobs.keys():
                late_s = (record["ended_s"] or time.monotonic()) - jobs[name].called_s
                if late_s > 0:
                    self.out.provider_ms.append(late_s * 1000)
        for visit in self._there.visits():
            job = jobs.get(visit.name)
            if job is not None and visit.left_s is not None and visit.left_s > job.called_s:
                self.out.program_ms.append((visit.left_s - job.called_s) * 1000)

    async def booked_once(self, store: Store, requests: Sequence[Mapping[str, Any]]) -> None:
        """Each attempt is in the ledger once: as many as the provider saw, and at most one that it did not see."""
        if self.plan.booked:
            async with asyncio.timeout(120):
                while await store.redis.zcard(keys.UNBOOKED):  # noqa: ASYNC110 - other processes book
                    await asyncio.sleep(0.5)
            asked = Counter(name for r in requests for name in set(names_in(r["body"])))
            asked.update(visit.name for visit in self._there.visits())
            booked = await self._attempts_booked(store)
            for job in self.out.jobs:
                if not asked[job.name] <= booked[job.job_id] <= asked[job.name] + 1:
                    self.out.problems.append(f"{job.name}: {asked[job.name]} calls, {booked[job.job_id]} booked")
        if not (await verify_usage(store, "yesterday", "today")).ok:
            self.out.problems.append("the sums of the usage are not those of its entries")

    @staticmethod
    async def _attempts_booked(store: Store) -> Counter[str]:
        booked: Counter[str] = Counter()
        now = datetime.now(UTC)
        for day in {(now - timedelta(days=n)).date().isoformat() for n in (0, 1)}:
            names: list[bytes] = await store.redis.hkeys(keys.ledger(day))
            booked.update(name.decode().split(":")[0] for name in names)
        return booked


def stats(simulator_url: str) -> dict[str, Any]:
    """The simulator's own sums."""
    with urllib.request.urlopen(f"{simulator_url}/_sim/stats") as answer:
        return orjson.loads(answer.read())


def requests_of(simulator_url: str) -> list[dict[str, Any]]:
    """Everything that the simulator was asked."""
    with urllib.request.urlopen(f"{simulator_url}/_sim/requests?redact=1") as answer:
        return orjson.loads(answer.read())


async def experiment(plan: Plan) -> Outcome:
    """Run it, with everything that it needs, and end all that was started."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="promptmill-cancels-")))
        server = stack.enter_context(running_store(directory))
        simulator = stack.enter_context(spawned_simulator())
        there = stack.enter_context(presence())
        config = directory / "cancels.toml"
        models = {**MODELS, **program_models(directory, there, tokens=60)}
        config.write_text(configuration(server.url, simulator.url, models, "drain_s = 1"))
        workers = [
            stack.enter_context(worker_process(config, f"{family}-{n}", family, KEY_ENV))
            for family in ("api", "programs")
            for n in range(2)
        ]
        async with AsyncExitStack() as exits:
            producer = await exits.enter_async_context(AsyncProducer(load_settings(config)))
            store = await Store.connect(server.url)
            exits.push_async_callback(store.aclose)
            for worker in workers:
                await worker.ready(server.url)
            run = Run(plan, producer, there)
            pinging = asyncio.create_task(run.ping(store))
            await run.cancel_all()
            pinging.cancel()
            await run.nothing_goes_on(simulator.url)
            requests = requests_of(simulator.url)
            run.latencies(requests)
            await run.booked_once(store, requests)
            pids = set[int]().union(*(tree(worker.pid) for worker in workers))
            await end(workers, store, run.out)
            try:
                await asyncio.to_thread(wait_gone, pids)
            except AssertionError as err:
                run.out.problems.append(str(err))
            if count := stats(simulator.url)["open_connections"]:
                run.out.problems.append(f"{count} connections to the provider are open")
            return run.out


async def end(workers: Sequence[WorkerProcess], store: Store, out: Outcome) -> None:
    """End the workers well; notes those that do not, or that leave claims behind."""
    for worker in workers:
        code = await asyncio.to_thread(worker.stop)
        if code:
            out.problems.append(f"worker {worker.name} ended with {code}:\n{worker.log.read_text()[-2000:]}")
    corpses: dict[bytes, bytes] = await store.redis.hgetall(keys.WORKERS)
    if corpses:
        out.problems.append(f"still on the list of workers: {sorted(corpses)}")


def show(out: Outcome) -> str:
    """The tables."""
    rows: list[tuple[str, ...]] = []
    for name, sample in (
        ("the reader's end event", out.end_ms),
        ("the provider's connection closed", out.provider_ms),
        ("nothing of the program left", out.program_ms),
        ("for comparison: a PING of the store", out.ping_ms),
    ):
        ordered = sorted(sample)
        figures = (percentile(ordered, 50), percentile(ordered, 99), percentile(ordered, 100))
        rows.append((name, str(len(ordered)), *(number(figure, 1) for figure in figures)))
    by_phase = Counter(f"{job.phase} ({job.kind})" for job in out.jobs if job.state == "cancelled")
    where = ", ".join(f"{count} {name}" for name, count in by_phase.most_common())
    head = ("ms from the call of cancel to", "cases", "p50", "p99", "max")
    return f"ends: {dict(out.states)}\ncancelled while: {where}\n{table(head, rows)}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m ops.bench.cancels", description=__doc__)
    parser.add_argument("--jobs", type=int, default=Plan.jobs)
    parser.add_argument("--programs", type=int, default=Plan.programs, help="how many of them are programs")
    parser.add_argument("--seed", type=int, default=Plan.seed)
    args = parser.parse_args(argv)
    out = asyncio.run(experiment(Plan(jobs=args.jobs, programs=args.programs, seed=args.seed)))
    print(show(out))
    slow = [f"{ms:,.0f} ms" for ms in (*out.end_ms, *out.provider_ms, *out.program_ms) if ms > 1000]
    if slow:
        print(f"over a second: {', '.join(slow)}")
    for problem in out.problems:
        print("PROBLEM:", problem)
    return 1 if out.problems else 0


if __name__ == "__main__":
    sys.exit(main())
