"""One measured run of one system, and the summary of several rounds."""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from ops.bench import proc_stats
from ops.bench.load import LoadResult, Plan, run_load, stored_texts
from ops.bench.procs import PartFailedError
from ops.bench.profiling import recording
from ops.bench.stats import median, percentile, spread_percent
from ops.bench.systems import SYSTEMS, Running

PARTS = ("worker", "relay", "redis")
WARM_UP = Plan(jobs=4, tokens=5, rate=50, first_s=0.05, ramp_s=0.2, stall_s=20)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A named plan, and the number of single-token jobs that measure what a job costs apart from its tokens."""

    name: str
    title: str
    plan: Plan
    cost_jobs: int = 0

    @property
    def cost_plan(self) -> Plan:
        """As many jobs at the same pace with one token each."""
        return dataclasses.replace(self.plan, jobs=self.cost_jobs, tokens=1)

    def model_names(self) -> dict[str, str]:
        """Return registry names for the simulator's specifications of all plans."""
        return {self.plan.model: "sim", self.cost_plan.model: "one", WARM_UP.model: "warmup"}


@dataclass(kw_only=True)
class Result:
    """One run. Times in the units of the names; CPU is None for the direct run, which has no parts."""

    scenario: str
    system: str
    tokens_expected: int
    tokens_lost: float
    no_end: float
    failed: float
    disorder: float
    text_differs: float
    """Jobs whose received tokens, joined, are not the stored text (or that have no stored text)."""
    p50_ms: float
    p99_ms: float
    max_ms: float
    tokens_per_s: float
    submitting_s: float
    cpu_us: dict[str, float] = field(default_factory=dict[str, float])
    """CPU microseconds a token by part, with all that belongs to the jobs: submit, queue, claim, connect, finish."""
    cpu_ms_per_job: float = math.nan
    """CPU milliseconds of worker + relay + Redis for a job of one token."""
    worker_rss_mb: float = math.nan
    worker_pss_mb: float = math.nan
    machine_busy_percent: float = math.nan
    foreign_percent: float = math.nan
    """CPU of processes that are no part of the benchmark, and stolen time, in percent of the machine."""
    problems: list[str] = field(default_factory=list[str])

    @property
    def cpu_sum_us(self) -> float:
        """CPU microseconds a token of worker, relay and Redis together."""
        return sum(self.cpu_us[part] for part in PARTS) if self.cpu_us else math.nan


class _Meter:
    """CPU of the parts and of the machine since its creation."""

    def __init__(self, running: Running, harness: Mapping[str, list[int]]) -> None:
        self._roots = {**harness, **running.roots}
        self._machine = proc_stats.machine_cpu()
        self._cpu = proc_stats.cpu_seconds(self._roots)

    def cpu_seconds(self) -> dict[str, float]:
        """Return CPU seconds a role since the start."""
        now = proc_stats.cpu_seconds(self._roots)
        return {role: now[role] - before for role, before in self._cpu.items()}

    def machine(self, ours_s: float) -> tuple[float, float]:
        """Return the machine's busy share and the share that was not ours, both in percent."""
        now = proc_stats.machine_cpu()
        total = max(now.total_s - self._machine.total_s, 0.01)
        busy = now.busy_s - self._machine.busy_s
        steal = now.steal_s - self._machine.steal_s
        return busy / total * 100, max(0.0, busy - ours_s + steal) / total * 100


def _problems(loaded: LoadResult) -> list[str]:
    """Return up to three distinct reasons why readers got no proper end."""
    seen = {outcome.end for outcome in loaded.outcomes if outcome.end != "done"}
    return sorted(reason or "no end event" for reason in seen)[:3]


