"""``python -m ops.bench.scaling``: what do more worker processes bring?

``programs``: each job is a child process below a guard that waits for two seconds, as a program does that waits for its
provider. ``api``: jobs of one second and ten tokens at the simulated provider. Slots are few, so four workers have four
times as many, and do four times as much until the CPU is full: programs hardly use it, api jobs of eight workers do.
Figures are from the first job's start to the last one's end. The machine's load before each run stands beside them:
where it was not near zero, others took part of the CPU.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ops.bench.proc_stats import machine_cpu
from ops.bench.procs import start_simulator, start_valkey
from ops.bench.report import machine, number, table
from tests.support.worker import worker_process

from promptmill import AsyncProducer
from promptmill.contract import Job
from promptmill.settings import load_settings

COUNTS = (1, 2, 4, 8)
KINDS = ("programs", "api")
_KEY = "SCALING_KEY"
_CHUNK = 500
_LOOK_S = 0.25
_CONFIG = """
redis_url = "{redis}"
max_queued = 0
[families.claude]
concurrency = {slots}
[families.api]
concurrency = {api_slots}
[models.programs]
type = "claude_cli"
api_key_env = "{key}"
options = {{ program = "{program}" }}
[models.api]
type = "local_openai"
api_url = "{url}/v1"
model_name = "sim:tokens=10,first=1"
"""
_SAYS = (
    {"type": "system", "subtype": "init"},
    {
        "type": "stream_event",
        "event": {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "word"}},
    },
    {
        "type": "result",
        "subtype": "success",
        "is_error": False,
        "result": "word",
        "stop_reason": "end_turn",
        "usage": {"input_tokens": 1, "output_tokens": 1},
        "total_cost_usd": 0.1,
    },
)
"""What the ``claude`` program would say; it waits before the last line."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Slots of each worker, and how often each is used, one job after another."""

    slots: int = 4
    rounds: int = 6
    program_s: float = 2.0
    api_slots: int = 100
    api_rounds: int = 8

    def jobs(self, kind: str, workers: int) -> int:
        """How many jobs a run has."""
        return workers * (self.slots * self.rounds if kind == "programs" else self.api_slots * self.api_rounds)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What was measured; ``load`` is the machine's before it, ``busy`` its share of busy CPU meanwhile."""

    kind: str
    workers: int
    jobs: int
    failed: int
    took_s: float
    busy: float
    load: float

    @property
    def jobs_per_s(self) -> float:
        """Throughput."""
        return self.jobs / self.took_s


def run_of(kind: str, workers: int, jobs: Sequence[Job], busy: float, load: float) -> Run:
    """The figures of jobs that have all ended."""
    starts = [job.started_at for job in jobs if job.started_at is not None]
    ends = [job.finished_at for job in jobs if job.finished_at is not None]
    failed = sum(job.state != "succeeded" for job in jobs)
    took_s = (max(ends) - min(starts)).total_seconds()
    return Run(kind=kind, workers=workers, jobs=len(jobs), failed=failed, took_s=took_s, busy=busy, load=load)


def rows(runs: Sequence[Run]) -> list[list[str]]:
    """For the table; the ratio is to the same kind's run with one worker."""
    one = {run.kind: run.jobs_per_s for run in runs if run.workers == 1}
    return [
        [
            run.kind,
            str(run.workers),
            number(run.jobs),
            str(run.failed),
            number(run.took_s, 1),
            number(run.jobs_per_s, 1),
            number(run.jobs_per_s / one.get(run.kind, float("nan")), 2),
            number(100 * run.busy),
            number(run.load, 2),
        ]
        for run in runs
    ]


HEADER = ("kind", "workers", "jobs", "failed", "s", "jobs/s", "times one", "machine busy %", "load before")


async def measure(config: Path, kind: str, workers: int, jobs: int) -> Run:
    """One run with workers of its own."""
    load = os.getloadavg()[0]
    settings = load_settings(config)
    family = "claude" if kind == "programs" else "api"
    with ExitStack() as stack:
        env = {_KEY: "none"}
        started = [stack.enter_context(worker_process(config, f"{kind}-{n}", family, env)) for n in range(workers)]
        for worker in started:
            await worker.ready(settings.store_url)
        async with AsyncProducer(settings) as producer:
            before = machine_cpu()
            ids: list[str] = []
            for start in range(0, jobs, _CHUNK):
                requests = [{"prompt": "say it", "model": kind} for _ in range(min(_CHUNK, jobs - start))]
                ids += [job.id for job in await producer.submit_many(requests)]
            ended = await until_ended(producer, ids)
            after = machine_cpu()
    busy = (after.busy_s - before.busy_s) / (after.total_s - before.total_s)
    return run_of(kind, workers, ended, busy, load)


async def until_ended(producer: AsyncProducer, ids: Sequence[str]) -> list[Job]:
    """The jobs, once all have ended."""
    store = await producer.store()
    waiting, ended = list(ids), list[Job]()
    while waiting:
        # The first are most likely the next to end; looking at all would take part of the CPU that is measured.
        looked = waiting[:_CHUNK]
        records = await store.find_many(looked)
        gone = {record.job_id: record.job() for record in records if record is not None and record.ended}
        ended += gone.values()
        waiting = [job_id for job_id in waiting if job_id not in gone]
        if len(gone) < len(looked):
            await asyncio.sleep(_LOOK_S)
    return ended


async def experiment(kinds: Sequence[str], counts: Sequence[int], plan: Plan) -> list[Run]:
    """All runs, each told as it ends."""
    runs: list[Run] = []
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="promptmill-scaling-")))
        valkey, redis = start_valkey(directory)
        stack.enter_context(valkey)
        simulator, url = start_simulator(directory)
        stack.enter_context(simulator)
        program = directory / "program"
        *first, last = [f"echo '{json.dumps(line)}'" for line in _SAYS]
        lines = ["#!/bin/sh", "read -r request", *first, f"sleep {plan.program_s:g}", last]
        program.write_text("\n".join(lines) + "\n")
        program.chmod(0o755)
        config = directory / "promptmill.toml"
        config.write_text(
            _CONFIG.format(redis=redis, url=url, program=program, slots=plan.slots, api_slots=plan.api_slots, key=_KEY)
        )
        os.environ[_KEY] = "none"  # the producer reads the same configuration
        for kind in kinds:
            for workers in counts:
                run = await measure(config, kind, workers, plan.jobs(kind, workers))
                runs.append(run)
                print(f"{kind}, {workers} workers: {run.jobs_per_s:.1f} jobs/s", file=sys.stderr, flush=True)
    return runs


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; exit code 1 where a job failed."""
    parser = argparse.ArgumentParser(prog="python -m ops.bench.scaling", description=__doc__)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="(default: both)")
    parser.add_argument("--workers", nargs="+", type=int, default=list(COUNTS), help="(default: 1 2 4 8)")
    parser.add_argument("--rounds", type=int, default=Plan.rounds, help="programs in each slot, one after another")
    parser.add_argument("--api-rounds", type=int, default=Plan.api_rounds, help="api jobs in each slot, likewise")
    args = parser.parse_args(argv)
    plan = Plan(rounds=args.rounds, api_rounds=args.api_rounds)
    runs = asyncio.run(experiment(args.kinds, args.workers, plan))
    print(machine())
    print()
    print(table(HEADER, rows(runs)))
    return 1 if any(run.failed for run in runs) else 0


if __name__ == "__main__":
    sys.exit(main())
