"""A fleet in the middle of an upgrade: a worker and a gateway of an earlier revision beside those of this one.

The earlier ones are taken from the repository's own history.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import orjson
import pytest

from promptmill import AsyncJob, AsyncProducer, keys
from promptmill.settings import Settings
from tests.support.processes import PATIENCE_S, wait_until
from tests.support.server import server_process
from tests.support.streams import check_whole, collect, follow_sse, phases, text_of, wait_for_tokens
from tests.support.worker import QUICK, STEADY, WorkerProcess, worker_process

EARLIER = "4cb92372e796f82b0f8d3e1fd3d718f18961535a"
ROOT = Path(__file__).parents[2]
PACKAGES = ("producer", "workers", "relay", "gateway")
MODELS = '[models.slow]\ntype = "echo"\noptions = { tokens_per_s = 20 }\n'
QUICKER = MODELS.replace("20", "400")
SHORT = "word " * 60
LONG = "word " * 600
"""Runs for 30 seconds: a second worker, which is quicker, starts meanwhile, however busy the machine is."""
PROOF = """
import os, pathlib
import promptmill, promptmill_workers
files = [promptmill.__file__, promptmill_workers.__file__]
pathlib.Path(os.environ["PROOF"], str(os.getpid())).write_text("\\n".join(files))
"""
"""What a process of that revision imports at its start, and leaves behind for the test."""


@dataclass(frozen=True)
class Earlier:
    """The earlier revision's code in a directory, and the environment in which Python prefers it to this one's."""

    code: Path
    proofs: Path

    @property
    def env(self) -> Mapping[str, str]:
        path = os.pathsep.join(str(self.code / package) for package in PACKAGES)
        return {"PYTHONPATH": path, "PROOF": str(self.proofs)}

    def proves(self, pid: int) -> bool:
        """Whether that process really runs the earlier code."""
        files = (self.proofs / str(pid)).read_text().splitlines()
        return len(files) == 2 and all(Path(file).is_relative_to(self.code) for file in files)


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Earlier:
    """The earlier revision, extracted."""
    code, proofs = tmp_path_factory.mktemp("earlier"), tmp_path_factory.mktemp("proofs")
    try:
        packed = subprocess.run(
            ["git", "-C", str(ROOT), "archive", EARLIER, *PACKAGES], capture_output=True, check=True
        ).stdout
    except FileNotFoundError:
        pytest.skip("git is not installed: the earlier revision cannot be taken from the history")
    except subprocess.CalledProcessError as err:
        pytest.skip(f"the history lacks the earlier revision (a shallow clone?): {err.stderr.decode().strip()}")
    subprocess.run(["tar", "-x", "-C", str(code)], input=packed, check=True)
    (code / "producer" / "sitecustomize.py").write_text(PROOF)
    return Earlier(code, proofs)


class Pair:
    """A worker of each revision."""

    def __init__(self, earlier: Earlier, path: Path, settings: Settings, stack: AsyncExitStack) -> None:
        self.workers: dict[str, WorkerProcess] = {}
        self.ids: dict[str, str] = {}
        self._earlier = earlier
        self._path = path
        self._settings = settings
        self._stack = stack

    async def start(self, which: str, path: Path | None = None) -> WorkerProcess:
        """Start one and wait until it can claim; ``path`` is another configuration for it."""
        env = self._earlier.env if which == "earlier" else None
        worker = self._stack.enter_context(worker_process(path or self._path, which, env=env))
        self.ids[which] = await worker.ready(self._settings.store_url)
        if which == "earlier":
            assert self._earlier.proves(worker.pid)
        self.workers[which] = worker
        return worker


async def served_by(producer: AsyncProducer, jobs: list[AsyncJob]) -> set[str]:
    """The workers that ran them, or run them now."""
    redis = (await producer.store()).redis
    states = [orjson.loads(await redis.hget(keys.record(job.id), "st")) for job in jobs]
    return {state["worker"] for state in states if "worker" in state}


@pytest.mark.timeout(300)
async def test_both_claim_and_readers_of_both_see_the_same(earlier: Earlier, write_config) -> None:
    path, settings = write_config(STEADY + MODELS)
    async with AsyncProducer(settings) as producer, AsyncExitStack() as stack:
        pair = Pair(earlier, path, settings, stack)
        await pair.start("earlier")
        await pair.start("this")
        old = stack.enter_context(server_process("promptmill_gateway", path, env=earlier.env))
        new = stack.enter_context(server_process("promptmill_relay", path))
        for server in (old, new):
            await server.until_ready(200)
        assert earlier.proves(old.process.pid)
        jobs: list[AsyncJob] = []
        readings: list[asyncio.Task[list]] = []

        async def both_claim() -> bool:
            job = await producer.submit(SHORT, model="slow")
            jobs.append(job)
            readings.extend(asyncio.create_task(follow_sse(server.port, job.id)) for server in (old, new))
            await wait_for_tokens(producer, job.id, 1)
            return await served_by(producer, jobs) == set(pair.ids.values())

        await wait_until(both_claim, "both claimed a job")
        for number, job in enumerate(jobs):
            events = await collect(producer, job.id)
            check_whole(events)
            assert text_of(events) == SHORT
            for reading in readings[2 * number : 2 * number + 2]:
                assert [(e.id, e.type) for e in await reading] == [(e.id, e.type) for e in events]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("goes", "stays"), [("earlier", "this"), ("this", "earlier")])
@pytest.mark.parametrize("how", ["killed", "drained"])
async def test_either_takes_over_from_the_other(
    earlier: Earlier, write_config, goes: str, stays: str, how: str
) -> None:
    pace = QUICK if how == "killed" else STEADY
    path, settings = write_config(pace + "drain_s = 0.2\n" + MODELS)
    quicker, _ = write_config(pace + QUICKER, "quicker.toml")
    async with AsyncProducer(settings) as producer, AsyncExitStack() as stack:
        pair = Pair(earlier, path, settings, stack)
        leaving = await pair.start(goes)
        jobs = await producer.submit_many([{"prompt": LONG, "model": "slow"} for _ in range(5)])
        for job in jobs:
            await wait_for_tokens(producer, job.id, 3)
        await pair.start(stays, quicker)
        leaving.signal(signal.SIGKILL if how == "killed" else signal.SIGTERM)
        for job in jobs:
            stored = await job.result(2 * PATIENCE_S)
            events = await collect(producer, job.id)
            check_whole(events)
            assert stored.text == text_of(events) == LONG
            assert phases(events) == ["queued", "started", "requeued", "started"]
            outcomes = sorted(a.outcome for a in stored.attempts)
            # What was handed back is an attempt that its worker tells of late, and no crash.
            assert outcomes == sorted(["succeeded", "crashed" if how == "killed" else "cancelled"])
        assert await served_by(producer, jobs) == {pair.ids[stays]}
        await wait_until(lambda: leaving.process.poll() is not None, "the one that leaves ends")
