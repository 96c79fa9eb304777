"""Families of workers, the watchdog, and models whose login expired."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from pathlib import Path

import pytest
from redis.asyncio import Redis

from promptmill import AsyncProducer, JobFailed, keys
from promptmill.contract import Progress
from promptmill.heartbeat import read_beats
from promptmill.queues import API_FAMILY, queue_for
from promptmill.store import Store
from tests.support.plugin import install_plugin
from tests.support.processes import PATIENCE_S, wait_until
from tests.support.worker import QUICK, STEADY, worker_process

FAMILY_OF_ITS_OWN = """
[models.plain]
type = "echo"
[models.apart]
type = "echo"
family = "apart"
"""

BLOCKS_ONCE = """
import time
from pathlib import Path
from promptmill_workers.backends.base import Finished, TextDelta

class Backend:
    def __init__(self, name, config):
        self.mark = Path(config.options["mark"])

    async def complete(self, call):
        if not self.mark.exists():
            self.mark.touch()
            time.sleep(60)  # what no backend may do: the whole event loop stands still
        yield TextDelta("after the block")
        yield Finished("stop")

    async def aclose(self):
        return
"""

LOGIN = """
from pathlib import Path
from promptmill.errors import BackendError
from promptmill_workers.backends.base import Finished, TextDelta

class Backend:
    def __init__(self, name, config):
        self.file = Path(config.options["file"])
        self.calls = Path(config.options["calls"])

    def login_fingerprint(self):
        return self.file.read_text()

    async def complete(self, call):
        with self.calls.open("a") as out:
            out.write("x")
        if self.file.read_text() == "old":
            raise BackendError("the login has expired", code="auth_expired")
        yield TextDelta("welcome")
        yield Finished("stop")

    async def aclose(self):
        return
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory for plug-ins, on this process's path; hand it to workers as PYTHONPATH."""
    path = tmp_path / "site"
    path.mkdir()
    monkeypatch.syspath_prepend(str(path))
    return path


async def test_a_job_of_a_family_runs_only_on_its_workers(write_config) -> None:
    path, settings = write_config(STEADY + FAMILY_OF_ITS_OWN)
    async with AsyncProducer(settings) as producer:
        with worker_process(path) as plain:
            await plain.ready(settings.store_url)
            waiting = await producer.submit("hello", model="apart")
            assert (await (await producer.submit("hi", model="plain")).result(PATIENCE_S)).text == "hi"
            assert "apart" not in (await producer.ready()).families
            assert (await producer.get(waiting.id)).state == "queued"
            with worker_process(path, "own", "apart") as own:
                await own.ready(settings.store_url)
                assert (await waiting.result(PATIENCE_S)).text == "hello"

                async def served() -> bool:
                    return (await producer.ready()).families.get("apart") == 1

                await wait_until(served, "its family is served")


async def test_a_job_whose_producer_did_not_know_the_family_is_handed_on(write_config) -> None:
    path, settings = write_config(STEADY + FAMILY_OF_ITS_OWN)
    # No models: all that this producer knows is a name.
    async with AsyncProducer(settings.model_copy(update={"models": {}})) as producer:
        with worker_process(path) as plain, worker_process(path, "own", "apart") as own:
            await plain.ready(settings.store_url)
            own_id = await own.ready(settings.store_url)
            job = await producer.submit("hello", model="apart")
            async with asyncio.timeout(PATIENCE_S), aclosing(producer.events(job.id)) as events:
                phases = [e.message or e.phase async for e in events if isinstance(e, Progress)]
            assert phases == ["queued", "started", "handed to the apart workers", "started"]
            done = await job.result(PATIENCE_S)
            assert (done.text, done.attempt) == ("hello", 1)
            store = await Store.connect(settings.store_url)
            try:
                assert own_id in {b.worker for b in (await read_beats(store))[0] if b.family == "apart"}
            finally:
                await store.aclose()


async def test_two_workers_that_disagree_about_a_family_do_not_pass_a_job_to_and_fro(write_config, tmp_path) -> None:
    path, settings = write_config(STEADY + FAMILY_OF_ITS_OWN)
    other = tmp_path / "other.toml"
    # This one believes that `apart` belongs to the API workers; another model makes it serve the family.
    text = path.read_text().replace('[models.apart]\ntype = "echo"\nfamily = "apart"', '[models.apart]\ntype = "echo"')
    other.write_text(text + '\n[models.third]\ntype = "echo"\nfamily = "apart"\n')
    async with AsyncProducer(settings.model_copy(update={"models": {}})) as producer:
        with worker_process(path) as plain, worker_process(other, "own", "apart") as own:
            await plain.ready(settings.store_url)
            await own.ready(settings.store_url)
            job = await producer.submit("hello", model="apart")
            assert (await job.result(PATIENCE_S)).text == "hello"


