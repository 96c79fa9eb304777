"""A job that ends its workers runs alone, and only then is it convicted; its neighbours are not."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from collections import Counter
from pathlib import Path

import psutil
import pytest

from promptmill import AsyncJob, AsyncProducer, JobFailed
from promptmill.client.dead import dead_request
from promptmill.contract import Job
from promptmill.errors import BadRequest, NotFound
from promptmill.heartbeat import read_beats
from promptmill.usage.verify import verify_usage
from tests.support.plugin import install_plugin
from tests.support.processes import PATIENCE_S, wait_gone, wait_until
from tests.support.up import promptmill
from tests.support.worker import WorkerProcess, worker_process

DEADLY = """
import asyncio, os, signal
from promptmill_workers.backends.base import Finished, TextDelta

class Deadly:
    def __init__(self, name, config):
        self.options = config.options

    async def complete(self, call):
        prompt = call.request.messages[-1].content
        yield TextDelta("begun ")
        if prompt == "die":
            await asyncio.sleep(0.2)
            os.kill(os.getpid(), signal.SIGKILL)
        if prompt == "stall":
            import time
            time.sleep(1000)
        if prompt == "die unless alone":
            with open("/proc/self/cmdline", "rb") as command:
                if b"quarantined" not in command.read():
                    os.kill(os.getpid(), signal.SIGKILL)
        if prompt == "wait":
            while not os.path.exists(self.options["mark"]):
                await asyncio.sleep(0.05)
        yield TextDelta("and done")
        yield Finished("stop")

    async def aclose(self):
        pass
"""
CONFIG = """
heartbeat_s = 0.4
dead_after_s = 4.0
loop_stall_s = 5.0
[models.deadly]
type = "deadly"
options = {{ mark = "{mark}" }}
"""


class Fleet:
    """Workers that are started anew when they die, as `promptmill up` and service managers do."""

    def __init__(self, config: Path, env: dict[str, str], count: int) -> None:
        self._made = [worker_process(config, f"worker-{n}", env=env) for n in range(count)]
        self._config, self._env = config, env
        self.workers = [made.__enter__() for made in self._made]
        self.deaths = 0
        self._task = asyncio.create_task(self._tend())

    async def _tend(self) -> None:
        while True:
            for i, worker in enumerate(self.workers):
                if worker.process.poll() is not None:
                    self.deaths += 1
                    worker.stop()
                    self.workers[i] = WorkerProcess(self._config, worker.name, worker.log, env=self._env)
            await asyncio.sleep(0.05)

    async def aclose(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        for worker in self.workers:
            worker.stop()


@pytest.fixture
def deadly(write_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Configuration, settings, and environment of workers that have the plug-in."""
    site = install_plugin(tmp_path / "site", "deadly", DEADLY, "Deadly")
    monkeypatch.syspath_prepend(site)
    path, settings = write_config(CONFIG.format(mark=tmp_path / "mark"))
    return path, settings, {"PYTHONPATH": str(site)}


async def in_quarantine(producer: AsyncProducer, job_id: str) -> bool:
    events = producer.events(job_id)
    try:
        async with asyncio.timeout(0.5):
            async for event in events:
                if "in quarantine" in (getattr(event, "message", None) or ""):
                    return True
    except TimeoutError:
        return False
    finally:
        await events.aclose()
    return False


async def given_up(producer: AsyncProducer, job_id: str) -> Job:
    with pytest.raises(JobFailed):
        await producer.result(job_id, 90)
    return await producer.get(job_id)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("prompt", ["die", "stall"])
async def test_a_job_that_ends_its_workers_is_poisoned_and_its_neighbours_are_not(deadly, prompt: str) -> None:
    path, settings, env = deadly
    mark = Path(settings.models["deadly"].options["mark"])
    async with AsyncProducer(settings) as producer:
        fleet = Fleet(path, env, 2)
        try:
            neighbours = [await producer.submit("wait", model="deadly") for _ in range(3)]
            for job in neighbours:
                await wait_until(lambda j=job: running(producer, j.id), "the neighbour runs", timeout_s=60)
            poison = await producer.submit(prompt, model="deadly", user=prompt)
            job = await given_up(producer, poison.id)
            await asyncio.to_thread(mark.touch)
            stored = [await j.result(90) for j in neighbours]
        finally:
            await fleet.aclose()
        assert job.error is not None
        assert (job.error.code, job.error.retryable) == ("poisoned", False)
        assert [a.outcome for a in job.attempts] == ["crashed"] * 3
        assert {j.text for j in stored} == {"begun and done"}
        assert fleet.deaths >= 2
        assert [j.id for j in await producer.dead_jobs(prompt)] == [poison.id]
        assert (await verify_usage(await producer.store())).ok


async def running(producer: AsyncProducer, job_id: str) -> bool:
    return (await producer.get(job_id)).state == "running"


async def test_a_job_that_is_well_alone_succeeds(deadly) -> None:
    path, settings, env = deadly
    async with AsyncProducer(settings) as producer:
        fleet = Fleet(path, env, 1)
        try:
            job = await producer.submit("die unless alone", model="deadly", user="well")
            stored = await job.result(90)
        finally:
            await fleet.aclose()
        assert (stored.text, stored.attempt) == ("begun and done", 3)
        assert await producer.dead_jobs("well") == []
        beats, _ = await read_beats(await producer.store())
        assert [b for b in beats if b.state == "quarantine"] == []


