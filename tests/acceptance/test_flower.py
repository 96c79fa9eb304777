"""The real Flower, started by `promptmill flower`, at a real broker with a real worker: what it shows and to whom.

For every kind of end that a job can have it is read what Flower shows of it; then all of its pages are searched for the
prompts, answers and secrets that were planted.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import subprocess
import sys
import threading
from base64 import b64encode
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from promptmill import AsyncProducer
from promptmill.enqueue import make_app
from promptmill.errors import PromptmillError
from promptmill.settings import Settings, load_settings
from tests.support.processes import PATIENCE_S, alive, block_until, wait_gone
from tests.support.rabbit import running_rabbit
from tests.support.store import running_store
from tests.support.streams import wait_for_tokens
from tests.support.up import PROMPTMILL, environment, promptmill
from tests.support.worker import WorkerProcess, worker_process

REDIS = pytest.param("redis", marks=pytest.mark.xdist_group("flower-redis"))
AMQP = pytest.param("amqp", marks=pytest.mark.xdist_group("flower-amqp"))
pytestmark = pytest.mark.timeout(300)

CONFIG = """
redis_url = "{store}"
broker_url = "{broker}"
heartbeat_s = 0.5
dead_after_s = 5.0
concurrency = 1
{more}
flower_user = "ann"
flower_password = "{password}"
[models.quick]
type = "echo"
options = {{ text = "{answer}" }}
[models.slow]
type = "echo"
options = {{ tokens_per_s = 20, repeat = 10000 }}
[models.broken]
type = "echo"
options = {{ fault = "refused" }}
[models.nobody]
type = "local_openai"
api_url = "http://127.0.0.1:9/v1"
model_name = "x"
api_key_env = "PLANTED_KEY"
family = "unserved"
[roles.chat]
primary = "quick"
"""


@dataclass
class Shown:
    """A deployment after jobs of every kind, and what Flower showed of it."""

    url: str
    login: tuple[str, str]
    settings: Settings
    home: Path
    flower: subprocess.Popen[bytes]
    worker: WorkerProcess
    worker_id: str = ""
    jobs: dict[str, str] = field(default_factory=dict)
    """Ids by what became of them."""
    tasks: dict[str, Any] = field(default_factory=dict)
    waiting: dict[str, int] = field(default_factory=dict)
    """Lengths of the queues while jobs waited."""
    pages: dict[str, str] = field(default_factory=dict)
    planted: dict[str, str] = field(default_factory=dict)

    def get(self, page: str, *, login: bool = True, **headers: str) -> httpx.Response:
        auth = self.login if login else None
        answer = httpx.get(self.url + page, auth=auth, headers=headers, timeout=PATIENCE_S, trust_env=False)
        if login:
            self.pages[page] = answer.text
        return answer

    def post(self, page: str) -> httpx.Response:
        return httpx.post(self.url + page, auth=self.login, timeout=PATIENCE_S, trust_env=False)


@contextmanager
def flower_process(home: Path, **variables: str) -> Generator[tuple[subprocess.Popen[bytes], str]]:
    """`promptmill flower` with the configuration in ``home``; answers its address."""
    log = home / "flower.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*PROMPTMILL, "flower", "--port", "0"], cwd=home, env=environment(home, **variables), stdout=out, stderr=out
        )
    try:

        def listens() -> re.Match[str] | None:
            assert process.poll() is None, log.read_text()
            return re.search(r"^Flower listens on (http://\S+)$", log.read_text(), re.MULTILINE)

        found = block_until(listens, "Flower listens")
        yield process, found[1]
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        wait_gone([process.pid])


@contextmanager
def management(password: str) -> Generator[str]:
    """What RabbitMQ's management interface says of its queues; answers its host and port."""
    queues = [{"name": "promptmill.api", "messages": 2}, {"name": "of.others", "messages": 9}]
    wanted = "Basic " + b64encode(f"guest:{password}".encode()).decode()

    class Management(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.headers["authorization"] == wanted and self.path.startswith("/api/queues/")
            self.send_response(200 if known else 401)
            self.end_headers()
            self.wfile.write(json.dumps(queues if known else []).encode())

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Management) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module", params=[REDIS, AMQP])
def shown(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generator[Shown]:
    home = tmp_path_factory.mktemp("flower")
    names = ("prompt", "system", "answer", "password", "key", "management")
    planted = {name: f"planted{name}{secrets.token_hex(8)}" for name in names}
    with ExitStack() as stack:
        store = stack.enter_context(running_store(home, append_only=False))
        broker, more = store.url, ""
        if request.param == "amqp":
            broker = stack.enter_context(running_rabbit(home)).url
            address = stack.enter_context(management(planted["management"]))
            more = f'flower_broker_api = "http://guest:{planted["management"]}@{address}/api/"'
        config = home / "promptmill.toml"
        config.write_text(CONFIG.format(store=store.url, broker=broker, more=more, **planted))
        settings = load_settings(config)
        worker = stack.enter_context(worker_process(config, "flowered", env={"PLANTED_KEY": planted["key"]}))
        worker_id = asyncio.run(worker.ready(store.url))
        process, url = stack.enter_context(flower_process(home, PLANTED_KEY=planted["key"]))
        made = Shown(url, ("ann", planted["password"]), settings, home, process, worker, worker_id, planted=planted)
        block_until(lambda: worker_id in online(made), "Flower sees the worker")
        asyncio.run(run_jobs(made))
        yield made


def online(shown: Shown) -> list[str]:
    rows = shown.get("/workers?json=1").json()["data"]
    return [row["hostname"] for row in rows if row["status"]]


async def run_jobs(shown: Shown) -> None:
    prompt = f"say {shown.planted['prompt']}"

    async with AsyncProducer(shown.settings) as producer:

        async def submitted(what: str, **request: Any) -> Any:
            job = await producer.submit(prompt, system=shown.planted["system"], **request)
            shown.jobs[what] = job.id
            return job

        for what, request in {"succeeded": {"role": "chat"}, "failed": {"model": "broken"}}.items():
            job = await submitted(what, **request)
            with suppress(PromptmillError):
                await job.result(PATIENCE_S)
        # The only slot is taken from here on: what comes behind it waits.
        running = await submitted("cancelled", model="slow")
        await wait_for_tokens(producer, running.id, 2)
        queued = await submitted("cancelled while it waited", model="quick")
        await queued.cancel()
        late = await submitted("expired", model="quick", timeouts={"queue_s": 0.2})
        with suppress(PromptmillError):
            await late.result(PATIENCE_S)
        await submitted("unserved", model="nobody")
        lengths = await asyncio.to_thread(lambda: shown.get("/api/queues/length"))
        shown.waiting = {row["name"]: row["messages"] for row in lengths.json()["active_queues"]}
        assert "active" in await asyncio.to_thread(lambda: told_active(shown, running.id))
        await running.cancel()

    ended = {"succeeded": "SUCCESS", "failed": "FAILURE"}

    def all_shown() -> bool:
        shown.tasks = shown.get("/api/tasks?limit=100").json()
        wanted = {job_id: ended.get(what, "REVOKED") for what, job_id in shown.jobs.items() if what != "unserved"}
        return {job_id: shown.tasks.get(job_id, {}).get("state") for job_id in wanted} == wanted

    try:
        await asyncio.to_thread(block_until, all_shown, "Flower shows how each job ended")
    except AssertionError as err:
        raise AssertionError(f"{err}: {shown.jobs} {shown.tasks}") from None


def told_active(shown: Shown, job_id: str) -> str:
    """What Flower says of the worker, once the job is among those that run."""
    page = f"/api/workers?refresh=1&workername={shown.worker_id}"
    block_until(lambda: job_id in shown.get(page).text, "the running job is shown")
    return shown.pages[page]


def test_each_end_is_shown_as_what_it_is(shown: Shown) -> None:
    task = {what: shown.tasks[job_id] for what, job_id in shown.jobs.items() if what != "unserved"}
    for what, told in task.items():
        assert told["name"] == "promptmill.complete"
        assert told["worker"] == shown.worker_id
        assert told["args"] == f"('{shown.jobs[what]}',)"
    done = task["succeeded"]
    assert (done["result"], done["exception"]) == ("quick", None)
    assert "'role': 'chat'" in done["kwargs"]
    assert done["routing_key"] == "promptmill.api"
    assert done["sent"] <= done["received"] <= done["started"] <= done["succeeded"]
    assert done["runtime"] >= 0
    failed = task["failed"]
    assert (failed["exception"], failed["result"], failed["traceback"]) == ("refused", None, None)
    assert "'model': 'broken'" in failed["kwargs"]
    assert task["cancelled"]["started"] <= task["cancelled"]["revoked"]
    assert task["cancelled while it waited"]["started"] is None
    info = {what: shown.get(f"/api/task/info/{shown.jobs[what]}").json() for what in ("cancelled", "expired")}
    assert info["cancelled"]["state"] == info["expired"]["state"] == "REVOKED"


def test_workers_are_named_and_known_to_be_there(shown: Shown) -> None:
    assert shown.worker_id.startswith("flowered@")
    assert online(shown) == [shown.worker_id]

    def told() -> dict[str, Any] | None:
        (worker,) = shown.get("/api/workers?refresh=1").json().values()
        # What the worker answers too late is not in it.
        return worker if {"active_queues", "stats", "registered"} <= worker.keys() else None

    worker = block_until(told, "the worker answers all questions")
    assert [queue["name"] for queue in worker["active_queues"]] == ["promptmill.api", "promptmill.api.batch"]
    assert worker["stats"]["pool"]["max-concurrency"] == 1
    assert worker["registered"] == ["promptmill.complete"]


def test_the_lengths_of_all_queues_are_shown(shown: Shown) -> None:
    if shown.settings.queue_url.startswith("amqp"):
        assert shown.waiting == {"promptmill.api": 2}
        return
    assert shown.waiting == {
        "promptmill.api": 2,
        "promptmill.api.batch": 0,
        "promptmill.unserved": 1,
        "promptmill.unserved.batch": 0,
    }


def test_without_the_login_nothing_is_shown(shown: Shown) -> None:
    pages = ("/", "/workers", "/tasks", "/broker", "/metrics", "/api/workers", "/api/tasks", "/api/queues/length")
    assert {page: shown.get(page, login=False).status_code for page in pages} == dict.fromkeys(pages, 401)
    wrong = httpx.get(shown.url + "/api/tasks", auth=("ann", "no"), timeout=PATIENCE_S, trust_env=False)
    assert wrong.status_code == 401
    assert {page: shown.get(page).status_code for page in pages} == dict.fromkeys(pages, 200)


def test_no_page_shows_a_prompt_an_answer_or_a_secret(shown: Shown) -> None:
    pages = ["/workers", "/tasks", "/broker", "/metrics", "/api/task/types", f"/worker/{shown.worker_id}"]
    pages += [f"/task/{job_id}" for what, job_id in shown.jobs.items() if what != "unserved"]
    pages += ["/tasks/datatable?draw=1&start=0&length=100&search[value]=&order[0][column]=0&order[0][dir]=asc"]
    for page in pages:
        assert shown.get(page).status_code in {200, 400}, page
    assert shown.jobs["failed"] in shown.pages[f"/task/{shown.jobs['failed']}"]
    leaks = {page: [name for name, word in shown.planted.items() if word in text] for page, text in shown.pages.items()}
    assert {page: found for page, found in leaks.items() if found} == {}
    assert len(leaks) > 12
    log = (shown.home / "flower.log").read_text()
    assert [name for name, word in shown.planted.items() if word in log] == []


def test_flower_cannot_command(shown: Shown) -> None:
    job_id = shown.jobs["succeeded"]
    for page in (
        f"/api/worker/shutdown/{shown.worker_id}",
        f"/api/worker/pool/grow/{shown.worker_id}?n=3",
        f"/api/worker/queue/cancel-consumer/{shown.worker_id}?queue=promptmill.api",
        f"/api/task/revoke/{job_id}?terminate=true",
        "/api/task/send-task/promptmill.complete",
        "/api/task/async-apply/promptmill.complete",
        "/api/task/rate-limit/promptmill.complete",
    ):
        assert shown.post(page).status_code == 403, page


def answer_to(shown: Shown, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """What the worker answers to a command of Celery's remote control."""

    def asked() -> list[dict[str, Any]]:
        # Each time anew: on Redis kombu may lose the answer to its earlier question's connection.
        app = make_app(shown.settings.queue_url)
        app.conf.update(control_queue_exclusive=False, control_queue_durable=True)
        try:
            return app.control.broadcast(command, arguments=arguments, reply=True, timeout=3, limit=1)
        finally:
            app.close()

    return block_until(asked, f"the worker answers to {command}")[0][shown.worker_id]


def test_a_worker_refuses_commands_whoever_sends_them(shown: Shown) -> None:
    commands: dict[str, dict[str, Any]] = {
        "shutdown": {},
        "pool_grow": {"n": 3},
        "pool_restart": {},
        "cancel_consumer": {"queue": "promptmill.api"},
        "revoke": {"task_id": shown.jobs["succeeded"], "terminate": True},
        "rate_limit": {"task_name": "promptmill.complete", "rate_limit": "1/h"},
    }
    for name, arguments in commands.items():
        assert "promptmill job cancel" in answer_to(shown, name, arguments)["error"], name
    assert answer_to(shown, "ping", {}) == {"ok": "pong"}

    async def runs() -> None:
        async with AsyncProducer(shown.settings) as producer:
            job = await producer.submit("still there", model="quick")
            assert (await job.result(PATIENCE_S)).text == shown.planted["answer"]

    asyncio.run(runs())
    assert alive(shown.worker.pid)


def test_a_worker_that_ends_is_shown_as_gone_and_flower_ends_in_order(shown: Shown) -> None:
    assert shown.worker.stop() == 0
    block_until(lambda: online(shown) == [], "Flower shows that the worker is gone")
    shown.flower.terminate()
    assert shown.flower.wait(PATIENCE_S) == 0
    assert "Traceback" not in (shown.home / "flower.log").read_text()


@pytest.mark.parametrize(
    ("config", "arguments", "said"),
    [
        ("", ("--host", "0.0.0.0"), "without a login; set flower_user and flower_password"),
        ('flower_user = "ann"', (), "flower_password: a login needs both"),
        ('flower_password = "x"', (), "flower_user: a login needs both"),
        ('flower_user = "a:b"\nflower_password = "x"', (), "must not contain a colon"),
    ],
)
def test_who_could_look_without_a_login_is_limited_to_this_machine(
    tmp_path: Path, config: str, arguments: tuple[str, ...], said: str
) -> None:
    (tmp_path / "promptmill.toml").write_text(config)
    done = promptmill("flower", "--port", "0", *arguments, home=tmp_path)
    assert done.returncode == 6
    assert said in done.stderr


def test_without_a_login_only_this_machines_own_names_are_answered(tmp_path: Path, redis_url: str) -> None:
    (tmp_path / "promptmill.toml").write_text(f'redis_url = "{redis_url}"\n')

    def status(page: str, host: str) -> int:
        return httpx.get(url + page, headers={"host": host}, timeout=PATIENCE_S, trust_env=False).status_code

    with flower_process(tmp_path) as (process, url):
        assert status("/workers", "localhost:5555") == 200
        assert status("/workers", "127.0.0.1") == 200
        assert {status(page, "rebound.example") for page in ("/workers", "/api/tasks", "/metrics")} == {403}
        # Flower's own rule: its API only with a login.
        assert status("/api/tasks", "127.0.0.1") == 401
        process.terminate()
        assert process.wait(PATIENCE_S) == 0


def test_without_its_extra_the_command_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import importlib.util as u, sys\n"
        "real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'flower' else real(name, *a)\n"
        "from promptmill.cli import main\n"
        "sys.argv = ['promptmill', 'flower']\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 6
    assert done.stderr == 'error [missing_extra]: flower not installed: pip install "promptmill[flower]"\n'