async def test_a_worker_whose_event_loop_stands_still_is_ended_and_its_job_runs_elsewhere(
    write_config, tmp_path: Path, site: Path
) -> None:
    install_plugin(site, "blocker", BLOCKS_ONCE)
    mark = tmp_path / "mark"
    path, settings = write_config(
        QUICK + f'loop_stall_s = 5\n[models.b]\ntype = "blocker"\noptions = {{ mark = "{mark}" }}\n'
    )
    env = {"PYTHONPATH": str(site)}
    async with AsyncProducer(settings) as producer:
        with worker_process(path, "one", env=env) as one:
            await one.ready(settings.store_url)
            job = await producer.submit("hello", model="b")
            await wait_until(mark.exists, "the first worker blocks")
            with worker_process(path, "two", env=env):
                done = await job.result(PATIENCE_S)
            assert done.text == "after the block"
            assert [a.outcome for a in done.attempts] == ["crashed", "succeeded"]
            assert one.process.wait(PATIENCE_S) == 1
            assert "Timeout" in one.log.read_text()


async def test_a_worker_whose_event_loop_stands_still_swallows_no_message(
    write_config, tmp_path: Path, site: Path
) -> None:
    install_plugin(site, "swallower", BLOCKS_ONCE)
    mark = tmp_path / "mark"
    path, settings = write_config(
        QUICK + f'[models.s]\ntype = "swallower"\noptions = {{ mark = "{mark}" }}\n[models.e]\ntype = "echo"\n'
    )
    env = {"PYTHONPATH": str(site)}
    async with AsyncProducer(settings) as producer:
        with worker_process(path, "one", env=env) as one:
            await one.ready(settings.store_url)
            await producer.submit("hello", model="s")
            await wait_until(mark.exists, "the first worker blocks")
            jobs = [await producer.submit(str(n), model="e") for n in range(20)]  # all of them come to it alone
            await wait_until(lambda: "no message is taken" in one.log.read_text(), "it leaves the queues")
            store = await producer.store()

            async def all_wait() -> bool:
                return await store.redis.llen(queue_for("interactive", API_FAMILY)) == len(jobs)

            # Nobody else watches yet: what is not there was swallowed, and only a sweep would find it.
            await wait_until(all_wait, "every message waits for another worker")
            with worker_process(path, "two", env=env) as two:
                await two.ready(settings.store_url)
                assert [(await job.result(PATIENCE_S)).text for job in jobs] == [str(n) for n in range(20)]
            one.process.kill()


async def test_a_worker_whose_event_loop_turns_again_takes_messages_again(
    write_config, tmp_path: Path, site: Path
) -> None:
    install_plugin(site, "swallower", BLOCKS_ONCE.replace("sleep(60)", "sleep(4)"))
    mark = tmp_path / "mark"
    path, settings = write_config(
        f'[models.s]\ntype = "swallower"\noptions = {{ mark = "{mark}" }}\n[models.e]\ntype = "echo"\n'
    )
    async with AsyncProducer(settings) as producer:
        with worker_process(path, "one", env={"PYTHONPATH": str(site)}) as one:
            await one.ready(settings.store_url)
            blocking = await producer.submit("hello", model="s")
            await wait_until(mark.exists, "the worker blocks")
            await wait_until(lambda: "no message is taken" in one.log.read_text(), "it takes no more")
            late = await producer.submit("late", model="e")
            assert (await late.result(PATIENCE_S)).text == "late"
            assert (await blocking.result(PATIENCE_S)).text == "after the block"
            await wait_until(lambda: "turns again" in one.log.read_text(), "it says so")


async def test_an_expired_login_pauses_its_model_until_it_is_renewed_and_operators_hear_of_it(
    write_config, tmp_path: Path, site: Path
) -> None:
    install_plugin(site, "claudelike", LOGIN)
    file, calls = tmp_path / "login", tmp_path / "calls"
    file.write_text("old")
    options = f'options = {{ file = "{file}", calls = "{calls}" }}'
    path, settings = write_config(QUICK + f'[models.c]\ntype = "claudelike"\n{options}\n')
    redis = Redis.from_url(settings.store_url)
    async with redis, redis.pubsub() as pubsub, AsyncProducer(settings) as producer:
        await pubsub.subscribe(keys.OPERATORS)

        async def heard() -> dict[str, str]:
            async with asyncio.timeout(PATIENCE_S):
                async for message in pubsub.listen():
                    if message["type"] == "message":
                        return json.loads(message["data"])
            raise AssertionError("the channel ended")

        with worker_process(path, env={"PYTHONPATH": str(site)}) as worker:
            await worker.ready(settings.store_url)
            for _ in range(3):
                with pytest.raises(JobFailed) as failed:
                    await (await producer.submit("hello", model="c")).result(PATIENCE_S)
                assert failed.value.code == "auth_expired"
            assert calls.read_text() == "x", "only the first job may ask a model whose login has expired"
            event = await heard()
            assert (event["event"], event["model"], event["backend"]) == ("claudelike_auth_expired", "c", "claudelike")

            async def paused() -> bool:
                return (await producer.ready()).paused == ["c"]

            await wait_until(paused, "readiness shows the pause")
            file.write_text("new")
            assert (await (await producer.submit("hello", model="c")).result(PATIENCE_S)).text == "welcome"
            assert (await heard())["event"] == "claudelike_auth_renewed"

            async def resumed() -> bool:
                return (await producer.ready()).paused == []

            await wait_until(resumed, "readiness shows that the pause is over")
