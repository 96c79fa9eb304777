"""``python -m ops.bench.batch``: many lines at once, beside a bare asyncio loop and beside Celery, in the same run.

``long``: 10,000 lines of 2 s at concurrency 500, one worker. ``short``: lines of 20 ms. ``memory``: 100,000 lines
through ``promptmill batch run``: the client's peak memory, and what a finished line costs in the store beyond its
request and its answer. All against the embedded Valkey and the simulated provider, each a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import aiohttp
import orjson
import redis
import uvloop
from ops.bench.proc_stats import cpu_seconds
from ops.bench.procs import Part, start_simulator, start_valkey
from ops.bench.profiling import recording
from ops.bench.report import machine, number, table

from promptmill import AsyncProducer, keys
from promptmill.batch import BatchHead, BatchLine, BatchStatus
from promptmill.contract import parse_request
from promptmill.settings import load_settings
from promptmill.store import Store

CHUNK = 100
LONG = "sim:tokens=10,rate=20,first=1.5"
CURATOR = "bespokelabs-curator==0.1.31"
SHORT = "sim:tokens=2,first=0.02"
CONFIG = """
redis_url = "{redis}"
concurrency = {concurrency}
batch_share = 1.0
max_queued = 0
[models.sim]
type = "local_openai"
api_url = "{url}/v1"
model_name = "{model}"
"""


@dataclass(frozen=True)
class Ground:
    """What every run needs."""

    directory: Path
    redis: str
    simulator: str
    roots: dict[str, list[int]] = field(default_factory=dict[str, list[int]])


@dataclass(frozen=True)
class Run:
    """One system's way through the lines; CPU in seconds by process."""

    name: str
    lines: int
    wall_s: float
    cpu_s: Mapping[str, float]

    @property
    def row(self) -> tuple[str, ...]:
        """For the table."""
        cpu = ", ".join(f"{role} {number(1e6 * used / self.lines)}" for role, used in self.cpu_s.items())
        return self.name, str(self.lines), number(self.wall_s, 2), number(self.lines / self.wall_s), cpu


