"""``python -m ops.bench.store``: what one Redis carries, and three of a cluster; with ``--size``, what a load needs.

Jobs are submitted, claimed, written to and ended by the product's own calls, without Celery, a model or a relay: what
is measured is the store's part alone. CPU is the servers' own (user and system, from INFO), µs; memory is
``used_memory`` less what it was before, bytes a job or reader. The baseline of an event is what people write by hand,
one ``XADD`` and one ``PUBLISH`` in a pipeline; ratios are against it on one server. Figures are medians of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import orjson
import uvloop
from ops.bench.procs import start_valkey
from ops.bench.report import machine, number, table
from ops.bench.sizing import LOAD, Figures, size
from ops.bench.stats import median, spread_percent
from tests.support.cluster import running_cluster

from promptmill import keys
from promptmill.contract import JobRequest, Message, Progress, Timeouts, Token
from promptmill.reading import Hub
from promptmill.store import Claimed, Store, Submission
from promptmill.store.scripts import APPEND

AT_ONCE: Final = 100
EVENTS: Final = 200
PROMPT: Final = "What does a store of jobs need to survive the night? " * 10
TEXT: Final = "a token of "
ROWS: Final = (
    ("an event by hand: XADD and PUBLISH", "by_hand"),
    ("an event, one a call, nobody reads", "event"),
    ("an event, one a call, read by one", "event_read"),
    ("an event, five a call, read by one", "event_of_five"),
    ("a job: submit, claim, finish", "job"),
    ("a job that waits", "queued"),
    ("a job that runs, before its first token", "running"),
    ("a token of its log", "token"),
    ("a finished job, its log deleted", "finished"),
    ("a reader", "reader"),
)
MEMORY: Final = frozenset({"queued", "running", "token", "finished", "reader"})

# docs/benchmarks.md, `stream`, `wide` and `Readers`; of Redis this module's own, in docs/scaling.md. Of a job's 7 ms of
# CPU what is not Redis's is taken as two thirds the worker's and one third the gateway's: that was not measured apart.
MEASURED: Final = Figures(
    worker_token_us=76,
    relay_token_us=51,
    redis_token_us=22,
    job_worker_us=4_500,
    job_relay_us=2_300,
    job_redis_us=226,
    worker_base=73e6,
    worker_stream=111e3,
    relay_base=56e6,
    relay_reader=18.3 * 1024,
    redis_running=6_300,
    redis_log_token=42,
    redis_finished=4_400,
    redis_reader=280,
)


class Servers:
    """The one server or the primaries, asked what they have used."""

    def __init__(self, store: Store) -> None:
        self._clients: list[Any] = (
            [store.redis] if store.cluster is None else [node.redis for node in store.cluster.nodes.values()]
        )

    async def cpu_us(self) -> float:
        """User and system time since their start, of all."""
        found = [await client.info("cpu") for client in self._clients]
        return sum(row["used_cpu_user"] + row["used_cpu_sys"] for row in found) * 1e6

    async def memory(self) -> float:
        """What they hold, of all."""
        return sum([(await client.info("memory"))["used_memory"] for client in self._clients])


def _submission() -> Submission:
    request = JobRequest(messages=[Message(role="user", content=PROMPT)], model="echo")
    timeouts = Timeouts(queue_s=3600, connect_s=10, first_token_s=60, idle_s=60, total_s=600)
    return Submission(keys.new_job_id(), request, "promptmill.api", timeouts, 3, timedelta(hours=1))


async def _append(store: Store, jobs: Sequence[tuple[str, str, int]], first: int, count: int) -> None:
    """``count`` events of each job, in one call of the script a job."""
    events = [Token(text=TEXT).to_json()] * count
    for start in range(0, len(jobs), AT_ONCE):
        await store.ask(
            [
                ("EVALSHA", APPEND.sha, 2, keys.record(job_id), keys.log(job_id), claim, epoch, first, *events)
                for job_id, claim, epoch in jobs[start : start + AT_ONCE]
            ]
        )


async def _by_hand(store: Store, names: Sequence[str]) -> None:
    event = Token(text=TEXT).to_json()
    for start in range(0, len(names), AT_ONCE):
        part = names[start : start + AT_ONCE]
        await store.ask(
            [
                command
                for name in part
                for command in (("XADD", f"hand:{name}", "*", "e", event), ("PUBLISH", f"hand:{name}", event))
            ]
        )


async def _round(url: str, count: int) -> dict[str, float]:
    """All figures once, on empty servers."""
    store = await Store.connect(url)
    servers, found = Servers(store), dict[str, float]()
    await store.load_scripts()
    try:
        cpu, memory = await servers.cpu_us(), await servers.memory()
        names: list[str] = []
        for _ in range(count // AT_ONCE):
            jobs = [_submission() for _ in range(AT_ONCE)]
            await store.submit(jobs)
            names += [job.job_id for job in jobs]
        found["queued"] = (await servers.memory() - memory) / len(names)

        event = Progress(phase="started")
        claims = {name: keys.new_token() for name in names}
        held: list[tuple[str, str, int]] = []
        for start in range(0, len(names), AT_ONCE):
            part = names[start : start + AT_ONCE]
            for name, claim in zip(
                part, await asyncio.gather(*(store.claim(n, claims[n], "bench", event) for n in part)), strict=True
            ):
                assert isinstance(claim, Claimed)
                held.append((name, claims[name], claim.epoch))
        await store.wire.call("PING")
        job_us = await servers.cpu_us() - cpu
        running = await servers.memory()
        found["running"] = (running - memory) / len(names)

        cpu = await servers.cpu_us()
        for n in range(EVENTS):
            await _append(store, held, 2 + n, 1)
        found["event"] = (await servers.cpu_us() - cpu) / len(held) / EVENTS
        found["token"] = (await servers.memory() - running) / len(held) / EVENTS

        await _read_ones(store, servers, held, found)

        cpu = await servers.cpu_us()
        end = orjson.dumps({"type": "done", "text": TEXT * EVENTS})
        for start in range(0, len(held), AT_ONCE):
            await asyncio.gather(
                *(
                    store.finish(name, claim, "succeeded", end, {"text": TEXT * EVENTS}, [])
                    for name, claim, _ in held[start : start + AT_ONCE]
                )
            )
        found["job"] = (job_us + await servers.cpu_us() - cpu) / len(held)
        await store.ask([("DEL", keys.log(name)) for name in names])
        found["finished"] = (await servers.memory() - memory) / len(names)

        await _by_hand(store, names)  # makes the streams
        cpu = await servers.cpu_us()
        for _ in range(10):
            await _by_hand(store, names)
        found["by_hand"] = (await servers.cpu_us() - cpu) / len(names) / 10
    finally:
        await store.aclose()
    return found


async def _read_ones(
    store: Store, servers: Servers, held: Sequence[tuple[str, str, int]], found: dict[str, float]
) -> None:
    """A reader a job: what it takes in Redis, and what an event costs that it gets."""
    some = held[: min(len(held), 2_000)]
    memory, hub = await servers.memory(), Hub(store, keepalive_s=3600)
    readers = [await hub.open(name, f"{epoch}-{1 + EVENTS}") for name, _, epoch in some]
    reading = [asyncio.create_task(_drain(reader)) for reader in readers]
    try:
        while sum(await store.listeners([name for name, _, _ in some])) < len(some):  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.05)
        await asyncio.sleep(1)  # their first look at the log
        found["reader"] = (await servers.memory() - memory) / len(some)
        cpu = await servers.cpu_us()
        for n in range(EVENTS):
            await _append(store, some, 2 + EVENTS + n, 1)
        found["event_read"] = (await servers.cpu_us() - cpu) / len(some) / EVENTS
        cpu = await servers.cpu_us()
        for n in range(EVENTS // 5):
            await _append(store, some, 2 + 2 * EVENTS + 5 * n, 5)
        found["event_of_five"] = (await servers.cpu_us() - cpu) / len(some) / EVENTS
    finally:
        await hub.aclose()
        await asyncio.gather(*reading, return_exceptions=True)


async def _drain(reader: Any) -> None:
    async for _ in reader:
        pass


@contextmanager
def _one(directory: Path) -> Generator[str]:
    part, url = start_valkey(directory)
    with part:
        yield url


@contextmanager
def _three(directory: Path) -> Generator[str]:
    with running_cluster(directory, options=("--appendonly", "yes")) as cluster:
        yield cluster.url


PLACES: Final = {"one server": _one, "cluster of three": _three}


def measure(count: int, rounds: int) -> dict[str, list[dict[str, float]]]:
    """All rounds of both places, in an order that alternates."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in PLACES}
    for n in range(rounds):
        for name in [*PLACES] if n % 2 == 0 else [*PLACES][::-1]:
            with tempfile.TemporaryDirectory(prefix="promptmill-bench-") as text, PLACES[name](Path(text)) as url:
                found[name].append(uvloop.run(_round(url, count)))
    return found


