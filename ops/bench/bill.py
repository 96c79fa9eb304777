"""``python -m ops.bench.bill``: does the ledger agree with what a provider counted, after faults, cancels and kills?

Jobs (2,000) of a role whose models fail at random go through two real workers, one after the other of which is killed
with -9 and replaced; some jobs are cancelled. Then the ledger, its sums and the simulated provider's own count are laid
side by side. Exit code 1 where something that must be equal is not.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import sys
import tempfile
from collections import Counter
from contextlib import AsyncExitStack, ExitStack, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
from ops.bench.report import number, table
from tests.support.simulator import SimulatorHandle, running_simulator
from tests.support.store import running_store
from tests.support.worker import WorkerProcess, worker_process

from promptmill import AsyncJob, AsyncProducer, JobCancelled, JobFailed, keys
from promptmill.settings import load_settings
from promptmill.store import Store
from promptmill.usage.report import read_usage
from promptmill.usage.verify import verify_usage

CONFIG = """
redis_url = "{redis}"
heartbeat_s = 0.5
dead_after_s = 3
concurrency = 200
"""
MODEL = """
[models.{name}]
type = "anthropic_api"
api_url = "{url}"
model_name = "{script}"
price = {{ input = 1, output = 2 }}
limits = {{ concurrency = 150 }}
"""
SCRIPTS = {
    "good": "sim:tokens=40,rate=200",
    "slow": "sim:tokens=60,rate=60",
    "cut": "sim:tokens=40,rate=200,fault=cut,after=20",
    "busy": "sim:fault=529",
    "garbled": "sim:tokens=40,rate=200,fault=malformed,after=10",
}
ROLES = {
    "a": ("cut", "good", "slow"),
    "b": ("good", "slow"),
    "c": ("slow", "good"),
    "d": ("busy", "garbled", "good"),
}
INTERRUPTED = {"cancelled", "crashed"}


def configuration(redis: str, url: str) -> str:
    text = CONFIG.format(redis=redis)
    for name, script in SCRIPTS.items():
        text += MODEL.format(name=name, url=url, script=script)
    for role, models in ROLES.items():
        slots = zip(("primary", "backup_1", "backup_2"), models, strict=False)
        text += f"[roles.{role}]\n" + "".join(f'{slot} = "{model}"\n' for slot, model in slots)
    return text


async def submit_and_wait(producer: AsyncProducer, jobs: int, chance: random.Random) -> Counter[str]:
    """Submit in the pace of the workers; answers how many jobs ended in which way."""
    ends: Counter[str] = Counter()
    places = asyncio.Semaphore(300)

    async def one(job: AsyncJob) -> None:
        if chance.random() < 0.05:
            await asyncio.sleep(chance.random())
            await job.cancel("the experiment")
        try:
            await job.result(180)
            ends["succeeded"] += 1
        except JobCancelled:
            ends["cancelled"] += 1
        except JobFailed as error:
            ends[error.code] += 1
        finally:
            places.release()

    async with asyncio.TaskGroup() as group:
        for _ in range(jobs):
            await places.acquire()
            role = chance.choice(sorted(ROLES))
            job = await producer.submit("x" * chance.randint(40, 800), role=role, user=f"u{chance.randint(1, 5)}")
            group.create_task(one(job))
    return ends


async def kill_two(stack: ExitStack, workers: list[WorkerProcess], config: Path, simulator: SimulatorHandle) -> None:
    """One worker after the other, each when a third more of the tokens has been written; a new one takes its place."""
    for round_, worker in enumerate(list(workers)):
        while simulator.stats()["tokens_written"] < 15_000 * (round_ + 1):  # noqa: ASYNC110 - it runs in a thread
            await asyncio.sleep(0.1)
        worker.signal(signal.SIGKILL)
        stack.enter_context(worker_process(config, f"next-{round_}"))


async def entries_of(store: Store) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    now = datetime.now(UTC)
    for day in {(now - timedelta(days=n)).date().isoformat() for n in (0, 1)}:
        found += [orjson.loads(raw) for raw in (await store.redis.hgetall(keys.ledger(day))).values()]
    return found


async def experiment(jobs: int, seed: int) -> bool:
    chance = random.Random(seed)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(running_store(directory))
        simulator = stack.enter_context(running_simulator())
        config = directory / "bill.toml"
        config.write_text(configuration(server.url, simulator.url))
        workers = [stack.enter_context(worker_process(config, f"w{n}")) for n in range(2)]
        async with AsyncExitStack() as exits:
            producer = await exits.enter_async_context(AsyncProducer(load_settings(config)))
            store = await Store.connect(server.url)
            exits.push_async_callback(store.aclose)
            for worker in workers:
                await worker.ready(server.url)
            killing = asyncio.create_task(kill_two(stack, workers, config, simulator))
            ends = await submit_and_wait(producer, jobs, chance)
            killing.cancel()
            with suppress(asyncio.CancelledError):
                await killing
            while await store.redis.zcard(keys.UNBOOKED):  # noqa: ASYNC110 - other processes book
                await asyncio.sleep(0.5)
            return await compare(store, simulator, ends)


async def compare(store: Store, simulator: SimulatorHandle, ends: Counter[str]) -> bool:
    entries, requests = await entries_of(store), simulator.requests
    print("ends:", dict(ends.most_common()))
    rows: list[tuple[str, ...]] = []
    equal = True
    for name, script in SCRIPTS.items():
        own = [e for e in entries if e.get("model") == name]
        asked = [r for r in requests if r.model == script]
        whole = [e for e in own if not e.get("estimated") and e["outcome"] == "succeeded"]
        finished = [r for r in asked if r.outcome == "finished"]
        counted = sum(e["in"] + e["out"] for e in whole)
        billed = sum(r.input_tokens + r.output_tokens for r in finished)
        interrupted = [e for e in own if e["outcome"] in INTERRUPTED]
        died = sum(e["out"] for e in own) - sum(e["out"] for e in whole)
        written = sum(r.tokens_written for r in asked) - sum(r.tokens_written for r in finished)
        rows.append(
            (name, *map(str, (len(own), len(asked), len(whole), len(finished), counted, billed, died, written)))
        )
        # What the provider finished and we did not was interrupted: by a cancel, or by the death of its worker.
        equal = equal and len(whole) <= len(finished) <= len(whole) + len(interrupted)
        equal = equal and (counted == billed or len(whole) < len(finished))
    head = ("model", "entries", "requests", "whole", "finished", "tokens", "billed", "estimated out", "written")
    print(table(head, rows))
    total = (await read_usage(store, "yesterday", "today", "model", None)).total
    verified = await verify_usage(store, "yesterday", "today")
    sums = (sum(e["in"] for e in entries), sum(e["out"] for e in entries), len(entries))
    rolled = (total.input_tokens, total.output_tokens, total.attempts)
    print("entries (in, out, attempts):", sums, "sums:", rolled, "verify:", "ok" if verified.ok else "differs")
    out = sum(r.tokens_written for r in requests)
    print(f"output: {sums[1]} booked, {out} written by the provider ({number(100 * sums[1] / out)} %)")
    return equal and sums == rolled and verified.ok


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ops.bench.bill", description=__doc__)
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    ok = asyncio.run(experiment(args.jobs, args.seed))
    print("the bill is true" if ok else "THE BILL IS NOT TRUE")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