@contextmanager
def ground() -> Generator[Ground]:
    """The store and the provider."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="promptmill-batch-")))
        valkey, url = start_valkey(directory)
        stack.enter_context(valkey)
        simulator, provider = start_simulator(directory)
        stack.enter_context(simulator)
        yield Ground(directory, url, provider, {"store": [valkey.pid], "provider": [simulator.pid]})


@contextmanager
def worker(on: Ground, model: str, concurrency: int) -> Generator[tuple[Path, dict[str, list[int]]]]:
    """One worker process; answers the configuration and whose CPU counts."""
    config = on.directory / "batch.toml"
    # One slot is always left to messages.
    config.write_text(CONFIG.format(redis=on.redis, url=on.simulator, model=model, concurrency=concurrency + 1))
    command = [sys.executable, "-m", "promptmill_workers", "--config", str(config)]
    with Part("worker", command, directory=on.directory) as part:
        part.wait_until("its start", lambda: b"started" in part.log.read_bytes())
        yield config, {**on.roots, "worker": [part.pid]}


def line_of(index: int) -> BatchLine:
    """A line as a client uploads it."""
    request = parse_request({"prompt": f"say {index}", "model": "sim"})
    return BatchLine(f"line-{index}", orjson.loads(request.to_json()))


class Clock:
    """Wall and CPU time from its making on."""

    def __init__(self, name: str, roots: Mapping[str, list[int]]) -> None:
        self._name = name
        self._roots = {**roots, "client": [os.getpid()]}
        self._cpu = cpu_seconds(self._roots)
        self._began = time.perf_counter()

    def run(self, lines: int) -> Run:
        """What it took until now."""
        wall_s = time.perf_counter() - self._began
        now = cpu_seconds(self._roots)
        return Run(self._name, lines, wall_s, {role: now[role] - self._cpu[role] for role in self._roots})


# -- the systems ---------------------------------------------------------------------------------------------------


async def bare_loop(on: Ground, model: str, lines: int, concurrency: int) -> Run:
    """What cannot be beaten: a loop that only asks, and keeps nothing."""
    clock = Clock("bare asyncio loop", on.roots)
    left = iter(range(lines))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def caller() -> None:
            for index in left:
                prompt = [{"role": "user", "content": f"say {index}"}]
                request = {"model": model, "stream": True, "messages": prompt}
                async with session.post(f"{on.simulator}/v1/chat/completions", json=request) as answer:
                    answer.raise_for_status()
                    async for raw in answer.content:
                        if raw.startswith(b"data: {"):
                            orjson.loads(raw[6:])

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(caller())
    return clock.run(lines)


async def promptmill(on: Ground, model: str, lines: int, concurrency: int, profile: Path | None) -> Run:
    """Upload and run; every result is read as it comes."""
    with worker(on, model, concurrency) as (config, roots), recording({"worker": roots["worker"]}, "batch", profile):
        async with AsyncProducer(load_settings(config)) as producer:
            await until_ready(producer)
            clock = Clock("promptmill, one batch", roots)
            batch_id = keys.new_job_id()
            batches = producer.batches
            await batches.create(batch_id, BatchHead())

            async def upload() -> None:
                for start in range(0, lines, CHUNK):
                    part = [line_of(index) for index in range(start, min(start + CHUNK, lines))]
                    await batches.add(batch_id, start // CHUNK, part)
                await batches.seal(batch_id, lines)

            uploading = asyncio.create_task(upload())
            offset = 0
            status: BatchStatus | None = None
            while offset < lines:
                found, offset = await batches.results(batch_id, offset)
                if not found:
                    status = await batches.wait_change(batch_id, status)
                if any(result.job is None or result.job.state != "succeeded" for result in found):
                    raise RuntimeError(f"a line failed: {found}")
            await uploading
            return clock.run(lines)


async def until_ready(producer: AsyncProducer) -> None:
    """Until a worker takes jobs."""
    while not (await producer.ready()).ok:  # noqa: ASYNC110 - another process
        await asyncio.sleep(0.05)


@contextmanager
def celery(on: Ground, concurrency: int) -> Generator[dict[str, list[int]]]:
    """A Celery worker on threads."""
    env = {"BASELINE_REDIS_URL": f"{on.redis[:-1]}1", "BASELINE_PROVIDER_URL": f"{on.simulator}/v1"}
    os.environ.update(env)  # this process sends the tasks
    command = [sys.executable, "-m", "celery", "-A", "ops.bench.baseline.batch_tasks", "worker", "--pool", "threads"]
    command += ["--concurrency", str(concurrency), "--loglevel", "WARNING", "--prefetch-multiplier", "1"]
    command += ["--without-mingle", "--without-gossip"]
    with Part("celery", command, directory=on.directory, env=env) as part:
        from ops.bench.baseline.batch_tasks import app, nothing  # noqa: PLC0415 - it reads the environment

        part.wait_until("an answer to a ping", lambda: app.control.ping(timeout=0.5))
        nothing.delay(0)
        yield {**on.roots, "worker": [part.pid]}


def celery_loop(on: Ground, model: str, lines: int, concurrency: int) -> Run:
    """A task a line, and every result awaited."""
    with celery(on, concurrency) as roots:
        from ops.bench.baseline.batch_tasks import line  # noqa: PLC0415

        clock = Clock("the obvious Celery loop", roots)
        waiting = [line.delay(model, f"say {index}") for index in range(lines)]
        failed = 0
        for result in waiting:
            result.get(timeout=600, propagate=False)
            failed += result.failed()
        run = clock.run(lines)
    return replace(run, name=f"{run.name}, {failed} lines failed") if failed else run


def celery_nothing(on: Ground, lines: int, concurrency: int) -> Run:
    """Tasks that do nothing, sent while they are run."""
    with celery(on, concurrency) as roots, redis.Redis.from_url(f"{on.redis[:-1]}1") as client:
        from ops.bench.baseline.batch_tasks import nothing  # noqa: PLC0415

        clock = Clock("Celery, tasks that do nothing", roots)
        for index in range(lines):
            nothing.delay(index)
        while client.llen("celery") or client.hlen("unacked"):
            time.sleep(0.01)
        return clock.run(lines)


def curator(on: Ground, model: str, lines: int, concurrency: int) -> Run | None:
    """A public tool, in an environment that uv makes for it; None where that cannot be."""
    script = Path(__file__).parent / "baseline" / "curator_batch.py"
    command = ["uv", "run", "--isolated", "--no-project", "--with", CURATOR, "python", str(script)]
    about = [f"{on.simulator}/v1", model, str(lines), str(concurrency)]
    before = cpu_seconds(on.roots)
    began = time.perf_counter()
    done = subprocess.run([*command, *about], capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{CURATOR} did not run: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    told = orjson.loads(done.stdout.strip().splitlines()[-1])
    if told["answers"] != lines:
        raise RuntimeError(f"{CURATOR} gave {told['answers']} answers to {lines} lines")
    print(f"{CURATOR}: {time.perf_counter() - began:.1f} s with its start", file=sys.stderr)
    after = cpu_seconds(on.roots)
    cpu = {role: after[role] - before[role] for role in on.roots} | {"client": told["cpu_s"]}
    return Run(CURATOR, lines, told["wall_s"], cpu)


# -- the measurements ----------------------------------------------------------------------------------------------


def compare(model: str, lines: int, concurrency: int, systems: Sequence[str], profile: Path | None) -> list[Run]:
    """Each system once, one after the other."""
    found: list[Run] = []
    with ground() as on, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        acts: dict[str, Callable[[], Run | None]] = {
            "bare": lambda: runner.run(bare_loop(on, model, lines, concurrency)),
            "promptmill": lambda: runner.run(promptmill(on, model, lines, concurrency, profile)),
            "celery": lambda: celery_loop(on, model, lines, concurrency),
            "nothing": lambda: celery_nothing(on, lines, concurrency),
            "curator": lambda: curator(on, model, lines, concurrency),
        }
        for name in systems:
            run = acts[name]()
            if run is not None:
                found.append(run)
                print(f"{run.name}: {run.wall_s:.2f} s", file=sys.stderr)
    return found


def show(runs: Sequence[Run], bar: float | None) -> bool:
    """The table; False where the bar is not held."""
    head = ("system", "lines", "s", "lines/s", "CPU a line, µs")
    print(table(head, [run.row for run in runs]))
    by_name = {run.name.split()[0]: run for run in runs}
    if not {"bare", "promptmill,"} <= by_name.keys():
        return True
    ratio = by_name["promptmill,"].wall_s / by_name["bare"].wall_s
    wanted = "" if bar is None else f" (the bar is {bar:g})"
    print(f"promptmill takes {ratio:.3f} times as long as the bare loop{wanted}")
    return bar is None or ratio <= bar


def measure_memory(lines: int, concurrency: int) -> bool:
    """``batch run`` on a file; the bars are 150 MB of the client and 2 KB a line in the store."""
    with ground() as on, worker(on, SHORT, concurrency) as (config, _):
        source, results = on.directory / "prompts.jsonl", on.directory / "results.jsonl"
        with source.open("wb") as out:
            for index in range(lines):
                out.write(orjson.dumps({"id": f"line-{index}", "prompt": f"say {index}"}) + b"\n")
        asyncio.run(_ready(config))
        with redis.Redis.from_url(on.redis) as client:
            before = client.info("memory")["used_memory"]
            command = [sys.executable, "-m", "promptmill.cli.app", "batch", "run", str(source), "-o", str(results)]
            env = {**os.environ, "PROMPTMILL_CONFIG": str(config)}
            began = time.perf_counter()
            process = subprocess.Popen([*command, "--model", "sim"], env=env, cwd=on.directory)
            _, code, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(code)
            wall_s = time.perf_counter() - began
            written = sum(1 for _ in results.open("rb"))
            # The logs go a minute after their jobs' ends; outbox and unbooked ones go before.
            while client.info("keyspace")["db0"]["keys"] > lines + 500 or client.exists(keys.BATCHES, keys.UNBOOKED):
                time.sleep(1)
            grown = client.info("memory")["used_memory"] - before
            sizes = asyncio.run(_content(on.redis))
            parts = _parts(client)
        line_bytes = grown / lines - sizes
        print(f"{lines} lines in {wall_s:.1f} s ({lines / wall_s:.0f} lines/s); {written} result lines")
        print(f"client: {used.ru_maxrss / 1024:.0f} MB at most (the bar is 150)")
        print(
            f"store: {grown / lines:.0f} bytes a finished line, {sizes:.0f} of them request and answer: "
            f"{line_bytes:.0f} beyond (the bar is 2,048)"
        )
        print(table(("keys", "bytes a line"), [(name, number(size / lines)) for name, size in parts.items()]))
        return (process.returncode, written) == (0, lines) and used.ru_maxrss < 150 * 1024 and line_bytes < 2048


async def _ready(config: Path) -> None:
    async with AsyncProducer(load_settings(config)) as producer:
        await until_ready(producer)


async def _content(url: str, sample: int = 500) -> float:
    """Bytes of request and answer of a line, on average over some."""
    store = await Store.connect(url)
    found: list[int] = []
    async for name in store.redis.scan_iter("pm:{*}:job", count=1000):
        request, end = await store.redis.hmget(name, "request", "end")
        if request and end:
            found.append(len(request) + len((orjson.loads(end).get("text") or "").encode()))
        if len(found) == sample:
            break
    await store.aclose()
    return sum(found) / len(found)


def _parts(client: redis.Redis, sample: int = 300) -> dict[str, float]:
    """What each kind of key takes in all; of the jobs' records from some of them."""
    sums: dict[str, float] = {"records": 0.0, "batch": 0.0, "ledger": 0.0, "other": 0.0}
    records, measured = 0, 0
    for name in client.scan_iter(count=1000):
        size_of: Callable[[], float] = lambda name=name: float(client.memory_usage(name, samples=0) or 0)  # noqa: E731
        if name.endswith(b"}:job"):
            records += 1
            if measured < sample:
                measured += 1
                sums["records"] += size_of()
        else:
            kind = "batch" if b"{batch:" in name else "ledger" if b"{ledger:" in name else "other"
            sums[kind] += size_of()
    sums["records"] *= records / max(1, measured)
    return sums


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m ops.bench.batch", description=__doc__)
    parser.add_argument("what", choices=("long", "short", "memory"))
    parser.add_argument("--lines", type=int, help="default: 10,000, in memory 100,000")
    parser.add_argument("--concurrency", type=int, default=500)
    parser.add_argument("--systems", help="a comma-separated part of bare,promptmill,celery,nothing,curator")
    parser.add_argument("--profile", type=Path, help="write what the worker spends its time on into this directory")
    args = parser.parse_args(argv)
    print(machine())
    if args.what == "memory":
        return 0 if measure_memory(args.lines or 100_000, args.concurrency) else 1
    long = args.what == "long"
    systems = (args.systems or ("bare,promptmill,celery,curator" if long else "bare,promptmill,nothing,celery")).split(
        ","
    )
    runs = compare(LONG if long else SHORT, args.lines or 10_000, args.concurrency, systems, args.profile)
    return 0 if show(runs, 1.25 if long else None) else 1


if __name__ == "__main__":
    sys.exit(main())