def report(found: dict[str, list[dict[str, float]]]) -> str:
    """The table of the medians."""
    header = ("", *(f"{name}, µs or bytes" for name in found), "ratio to by hand", "spread %")
    one = found["one server"]
    by_hand = median([row["by_hand"] for row in one])
    rows: list[list[str]] = []
    for title, name in ROWS:
        values = [number(median([row[name] for row in place]), 0 if name in MEMORY else 1) for place in found.values()]
        ratio = median([row[name] for row in one]) / by_hand
        unit = "bytes" if name in MEMORY else "µs"
        spread = number(spread_percent([row[name] for row in one]))
        rows.append([f"{title}, {unit}", *values, "-" if name in MEMORY else number(ratio, 2), spread])
    return table(header, rows)


def sizes(streams: Sequence[int], speeds: Sequence[float]) -> str:
    """The sizing table."""
    header = (
        "streams at tokens/s",
        "Redis cores",
        "Redis nodes",
        "Redis GB",
        "workers",
        "worker GB",
        "relays",
        "relay GB",
    )
    rows: list[list[str]] = []
    for count in streams:
        for speed in speeds:
            need = size(MEASURED, count, speed)
            gb = [number(value / 1e9, 1) for value in (need.redis_bytes, need.worker_bytes, need.relay_bytes)]
            cells = [number(need.redis_cores, 2), str(need.redis_nodes), gb[0], str(need.workers), gb[1]]
            rows.append([f"{count:,} at {speed:g}", *cells, str(need.relays), gb[2]])
    return table(header, rows)


def main() -> int:
    """Measure and print, or compute."""
    parser = argparse.ArgumentParser(prog="python -m ops.bench.store", description="What one Redis carries.")
    parser.add_argument("--count", type=int, default=2000, help="jobs a round (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default %(default)s)")
    parser.add_argument("--size", action="store_true", help="compute what a load needs, measure nothing")
    parser.add_argument("--streams", type=int, nargs="+", default=[200, 2000, 10_000, 50_000])
    parser.add_argument("--tokens-per-second", type=float, nargs="+", default=[50])
    args = parser.parse_args()
    if args.size:
        print(f"Planned with {LOAD:.0%} of a core; jobs of 500 tokens, kept for a day.\n")
        print(sizes(args.streams, args.tokens_per_second))
        return 0
    load = os.getloadavg()[0]
    print(machine())
    print(f"Load before the run: {load:.2f}.\n")
    print(report(measure(args.count, args.rounds)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
