"""Lines of real processes, as JSON and for people: the job's id on each that is about one, nothing of its content."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from promptmill import AsyncProducer, JobFailed
from promptmill.settings import load_settings
from tests.support.gateway import gateway_process
from tests.support.plugin import install_plugin
from tests.support.processes import wait_until
from tests.support.streams import follow_sse, wait_for_tokens
from tests.support.worker import QUICK, worker_process

MODELS = """
[models.endless]
type = "echo"
options = { text = "on ", repeat = 9999, tokens_per_s = 20 }
"""
CRASH = '[models.crash]\ntype = "crashing"\n'
PLUGIN = """
class Backend:
    def __init__(self, name, model):
        self.name = name

    async def complete(self, call):
        if call.request:
            raise RuntimeError("crashes in the middle")
        yield None

    async def check(self):
        return None

    async def aclose(self):
        return None
"""
PROMPT = "plantedInPrompt"


def lines_of(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


async def test_json_lines_name_their_process_and_their_job(redis_url: str, tmp_path: Path) -> None:
    path = tmp_path / "promptmill.toml"
    path.write_text(f'redis_url = "{redis_url}"\nlog_format = "json"\nlog_level = "debug"\n{QUICK}{MODELS}')
    with worker_process(path, "talker", env={"PROMPTMILL_PLANTED": PROMPT}) as worker:
        await worker.ready(redis_url)
        async with AsyncProducer(load_settings(path)) as producer:
            job = await producer.submit(PROMPT, model="endless")
            await wait_for_tokens(producer, job.id, 2)
            await job.cancel()
            # As text: the last line may have been written in part.
            stopped = f"job {job.id} stopped here"
            await wait_until(lambda: stopped in worker.log.read_text(), "the worker says that it stopped the job")
        assert worker.stop() == 0
    lines = lines_of(worker.log)
    assert {line["process"] for line in lines} == {"talker"}
    assert all({"event", "level", "logger", "at"} <= line.keys() for line in lines)
    about = [line for line in lines if job.id in line["event"] and not line["logger"].startswith(("celery", "kombu"))]
    assert about
    assert {line.get("job_id") for line in about} == {job.id}
    assert PROMPT not in worker.log.read_text()


async def test_a_backend_that_crashes_shows_where_and_not_what(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A traceback is for operators; the values in its frames are somebody's prompt."""
    path = tmp_path / "promptmill.toml"
    site = install_plugin(tmp_path / "site", "crashing", PLUGIN)
    monkeypatch.syspath_prepend(site)
    for log_format in ("json", "text"):
        path.write_text(f'redis_url = "{redis_url}"\nlog_format = "{log_format}"\n{CRASH}')
        with worker_process(path, log_format, env={"PYTHONPATH": str(site)}) as worker:
            await worker.ready(redis_url)
            async with AsyncProducer(load_settings(path)) as producer:
                job = await producer.submit(PROMPT, model="crash")
                with pytest.raises(JobFailed):
                    await job.result()
            assert worker.stop() == 0
        said = worker.log.read_text()
        assert "Traceback (most recent call last)" in said
        assert "crashes in the middle" in said
        assert PROMPT not in said
        if log_format == "json":
            (crash,) = [line for line in lines_of(worker.log) if "exception" in line]
            assert crash["job_id"] == job.id
            assert crash["level"] == "error"
        else:
            (crash_line,) = [line for line in said.splitlines() if "crashed" in line]
            assert " ERROR promptmill_workers.course: " in crash_line
            assert crash_line.endswith(f"[job {job.id}]")


async def test_a_gateway_names_the_job_of_a_reader_that_it_sends_away(redis_url: str, tmp_path: Path) -> None:
    path = tmp_path / "promptmill.toml"
    path.write_text(f'redis_url = "{redis_url}"\n{MODELS}')
    environment = {"PROMPTMILL_LOG_FORMAT": "json", "PROMPTMILL_CONFIG": str(path)}
    async with gateway_process(redis_url, **environment) as (process, port):
        async with AsyncProducer(load_settings(path)) as producer:
            job = await producer.submit("x", model="echo")
            await job.cancel()
            await follow_sse(port, job.id)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        said = (await process.stderr.read()).decode()
        assert await process.wait() == 0
    lines = [json.loads(line) for line in said.splitlines()]
    assert {line["process"] for line in lines} == {"gateway"}
    assert any(line["event"].startswith("stopping") for line in lines)
