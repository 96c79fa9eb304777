"""``python -m ops.bench``: run the scenarios, print the tables, write the documentation's block."""

from __future__ import annotations

import argparse
import dataclasses
import resource
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import orjson
from ops.bench import report
from ops.bench.load import Plan
from ops.bench.measure import Result, Scenario, Summary, run_once, summarise
from ops.bench.procs import REPOSITORY, PartFailedError, start_simulator
from ops.bench.profiling import ProfilingError, py_spy_path
from ops.bench.systems import SYSTEMS

PAGE = REPOSITORY / "docs" / "benchmarks.md"
EXIT_OK = 0
EXIT_BAR_MISSED = 1
EXIT_BROKEN = 2

SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario(
            name="stream",
            title="200 jobs x 100 tokens at 50 tokens/s each, one SSE reader a job, started within 1 s",
            plan=Plan(jobs=200, tokens=100, rate=50, first_s=0.2, ramp_s=1.0),
            cost_jobs=200,
        ),
        Scenario(
            name="wide",
            title="1,000 jobs x 200 tokens at 10 tokens/s each, all at once in one worker process, started within 8 s",
            plan=Plan(jobs=1000, tokens=200, rate=10, first_s=0.2, ramp_s=8.0),
        ),
        Scenario(
            name="idle",
            title="one job at a time: 10 jobs x 50 tokens at 50 tokens/s",
            plan=Plan(jobs=10, tokens=50, rate=50, first_s=0.2, sequential=True),
        ),
    )
}
QUICK = {
    "stream": {"jobs": 50, "tokens": 40, "ramp_s": 0.5},
    "wide": {"jobs": 200, "tokens": 40, "ramp_s": 2.0},
    "idle": {"jobs": 3, "tokens": 25},
}


def quick(scenario: Scenario) -> Scenario:
    """Return a small version that only shows that everything works."""
    plan = dataclasses.replace(scenario.plan, **QUICK[scenario.name])
    title = f"quick: {plan.jobs} jobs x {plan.tokens} tokens at {plan.rate:g} tokens/s"
    return dataclasses.replace(scenario, plan=plan, title=title, cost_jobs=min(scenario.cost_jobs, 50))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; exits with usage on an error."""
    parser = argparse.ArgumentParser(prog="python -m ops.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small loads: shows that it works, measures little")
    parser.add_argument("--only", action="append", choices=list(SCENARIOS), help="run this scenario only; repeatable")
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS), help="run these only")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each scenario, in alternating order (3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round's figures")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="record worker and relay with py-spy; one round")
    parser.add_argument("--provider", metavar="URL", help="use this running simulator instead of starting one")
    parser.add_argument("--strict", action="store_true", help=f"exit with {EXIT_BAR_MISSED} if a bar is missed")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    return options


@contextmanager
def _provider(url: str | None) -> Generator[tuple[str, list[int]]]:
    if url is not None:
        yield url.rstrip("/"), []
        return
    with tempfile.TemporaryDirectory(prefix="promptmill-bench-") as name:
        simulator, simulator_url = start_simulator(Path(name))
        with simulator:
            yield simulator_url, [simulator.pid]


def run_scenario(
    scenario: Scenario,
    systems: Sequence[str],
    rounds: int,
    provider: tuple[str, list[int]],
    profile_directory: Path | None,
) -> list[Result]:
    """Run all rounds, every second one in reverse order, so that no system always runs on a warmer machine."""
    results: list[Result] = []
    for index in range(rounds):
        for system in systems if index % 2 == 0 else list(reversed(systems)):
            print(f"{scenario.name}: round {index + 1} of {rounds}, {system}", file=sys.stderr, flush=True)
            results.append(run_once(scenario, system, *provider, profile_directory))
    return results


def _summaries(results: Sequence[Result], systems: Sequence[str]) -> dict[str, Summary]:
    return {system: summarise([result for result in results if result.system == system]) for system in systems}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = parse_arguments(arguments)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # children inherit it; 1,000 streams need about 4,000
    rounds = 1 if options.profile else options.rounds
    names = options.only or list(SCENARIOS)
    plans = {name: quick(SCENARIOS[name]) if options.quick else SCENARIOS[name] for name in names}
    results: dict[str, list[Result]] = {}
    try:
        if options.profile:
            py_spy_path()  # missing: say so now, not after the first run
        with _provider(options.provider) as provider:
            for name, scenario in plans.items():
                results[name] = run_scenario(scenario, options.systems, rounds, provider, options.profile)
    except (PartFailedError, ProfilingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BROKEN
    scenarios = {name: _summaries(found, options.systems) for name, found in results.items()}
    text = report.document(scenarios, plans, rounds)
    print(text)
    if options.json:
        every = {name: [dataclasses.asdict(result) for result in found] for name, found in results.items()}
        options.json.write_bytes(
            orjson.dumps({"machine": report.machine(), "rounds": every}, option=orjson.OPT_INDENT_2)
        )
    whole = len(names) == len(SCENARIOS) and len(options.systems) == len(SYSTEMS)
    if whole and not options.quick and not options.profile:
        PAGE.write_text(report.replace_block(PAGE.read_text(), text))
        print(f"written to {PAGE.relative_to(REPOSITORY)}", file=sys.stderr)
    missed = options.strict and not all(bar.held for bar in report.bars(scenarios))
    return EXIT_BAR_MISSED if missed else EXIT_OK