async def test_one_whose_whole_worker_is_killed_is_not_convicted(deadly) -> None:
    path, settings, env = deadly
    mark = Path(settings.models["deadly"].options["mark"])
    async with AsyncProducer(settings) as producer:
        fleet = Fleet(path, env, 1)
        try:
            job = await a_job_in_quarantine(producer, fleet)
            worker = psutil.Process(fleet.workers[0].pid)
            own = {child.pid for child in worker.children(recursive=True)}
            worker.kill()
            wait_gone(own)
            await wait_until(lambda: attempt_is(producer, job.id, 4), "it runs alone once more", timeout_s=60)
            await asyncio.to_thread(mark.touch)
            assert (await job.result(60)).text == "begun and done"
        finally:
            await fleet.aclose()


async def test_one_whose_forking_process_is_killed_is_not_convicted(deadly) -> None:
    path, settings, env = deadly
    mark = Path(settings.models["deadly"].options["mark"])
    async with AsyncProducer(settings) as producer:
        fleet = Fleet(path, env, 1)
        try:
            job = await a_job_in_quarantine(producer, fleet)
            worker = psutil.Process(fleet.workers[0].pid)
            (forking,) = worker.children()
            # Where the job's message was sent twice, another one finds that the job is taken, and ends.
            await wait_until(lambda: len(forking.children()) == 1, "it has forked one that stays")
            own = {forking.pid, *(child.pid for child in forking.children())}
            forking.kill()
            wait_gone(own)
            await wait_until(lambda: attempt_is(producer, job.id, 4), "it runs alone once more", timeout_s=60)
            await asyncio.to_thread(mark.touch)
            assert (await job.result(60)).text == "begun and done"
            assert worker.is_running(), "nothing of it was the worker's fault"
        finally:
            await fleet.aclose()


async def a_job_in_quarantine(producer: AsyncProducer, fleet: Fleet) -> AsyncJob:
    """One that waits for the mark, and that lost its worker twice."""
    job = await producer.submit("wait", model="deadly")
    for attempt in (1, 2):
        await wait_until(lambda n=attempt: attempt_is(producer, job.id, n), f"attempt {attempt}", timeout_s=60)
        fleet.workers[0].signal(signal.SIGKILL)
    await wait_until(lambda: in_quarantine(producer, job.id), "it runs alone", timeout_s=60)
    return job


async def attempt_is(producer: AsyncProducer, job_id: str, number: int) -> bool:
    job = await producer.get(job_id)
    return job.state == "running" and job.attempt == number


async def test_a_worker_that_stops_hands_its_quarantined_job_back(deadly) -> None:
    path, settings, env = deadly
    mark = Path(settings.models["deadly"].options["mark"])
    async with AsyncProducer(settings) as producer:
        fleet = Fleet(path, env, 1)
        try:
            job = await a_job_in_quarantine(producer, fleet)
            first = fleet.workers[0]
            first.signal(signal.SIGTERM)
            await wait_until(lambda: "draining: 1 jobs here" in first.log.read_text(), "it drains")
            await asyncio.sleep(0.3)  # a second signal counts only after a moment: supervisors signal twice
            first.signal(signal.SIGTERM)
            await asyncio.to_thread(first.process.wait, PATIENCE_S)
            assert first.process.returncode == 0
            # Handing back costs no attempt.
            await wait_until(lambda: attempt_is(producer, job.id, 3), "another runs it", timeout_s=60)
            await asyncio.to_thread(mark.touch)
            assert (await job.result(60)).text == "begun and done"
            stored = await job.get()
            assert (stored.attempt, Counter(a.outcome for a in stored.attempts)["crashed"]) == (3, 2)
        finally:
            await fleet.aclose()


async def test_dead_jobs_are_listed_shown_and_retried(deadly, tmp_path: Path) -> None:
    path, settings, env = deadly

    def dead_command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return promptmill("job", "dead", *arguments, "--config", str(path), home=tmp_path, **env)

    async with AsyncProducer(settings) as producer:
        fleet = Fleet(path, env, 1)
        try:
            dead = await producer.submit("die", model="deadly", user="shown", metadata={"mine": 1})
            await given_up(producer, dead.id)
            alive = await producer.submit("hello", model="deadly")
            await alive.result(60)
            listed = dead_command("list")
            assert (listed.returncode, dead.id in listed.stdout, "poisoned" in listed.stdout) == (0, True, True)
            shown = dead_command("show", dead.id, "--json")
            told = json.loads(shown.stdout)
            assert told["request"]["messages"][0]["content"] == "die"
            assert len(told["job"]["attempts"]) == 3
            assert "OUTCOME" in dead_command("show", dead.id).stdout
            # What makes it deadly is mended, say: the same request, as a new job that names the old one.
            retried = dead_command("retry", dead.id, "--json")
            new_id = json.loads(retried.stdout)["retried"][0]["new_id"]
            assert (await producer.retry_dead(dead.id)).id == new_id
            assert (await producer.get(new_id)).metadata == {"mine": 1, "retry_of": dead.id}
            await producer.cancel(new_id)
            assert await producer.dead_jobs("shown") == []
            for wrong, code, status in ((alive.id, "bad_request", 2), ("A" * 22, "not_found", 3)):
                refused = dead_command("retry", wrong)
                assert (refused.returncode, code in refused.stderr) == (status, True)
            with pytest.raises(BadRequest):
                await dead_request(await producer.store(), alive.id)
            with pytest.raises(NotFound):
                await producer.retry_dead("A" * 22)
        finally:
            await fleet.aclose()
