"""A backend in a process of its own: whatever it does to that process, the worker goes on and nothing is left."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from promptmill import AsyncProducer, JobFailed
from promptmill.errors import BackendError, ConfigError
from promptmill.settings import ModelConfig
from promptmill_workers import isolated
from promptmill_workers.backends import gemini_api
from promptmill_workers.backends.base import Backend, Finished, StartedAnew, TextDelta, UsageUpdate
from promptmill_workers.isolated import USUAL_KEYS, make_backend
from promptmill_workers.programs import ProgramLimits, prepare
from promptmill_workers.testing import call, collect, failure, text_of
from tests.support.plugin import install_plugin
from tests.support.processes import PATIENCE_S, alive, tree, wait_until
from tests.support.simulator import Simulator
from tests.support.worker import worker_process

UNRULY = """
import asyncio, json, os, subprocess, sys, threading, time
from promptmill.contract import Usage
from promptmill.errors import BackendError
from promptmill_workers.backends.base import Finished, StartedAnew, TextDelta, UsageUpdate

print("printed at import")

class Unruly:
    def __init__(self, name, config):
        self.config, self.do = config, config.options["do"]

    async def complete(self, call):
        yield TextDelta("begun ")
        do, given = self.do, self.config.options
        if do == "wait":
            try:
                await asyncio.Event().wait()
            finally:
                with open(given["mark"], "w") as mark:
                    mark.write("closed")
        if do == "block":
            while True:
                time.sleep(1000)
        if do == "deaf":
            import signal
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            while True:
                time.sleep(1000)
        if do == "print":
            print("printed")
            sys.__stdout__.write('{"type":"text","text":"printed"}\\n')
            sys.__stdout__.flush()
            os.write(1, b'{"type":"finished","reason":"forged"}\\n')
            subprocess.run(["echo", "echoed"], check=True)
            os.system("echo echoed")
        if do == "exit":
            os._exit(3)
        if do == "abort":
            os.abort()
        if do == "raise":
            raise ValueError(f"of the {os.environ[given['key_env']]}")
        if do == "trail off":
            return
        if do == "refuse":
            more = {"retry_after_s": 7, "field": "f", "limit": 9, "provider_request_id": "r"}
            raise BackendError("later", code="rate_limited", **more)
        if do == "thread":
            threading.Thread(target=time.sleep, args=(1000,)).start()
        if do == "leak":
            for wrapped in (["sleep"], ["setsid", "sleep"], ["nohup", "sleep"]):
                subprocess.Popen([*wrapped, given["sleep"]], stdin=subprocess.DEVNULL)
            shell = f"(setsid sleep {given['sleep']} &) ; (trap '' TERM; sleep {given['sleep']}) &"
            subprocess.run(shell, shell=True, check=True)
        if do == "tell":
            with open("/proc/self/environ") as first:
                initial = first.read()
            told = {"argv": sys.argv, "env": dict(os.environ), "initial": initial, "cwd": os.listdir(),
                    "options": given, "file": str(self.config.api_key_file), "stdin": sys.stdin.read()}
            yield TextDelta(json.dumps(told))
        yield StartedAnew("once more")
        yield TextDelta("ended")
        yield UsageUpdate(Usage(output_tokens=2), 0.25)
        yield Finished("stop", "request-7")

    async def aclose(self):
        pass
