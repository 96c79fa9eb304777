"""``python -m ops.bench.traffic``: what health and limits cost a job, beside a bare round trip to Redis.

One process against the embedded Valkey. **In turn**: one call after another, so the figure is what a job waits.
**At once**: a hundred callers, so the figure is what a job costs. CPU is that of this process and of Valkey, µs a
call. Figures are medians of the rounds; the order of the rows alternates from round to round.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop
from ops.bench.procs import start_valkey
from ops.bench.report import machine, number, table
from ops.bench.stats import median

from promptmill.rates import RateInfo, RateWindow
from promptmill.routing import Route
from promptmill.settings import ModelConfig, ModelLimits
from promptmill.store import Store
from promptmill.traffic import Traffic

TOGETHER = 100
HEADER = ("a job", "in turn, µs", "at once, µs", "CPU here, µs", "CPU of Valkey, µs")
Act = Callable[[], Awaitable[Any]]


@dataclass(frozen=True)
class Sample:
    """One row of one round, µs a call."""

    in_turn: float
    at_once: float
    here: float
    there: float


def _route(name: str, **limits: Any) -> Route:
    config = ModelConfig(type="local_openai", api_url="http://h/v1", model_name="m", limits=ModelLimits(**limits))
    return Route(name, config)


def _job(traffic: Traffic, route: Route, rate: RateInfo | None = None) -> Act:
    """Admitted, run in no time, and reported."""

    async def job() -> None:
        admission = await traffic.admit(route, "user", tokens=500)
        if not admission.granted:
            raise RuntimeError(f"{route.name}: not admitted: {admission.reason}")
        await traffic.report(admission, code=None, retry_after_s=None, tokens=400, rate=rate)

    return job


def _refused(traffic: Traffic, route: Route) -> Act:
    async def refused() -> None:
        if (await traffic.admit(route, "user", tokens=1)).granted:
            raise RuntimeError(f"{route.name}: admitted")

    return refused


@asynccontextmanager
async def _acts(url: str) -> AsyncGenerator[Mapping[str, Act]]:
    store = await Store.connect(url)
    traffic = Traffic(store, "bench")
    running = asyncio.create_task(traffic.run())
    full = _route("full", concurrency=1)
    held = await traffic.admit(full, "user", tokens=1)
    everything = _route("limited", concurrency=100_000, requests_per_minute=1e7, tokens_per_minute=1e10)
    rate = RateInfo(RateWindow(50, 49, 1.0), RateWindow(1000, 900, 1.0))
    try:
        yield {
            "one round trip (PING)": lambda: store.wire.call("PING"),
            "no limits, healthy: admit and report": _job(traffic, _route("free"), rate),
            "three limits: admit and report": _job(traffic, everything, rate),
            "limit reached: a refusal": _refused(traffic, full),
        }
        await traffic.report(held, code=None, retry_after_s=None, tokens=1, rate=None)
    finally:
        running.cancel()
        await asyncio.wait({running})
        await store.aclose()


async def _cpu_of(store: Store) -> float:
    info: dict[str, Any] = await store.redis.info("cpu")
    return info["used_cpu_user"] + info["used_cpu_sys"]


async def _measure(act: Act, store: Store, count: int) -> Sample:
    for _ in range(50):
        await act()
    started = time.perf_counter()
    for _ in range(count):
        await act()
    in_turn = time.perf_counter() - started

    async def caller() -> None:
        for _ in range(count // TOGETHER):
            await act()

    there, here, started = await _cpu_of(store), time.process_time(), time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(TOGETHER)))
    at_once, here = time.perf_counter() - started, time.process_time() - here
    there = await _cpu_of(store) - there
    return Sample(*(value / count * 1e6 for value in (in_turn, at_once, here, there)))


async def _run(url: str, count: int, rounds: int) -> dict[str, list[Sample]]:
    samples: dict[str, list[Sample]] = {}
    store = await Store.connect(url)
    async with _acts(url) as acts:
        for i in range(rounds):
            for name in acts if i % 2 == 0 else reversed(list(acts)):
                samples.setdefault(name, []).append(await _measure(acts[name], store, count))
    await store.aclose()
    return {name: samples[name] for name in acts}


def report(samples: Mapping[str, list[Sample]]) -> str:
    """The table of the medians."""
    rows: list[list[str]] = []
    for name, found in samples.items():
        columns = ([s.in_turn for s in found], [s.at_once for s in found], [s.here for s in found])
        rows.append([name, *(number(median(c), 1) for c in (*columns, [s.there for s in found]))])
    return table(HEADER, rows)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m ops.bench.traffic", description="What limits cost a job.")
    parser.add_argument("--count", type=int, default=5000, help="calls a row and round (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="promptmill-bench-") as directory:
        part, url = start_valkey(Path(directory))
        with part:
            samples = uvloop.run(_run(url, args.count, args.rounds))
    print(machine())
    print()
    print(report(samples))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
