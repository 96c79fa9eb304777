"""What it costs that nobody reads: jobs that stream to no one, beside the same jobs with a reader each."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import redis.asyncio as aioredis
import uvloop
from ops.bench import proc_stats
from ops.bench.load import Connection, Plan, connect, run_load
from ops.bench.procs import Part, can_connect, free_port, start_simulator, start_valkey
from ops.bench.systems import SLOTS, BaselineTarget, PromptmillTarget, config_text

DONE_S: Final = 180.0


@dataclass(frozen=True)
class Cost:
    """What a token cost: CPU in µs by part, and Redis commands."""

    worker_us: float
    redis_us: float
    commands: float
    calls: float
    """Script calls that wrote tokens (``EVALSHA``), or PUBLISH."""


@contextmanager
def _workshop(name: str, directory: Path, provider: str, models: dict[str, str]) -> Generator[tuple[Any, Any, str]]:
    """A store, a worker and a front: what is asked, the roots of its parts, and the store's address."""
    with ExitStack() as stack:
        store, url = start_valkey(directory)
        stack.enter_context(store)
        port = free_port()
        if name == "baseline":
            env = {"BASELINE_REDIS_URL": url, "BASELINE_PROVIDER_URL": f"{provider}/v1"}
            options = ["--host", "127.0.0.1", "--port", str(port), "--loop", "uvloop", "--http", "httptools"]
            front = ["uvicorn", "ops.bench.baseline.relay:app", *options, "--no-access-log"]
            options = ["--pool", "gevent", "--concurrency", str(SLOTS), "--loglevel", "WARNING"]
            worker = ["celery", "-A", "ops.bench.baseline.tasks", "worker", *options]
            target: Any = BaselineTarget(url=f"http://127.0.0.1:{port}")
        else:
            config = directory / "promptmill.toml"
            config.write_text(f'redis_url = "{url}"\nconcurrency = {SLOTS}\n' + config_text(provider, models))
            env = {}
            front = ["promptmill_gateway", "--config", str(config), "--port", str(port)]
            worker = ["promptmill_workers", "--config", str(config), "--name", "bench"]
            target = PromptmillTarget(url=f"http://127.0.0.1:{port}", models=models)
        parts = {
            role: stack.enter_context(Part(role, [sys.executable, "-m", *command], directory=directory, env=env))
            for role, command in (("relay", front), ("worker", worker))
        }
        parts["relay"].wait_until("a listening port", lambda: can_connect(port))
        roots = {role: [part.pid] for role, part in parts.items()} | {"redis": [store.pid]}
        yield target, roots, url


async def _unread(target: Any, plan: Plan) -> None:
    """Submit all, and wait until all are done, asking for one after the other."""
    connection: Connection = await connect(target.url)
    paths: list[str] = []
    for _ in range(plan.jobs):
        _, body = await connection.request("POST", target.submit_path, target.submit_body(plan.model))
        paths.append(target.job_paths(body)[1])
        await asyncio.sleep(plan.ramp_s / plan.jobs)
    await asyncio.sleep(plan.first_s + plan.tokens / plan.rate)
    for path in paths:
        async with asyncio.timeout(DONE_S):
            while True:
                status, body = await connection.request("GET", path)
                if status == 200 and target.stored_text(body):
                    break
                await asyncio.sleep(0.2)
    connection.close()


async def _counted(url: str) -> tuple[int, int]:
    client: Any = aioredis.Redis.from_url(url)
    try:
        total = (await client.info("stats"))["total_commands_processed"]
        stats = await client.info("commandstats")
    finally:
        await client.aclose()
    return total, sum(stats.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("evalsha", "publish"))


def unread(jobs: int, tokens: int, rate: float) -> dict[str, dict[str, Cost]]:
    """For both systems: the cost of a token with a reader each, and with none."""
    plan = Plan(jobs=jobs, tokens=tokens, rate=rate, first_s=0.2, ramp_s=1.0, stall_s=30)
    warm = Plan(jobs=4, tokens=5, rate=50, first_s=0.05, ramp_s=0.2, stall_s=30)
    models = {plan.model: "sim", warm.model: "warm"}
    found: dict[str, dict[str, Cost]] = {}
    for name in ("baseline", "promptmill"):
        with tempfile.TemporaryDirectory(prefix="promptmill-bench-") as text, ExitStack() as stack:
            directory = Path(text)
            simulator, provider = start_simulator(directory)
            stack.enter_context(simulator)
            target, roots, url = stack.enter_context(_workshop(name, directory, provider, models))
            run_load(target, warm)
            costs: dict[str, Cost] = {}
            for how in ("read", "unread", "read", "unread"):
                print(f"{name}: {how}", file=sys.stderr, flush=True)
                before, (total, calls) = proc_stats.cpu_seconds(roots), asyncio.run(_counted(url))
                if how == "read":
                    run_load(target, plan)
                else:
                    uvloop.run(_unread(target, plan))
                after, (total_after, calls_after) = proc_stats.cpu_seconds(roots), asyncio.run(_counted(url))
                spent = {role: (after[role] - before[role]) / (jobs * tokens) * 1e6 for role in roots}
                per = jobs * tokens
                costs[how] = Cost(
                    spent["worker"], spent["redis"], (total_after - total) / per, (calls_after - calls) / per
                )
            found[name] = costs
    return found