"""
SLEEP = str(1_000_000 + os.getpid())
"""How long a leaked program sleeps: by this number it is found."""


@pytest.fixture(autouse=True)
async def unruly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Path]:
    """The directory where the plug-in is installed, on the path; afterwards no process of ours runs."""
    site = install_plugin(tmp_path / "site", "unruly", UNRULY, "Unruly")
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, "unruly_plugin", raising=False)
    await prepare()  # the warden stays as long as this process
    before = tree(os.getpid())
    yield site
    await wait_until(lambda: tree(os.getpid()) <= before and not sleepers(), "no process of ours runs")


@asynccontextmanager
async def doing(do: str, **options: Any) -> AsyncIterator[Backend]:
    backend = make_backend("model", ModelConfig(type="unruly", isolation="process", options={"do": do, **options}))
    try:
        yield backend
    finally:
        await backend.aclose()


def sleepers() -> list[int]:
    return [p.pid for p in psutil.process_iter(["cmdline"]) if SLEEP in (p.info["cmdline"] or [])]


def children() -> list[int]:
    """The processes below this one that run a backend, without their guards."""
    found: list[int] = []
    for pid in tree(os.getpid()):
        try:
            if psutil.Process(pid).cmdline() == list(isolated._COMMAND):
                found.append(pid)
        except psutil.NoSuchProcess:
            continue
    return found


async def ended(backend: Backend) -> tuple[str, BackendError]:
    items, error = await failure(backend, call())
    return text_of(items), error


async def test_every_kind_of_item_comes_through() -> None:
    async with doing("answer") as backend:
        items = await collect(backend, call())
    assert items[:3] == [TextDelta("begun "), StartedAnew("once more"), TextDelta("ended")]
    assert isinstance(items[3], UsageUpdate)
    assert (items[3].usage.output_tokens, items[3].cost_usd) == (2, 0.25)
    assert items[4:] == [Finished("stop", "request-7")]


async def test_an_error_comes_through_with_every_field() -> None:
    async with doing("refuse") as backend:
        text, error = await ended(backend)
    assert text == "begun "
    wanted = BackendError("later", code="rate_limited", retry_after_s=7, field="f", limit=9)
    assert (error.to_dict(), error.provider_request_id) == (wanted.to_dict(), "r")


async def test_what_it_prints_does_not_garble_the_answer() -> None:
    async with doing("print") as backend:
        items = await collect(backend, call())
    assert text_of(items) == "begun ended"
    assert items[-1] == Finished("stop", "request-7")


@pytest.mark.parametrize(("do", "how"), [("exit", "with status 3"), ("abort", f"by signal {signal.SIGABRT}")])
async def test_one_that_ends_in_mid_answer_has_crashed(do: str, how: str) -> None:
    async with doing(do) as backend:
        text, error = await ended(backend)
    assert (text, error.code) == ("begun ", "crashed")
    assert how in str(error)


async def test_one_that_is_killed_in_mid_answer_has_crashed(tmp_path: Path) -> None:
    async with doing("block") as backend, aclosing(backend.complete(call())) as items:
        assert await anext(items) == TextDelta("begun ")
        (child,) = children()
        os.kill(child, signal.SIGKILL)
        with pytest.raises(BackendError) as caught:
            await anext(items)
    assert caught.value.code == "crashed"
    assert f"by signal {signal.SIGKILL}" in str(caught.value)


async def test_one_that_raises_has_crashed_and_its_trace_is_logged_without_the_secret(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("UNRULY_KEY", "planted-key")
    with caplog.at_level(logging.ERROR):
        async with doing("raise", key_env="UNRULY_KEY") as backend:
            text, error = await ended(backend)
    assert (text, error.code, str(error)) == ("begun ", "crashed", "the backend crashed: ValueError")
    assert "ValueError: of the ***" in caplog.text
    assert "planted-key" not in caplog.text


async def test_one_that_trails_off_was_cut() -> None:
    async with doing("trail off") as backend:
        text, error = await ended(backend)
    assert (text, error.code) == ("begun ", "cut")


async def test_a_garbled_line_is_malformed(monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        'print(\'{"type":"text","text":"one"}\'); print("half a", flush=True); input(); import time; time.sleep(99)'
    )
    monkeypatch.setattr(isolated, "_COMMAND", (sys.executable, "-c", script))
    async with doing("answer") as backend:
        text, error = await ended(backend)
    assert (text, error.code) == ("one", "malformed")


async def test_closing_the_call_closes_the_backend_before_its_process_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The grace of half a second is not enough on a busy machine.
    monkeypatch.setattr(isolated, "ProgramLimits", partial(ProgramLimits, grace_s=PATIENCE_S))
    mark = tmp_path / "mark"
    async with doing("wait", mark=str(mark)) as backend, aclosing(backend.complete(call())) as items:
        await anext(items)
        assert not mark.exists()
        async with asyncio.timeout(PATIENCE_S):
            await items.aclose()
        assert mark.read_text() == "closed"


@pytest.mark.parametrize("do", ["block", "deaf"])
async def test_one_that_does_not_listen_is_ended(do: str) -> None:
    async with doing(do) as backend, aclosing(backend.complete(call())) as items:
        await anext(items)
        (child,) = children()
        async with asyncio.timeout(PATIENCE_S):
            await items.aclose()
        assert not alive(child)


async def test_a_thread_that_it_left_behind_holds_nobody_up() -> None:
    async with doing("thread") as backend:
        async with asyncio.timeout(PATIENCE_S):
            assert text_of(await collect(backend, call())) == "begun ended"


async def test_what_it_leaks_ends_with_the_call() -> None:
    async with doing("leak", sleep=SLEEP) as backend:
        items = await collect(backend, call())
    assert isinstance(items[-1], Finished)
    assert sleepers() == []


async def told(backend: Backend) -> dict[str, Any]:
    items = await collect(backend, call("planted prompt"))
    return json.loads(text_of(items).removeprefix("begun ").removesuffix("ended"))


async def test_it_gets_the_secrets_that_its_configuration_names_and_no_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("UNRULY_KEY", "planted-key")
    monkeypatch.setenv("UNRULY_HEADER", "planted-header")
    monkeypatch.setenv("UNRULY_OTHER", "planted-other")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    options = {"headers_env": {"x-a": "UNRULY_HEADER"}, "more_env": ["UNRULY_KEY", "UNSET"], "cert_file": "~/c", "n": 1}
    async with doing("tell", **options) as backend:
        seen = await told(backend)
        monkeypatch.setenv("UNRULY_KEY", "rotated-key")
        again = await told(backend)
    assert (seen["env"]["UNRULY_KEY"], seen["env"]["UNRULY_HEADER"]) == ("planted-key", "planted-header")
    assert again["env"]["UNRULY_KEY"] == "rotated-key"
    assert {"UNRULY_OTHER", "UNSET"}.isdisjoint(seen["env"])
    assert "planted" not in seen["initial"] + " ".join(seen["argv"])
    assert (seen["cwd"], seen["stdin"]) == ([], "")
    assert seen["env"]["HOME"] != str(tmp_path)
    assert seen["options"] == {"do": "tell", **options, "cert_file": str(tmp_path / "c")}


async def test_a_key_file_is_found_from_the_private_directories(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "key").write_text("planted-key\n")
    async with Simulator(key="planted-key") as sim:
        for path in ("~/key", "key"):
            config = ModelConfig(
                type="local_openai",
                model_name="m",
                api_url=f"{sim.url}/v1",
                api_key_file=Path(path),
                isolation="process",
            )
            backend = make_backend("model", config)
            assert isinstance((await collect(backend, call()))[-1], Finished)
            await backend.aclose()


async def test_a_missing_key_is_told_as_without_isolation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNSET_KEY", raising=False)
    fields: dict[str, Any] = {
        "type": "local_openai", "model_name": "m", "api_url": "http://127.0.0.1:9", "api_key_env": "UNSET_KEY",
    }  # fmt: skip
    said: list[tuple[str, str]] = []
    for isolation in ("none", "process"):
        backend = make_backend("model", ModelConfig(isolation=isolation, **fields))
        _, error = await ended(backend)
        said.append((error.code, str(error)))
        await backend.aclose()
    assert said[0] == said[1]
    assert said[0][0] == "auth"


def test_the_providers_usual_variables_are_those_of_the_backends() -> None:
    pytest.importorskip("anthropic")
    from promptmill_workers.backends import anthropic_api

    for kind, module in (("anthropic_api", anthropic_api), ("gemini_api", gemini_api)):
        url, variable = USUAL_KEYS[kind]
        assert module.DEFAULT_URL.startswith(url)
        assert variable == module.DEFAULT_KEY_ENV


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"type": "claude_cli"}, "models.m.isolation"),
        ({"type": "gemini_cli", "model_name": "x"}, "models.m.isolation"),
        ({"type": "echo", "options": {"txt": "x"}}, "models.m.options.txt"),
        ({"type": "unruly", "options": {"do": "x", "when": [{"at": object()}]}}, "models.m.options.when.0.at"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_at_once(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_backend("m", ModelConfig(isolation="process", **fields))
    assert caught.value.field == field
    assert str(caught.value).startswith(field)


async def test_a_worker_whose_backend_blocks_its_loop_ends_the_job_in_time_and_serves_others(
    write_config, unruly: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, settings = write_config("""
[models.blocking]
type = "unruly"
isolation = "process"
options = { do = "block" }
timeouts = { idle_s = 8 }
[models.apart]
type = "echo"
isolation = "process"
""")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(unruly), os.environ.get("PYTHONPATH")])))
    with worker_process(path, family="isolated") as worker:
        async with AsyncProducer(settings) as producer:
            await worker.ready(settings.store_url)
            first = await producer.submit("hello", model="apart")
            assert (await first.result(PATIENCE_S)).text == "hello"
            alone = tree(worker.pid)  # the worker and its warden
            job = await producer.submit("x", model="blocking")
            events = job.events()
            async with aclosing(events):
                async for event in events:
                    if event.type == "token":
                        break
            assert len(tree(worker.pid)) > len(alone)
            other = await producer.submit("hello", model="apart")
            assert (await other.result(PATIENCE_S)).text == "hello"
            with pytest.raises(JobFailed) as caught:
                await job.result(PATIENCE_S)
            assert caught.value.code == "timeout_idle"
            await wait_until(lambda: tree(worker.pid) <= alone, "the backend's process is gone")
            assert worker.process.poll() is None