def _summarise(scenario: Scenario, system: str, loaded: LoadResult, stored: Sequence[str | None] | None) -> Result:
    expected = scenario.plan.jobs * scenario.plan.tokens
    ordered = sorted(loaded.latencies_ns)
    outcomes = loaded.outcomes
    differs = 0
    if stored is not None:
        differs = sum("".join(job.parts) != text for job, text in zip(outcomes, stored, strict=True))
    return Result(
        scenario=scenario.name,
        system=system,
        tokens_expected=expected,
        tokens_lost=expected - sum(min(job.tokens, scenario.plan.tokens) for job in outcomes),
        no_end=sum(not job.ended for job in outcomes),
        failed=sum(job.end in ("error", "cancelled") for job in outcomes),
        disorder=sum(job.disorder for job in outcomes),
        text_differs=differs,
        p50_ms=percentile(ordered, 50) / 1e6,
        p99_ms=percentile(ordered, 99) / 1e6,
        max_ms=percentile(ordered, 100) / 1e6,
        tokens_per_s=len(ordered) / loaded.tokens_s if loaded.tokens_s else math.nan,
        submitting_s=loaded.submitting_s,
        problems=_problems(loaded),
    )


def _job_cost_ms(scenario: Scenario, running: Running, harness: Mapping[str, list[int]]) -> float:
    if not scenario.cost_jobs or not running.roots:
        return math.nan
    meter = _Meter(running, harness)
    run_load(running.target, scenario.cost_plan)
    cpu = meter.cpu_seconds()
    return sum(cpu[part] for part in PARTS) / scenario.cost_jobs * 1e3


def _warm_up(running: Running, directory: Path) -> None:
    """Run a few jobs, so that connections are open and modules loaded; raises ``PartFailedError`` if no token comes."""
    warm = run_load(running.target, WARM_UP)
    if not any(outcome.tokens for outcome in warm.outcomes):
        logs = "\n".join(f"{log.name}: {log.read_text(errors='replace')[-1000:]}" for log in directory.glob("*.log"))
        raise PartFailedError(f"no token came through before the run ({', '.join(_problems(warm))})\n{logs}")


def run_once(
    scenario: Scenario, system: str, provider_url: str, provider_pids: list[int], profile_directory: Path | None = None
) -> Result:
    """Start the system, warm it up, measure it under the scenario's load, and stop it.

    CPU is taken from just before the first submission until all readers have ended or were given up. Raises
    ``PartFailedError`` if a process does not start.
    """
    harness = {"reader": [os.getpid()], "provider": provider_pids}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="promptmill-bench-")))
        running = stack.enter_context(SYSTEMS[system](provider_url, scenario.model_names(), directory))
        _warm_up(running, directory)
        job_cost = _job_cost_ms(scenario, running, harness)
        with recording(running.roots, f"{scenario.name}-{system}", profile_directory) as recorders:
            meter = _Meter(running, {**harness, "recorders": recorders})
            loaded = run_load(running.target, scenario.plan)
            cpu = meter.cpu_seconds()
            busy, foreign = meter.machine(sum(cpu.values()))
        peak_rss, pss = proc_stats.memory(running.roots, "worker")
        stored = None if running.target.direct else stored_texts(running.target, loaded.outcomes)
        result = _summarise(scenario, system, loaded, stored)
    result.machine_busy_percent = busy
    result.foreign_percent = foreign
    if running.roots:
        result.cpu_us = {role: seconds / result.tokens_expected * 1e6 for role, seconds in cpu.items()}
        result.cpu_ms_per_job = job_cost
        result.worker_rss_mb = peak_rss / 1e6
        result.worker_pss_mb = pss / 1e6
    return result


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Several rounds of one system in one scenario: medians, but the worst round for losses; and the spread."""

    result: Result
    rounds: int
    cpu_spread_percent: float
    foreign_max_percent: float


WORST = ("tokens_lost", "no_end", "failed", "disorder", "text_differs")


def summarise(results: Sequence[Result]) -> Summary:
    """Return medians over the rounds; of counts that should be 0, the worst round."""
    merged = dataclasses.replace(results[0])
    for item in dataclasses.fields(Result):
        values = [getattr(result, item.name) for result in results]
        if item.name in WORST:
            setattr(merged, item.name, max(values))
        elif isinstance(values[0], int | float):
            setattr(merged, item.name, median(values))
    merged.cpu_us = {role: median([result.cpu_us[role] for result in results]) for role in results[0].cpu_us}
    merged.problems = sorted({problem for result in results for problem in result.problems})
    return Summary(
        result=merged,
        rounds=len(results),
        cpu_spread_percent=spread_percent([result.cpu_sum_us for result in results]),
        foreign_max_percent=max(result.foreign_percent for result in results),
    )


def timestamp() -> str:
    """Return the date and time in UTC, to the minute."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
