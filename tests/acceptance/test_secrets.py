"""Keys and prompts are planted, jobs of every kind run, and everything that others could look at is searched for them.

One run, with the real programs where they are installed and scripted ones elsewhere: first the jobs are submitted while
no worker runs, so that their messages can be read; then workers of every family run them while the process list is
watched; then Flower, the store and the logs are read.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import redis

from promptmill.up.embedded import free_port
from promptmill_workers.programs.environment import jobs_root
from tests.support.otlp import Received, receiving_spans
from tests.support.processes import PATIENCE_S, block_until, wait_gone
from tests.support.programs import installed, real_program, script
from tests.support.simulator import SimulatorHandle, running_simulator
from tests.support.up import Up, environment
from tests.support.worker import WorkerProcess, worker_process

pytestmark = [pytest.mark.xdist_group("secrets"), pytest.mark.timeout(300)]

SLOW = "sim:tokens=60,rate=6"
"""Long enough for a look at all processes while it runs, on a machine that stands still for seconds meanwhile."""
HELD = "held"
"""A model that answers for hours: Flower can ask for its job as often as it takes; then the job is cancelled."""
FAMILIES = ("api", "claude", "gemini", "isolated")
END_STATES = {"succeeded", "failed", "cancelled", "expired"}
JOBS_S = 120.0
FAKE_CLAUDE = """
import json, sys, time
sys.stdin.readline()  # one message; it is not told that there are no more
def say(value):
    print(json.dumps(value), flush=True)
say({"type": "system", "subtype": "init"})
for word in ["three ", "slow ", "words"]:
    time.sleep(3)
    delta = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}}
    say({"type": "stream_event", "event": delta})
say({"type": "result", "subtype": "success", "is_error": False, "result": "three slow words", "stop_reason": "end_turn",
     "usage": {"input_tokens": 1, "output_tokens": 3}, "total_cost_usd": 0.1})
"""
FAKE_GEMINI = """
import json, sys, time
sys.stdin.read()
def say(value):
    print(json.dumps(value), flush=True)
say({"type": "init"})
for word in ["three ", "slow ", "words"]:
    time.sleep(3)
    say({"type": "message", "role": "assistant", "content": word, "delta": True})
say({"type": "result", "status": "success", "stats": {"input_tokens": 1, "output_tokens": 3}})
"""


@dataclass
class Planted:
    """What must not be seen. Letters and digits only: no encoding on the way changes them."""

    prompt: str
    system: str
    keys: dict[str, str]
    """By the variable that holds it; KEY_FILE stands in a file."""

    @classmethod
    def new(cls) -> Planted:
        def mark(what: str) -> str:
            return f"planted{what}{secrets.token_hex(12)}"

        names = ("ANTHROPIC", "LOCAL", "HEADER", "GEMINI", "CLAUDE", "GEMINICLI", "APART", "FILE", "USER", "SIGNING")
        return cls(mark("Prompt"), mark("System"), {f"PLANTED_{name}": mark(name.title()) for name in names})

    @property
    def variables(self) -> dict[str, str]:
        """What the processes are started with."""
        given = {k: v for k, v in self.keys.items() if k not in {"PLANTED_FILE", "PLANTED_SIGNING"}}
        return given | {"PROMPTMILL_SIGNING_KEY": self.keys["PLANTED_SIGNING"]}

    def found(self, where: str, *, prompts: bool = True) -> list[str]:
        """The names of what stands in a text."""
        words = {**self.keys, **({"prompt": self.prompt, "system prompt": self.system} if prompts else {})}
        return [name for name, word in words.items() if word in where]


@dataclass
class Seen:
    """All that was collected."""

    planted: Planted
    processes: set[str] = field(default_factory=set)
    """Command lines, by `ps` and by /proc."""
    environments: dict[str, str] = field(default_factory=dict)
    """Of the processes that run a backend, by command line."""
    logs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    """All that the store was told while the jobs lived, scripts' own commands included."""
    stored: dict[str, str] = field(default_factory=dict)
    flower: dict[str, str] = field(default_factory=dict)
    figures: dict[str, str] = field(default_factory=dict)
    """What Prometheus is told, by process."""
    spans: list[Received] = field(default_factory=list)
    traces: str = ""
    """All spans as they were sent."""
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    headers: list[str] = field(default_factory=list)
    """Of the requests that reached the provider."""
    store_password: str = ""


def configuration(planted: Planted, url: str, programs: dict[str, str], key_file: Path) -> str:
    refused = f"sim:fault=401,message=Incorrect%20API%20key%20provided%3A%20{planted.keys['PLANTED_LOCAL']}"
    common = {
        "anthropic": f'type = "anthropic_api"\nmodel_name = "{SLOW}"\napi_url = "{url}"\n',
        "local": f'type = "local_openai"\nmodel_name = "{SLOW}"\napi_url = "{url}/v1"\n',
        "gemini-api": f'type = "gemini_api"\nmodel_name = "{SLOW}"\napi_url = "{url}/v1beta/openai"\n',
    }
    apart = 'isolation = "process"\n'
    header = 'options = { headers_env = { "x-planted" = "PLANTED_HEADER" } }\n'
    models = {
        "anthropic": common["anthropic"] + 'api_key_env = "PLANTED_ANTHROPIC"\n',
        "anthropic-apart": common["anthropic"] + 'api_key_env = "PLANTED_APART"\n' + apart,
        HELD: 'type = "echo"\noptions = { text = "on ", repeat = 9999, tokens_per_s = 1 }\n',
        "local": common["local"] + 'api_key_env = "PLANTED_LOCAL"\n' + header,
        "local-file": common["local"] + f'api_key_file = "{key_file}"\n',
        "local-apart": common["local"] + 'api_key_env = "PLANTED_LOCAL"\n' + header + apart,
        "local-refused": common["local"].replace(SLOW, refused) + 'api_key_env = "PLANTED_LOCAL"\n',
        "apart-refused": common["local"].replace(SLOW, refused) + 'api_key_env = "PLANTED_LOCAL"\n' + apart,
        "gemini-api": common["gemini-api"] + 'api_key_env = "PLANTED_GEMINI"\n',
        "gemini-apart": common["gemini-api"] + 'api_key_env = "PLANTED_GEMINI"\n' + apart,
        "claude": f'type = "claude_cli"\nmodel_name = "{SLOW}"\napi_url = "{url}"\napi_key_env = "PLANTED_CLAUDE"\n'
        f'options = {{ program = "{programs["claude"]}" }}\n',
        "gemini": f'type = "gemini_cli"\nmodel_name = "{SLOW}"\napi_url = "{url}"\napi_key_env = "PLANTED_GEMINICLI"\n'
        f'options = {{ program = "{programs["gemini"]}" }}\n',
    }
    head = 'log_level = "debug"\n[api_keys.somebody]\nkey_env = "PLANTED_USER"\n'
    return head + "".join(f"[models.{name}]\n{text}" for name, text in models.items())


def argument_lists() -> set[str]:
    """The command lines of all processes, as /proc shows them."""
    found: set[str] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            found.add("\0".join(process.cmdline()))
    return found


@contextmanager
def watching_processes(seen: Seen, programs: dict[str, str]) -> Generator[None]:
    """Look at all processes again and again."""
    stop = threading.Event()
    failed: list[BaseException] = []

    def interesting(line: str) -> bool:
        return "promptmill_workers.child" in line or any(path in line for path in programs.values())

    def look() -> None:
        while not stop.wait(0.05):
            seen.processes |= argument_lists()
            done = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, check=True, text=True)
            seen.processes |= set(done.stdout.splitlines())
            for process in psutil.process_iter():
                with contextlib.suppress(psutil.Error, OSError):
                    line = " ".join(process.cmdline())
                    if interesting(line):
                        path = Path(f"/proc/{process.pid}/environ")
                        seen.environments[line] = seen.environments.get(line, "") + path.read_text(errors="replace")

    def run() -> None:
        try:
            look()
        except BaseException as err:  # noqa: BLE001 - shown by who waits for the thread
            failed.append(err)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert failed == []


@contextmanager
def watching_commands(seen: Seen, url: str) -> Generator[None]:
    """Every command that the store gets, as MONITOR tells it; the store itself leaves out passwords."""
    with redis.Redis.from_url(url) as client:
        arguments = client.connection_pool.connection_kwargs
        client.config_set("client-output-buffer-limit", "normal 0 0 0")
    with socket.create_connection((arguments["host"], arguments["port"])) as link:
        login = f"AUTH {arguments.get('username') or 'default'} {arguments['password']}\r\n"
        link.sendall(f"{login}MONITOR\r\n".encode())
        heard = bytearray()

        def listen() -> None:
            while chunk := link.recv(1 << 16):
                heard.extend(chunk)

        thread = threading.Thread(target=listen)
        thread.start()
        try:
            yield
        finally:
            link.shutdown(socket.SHUT_RDWR)
            thread.join()
    lines = heard.decode(errors="replace").split("\r\n")
    assert lines[:2] == ["+OK", "+OK"]
    seen.commands += lines[2:]


@contextmanager
def running_flower(url: str, home: Path, log: Path) -> Generator[str]:
    """A Flower at the broker; answers its address. It asks the workers to send events, as it does by default."""
    port = free_port()
    command = [sys.executable, "-m", "celery", "flower", "--address=127.0.0.1", f"--port={port}"]
    command += ["--inspect_timeout=5000"]  # ms, for what the workers answer
    variables = {"CELERY_BROKER_URL": url, "FLOWER_UNAUTHENTICATED_API": "true"}
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=home, env=environment(home, **variables), stdout=out, stderr=out)
        try:
            block_until(lambda: get(f"http://127.0.0.1:{port}/healthcheck") is not None, "Flower answers")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()
            wait_gone([process.pid])


def get(url: str, **headers: str) -> httpx.Response | None:
    try:
        return httpx.get(url, headers=headers, timeout=PATIENCE_S, trust_env=False)
    except httpx.TransportError:
        return None


def dump(client: redis.Redis) -> dict[str, str]:
    """Every key with its value, whatever its type."""
    readers: dict[bytes, Callable[[bytes], Any]] = {
        b"string": client.get,
        b"hash": client.hgetall,
        b"list": lambda key: client.lrange(key, 0, -1),
        b"set": client.smembers,
        b"zset": lambda key: client.zrange(key, 0, -1, withscores=True),
        b"stream": client.xrange,
    }
    found: dict[str, str] = {}
    for key in client.scan_iter(count=1000):
        kind = client.type(key)
        if kind != b"none":  # it expired meanwhile
            found[key.decode()] = repr(readers[kind](key))
    return found


def submit_all(seen: Seen, up: Up, models: list[str]) -> None:
    for number, model in enumerate(models):
        answer = httpx.post(
            f"{up.about['url']}/v1/jobs",
            json={
                "prompt": f"Say {seen.planted.prompt} to nobody.",
                "system": f"You keep {seen.planted.system} to yourself.",
                "model": model,
                "priority": "batch" if number % 2 else "interactive",
            },
            headers={"authorization": f"Bearer {seen.planted.keys['PLANTED_USER']}"},
            timeout=PATIENCE_S,
            trust_env=False,
        )
        assert answer.status_code in {200, 201, 202}, answer.text
        seen.jobs[model] = answer.json()


def wait_ended(seen: Seen, up: Up) -> None:
    key = f"Bearer {seen.planted.keys['PLANTED_USER']}"
    for model, job in seen.jobs.items():

        def ended(job_id: str = job["id"]) -> dict[str, Any]:
            answer = get(f"{up.about['url']}/v1/jobs/{job_id}", authorization=key)
            found = answer.json() if answer is not None else {}
            return found if found.get("state") in END_STATES else {}

        seen.jobs[model] = block_until(ended, f"the job of {model} ends", JOBS_S)


def workers_in_flower(url: str) -> list[str]:
    """Those of which it knows all that it asked for: a worker that answers too late is left out of that answer."""
    answer = httpx.get(f"{url}/api/workers?refresh=1", timeout=PATIENCE_S, trust_env=False)
    found: dict[str, Any] = answer.json() if answer.status_code == 200 else {}
    return [name for name, told in found.items() if {"stats", "active_queues", "conf"} <= told.keys()]


def wait_running_in_flower(seen: Seen, url: str) -> None:
    """Until Flower shows the held job as one that runs: what it shows of it is what is to be searched."""

    def its_worker() -> str | None:
        return next((name for name in workers_in_flower(url) if name.startswith("api-worker@")), None)

    def running() -> bool:
        # Only who is asked for by name tells of its tasks.
        page = f"/api/workers?refresh=1&workername={name}"
        answer = httpx.get(url + page, timeout=PATIENCE_S, trust_env=False)
        if answer.status_code != 200:
            return False
        seen.flower[f"{page} while jobs run"] = answer.text
        return seen.jobs[HELD]["id"] in json.dumps(answer.json().get(name, {}).get("active", []))

    name = block_until(its_worker, "Flower knows the worker of the held job")
    block_until(running, "Flower shows a running job")


def let_go(seen: Seen, up: Up) -> None:
    """Cancel the held job."""
    path = f"/v1/jobs/{seen.jobs[HELD]['id']}/cancel"
    key = f"Bearer {seen.planted.keys['PLANTED_USER']}"
    answer = httpx.post(up.about["url"] + path, headers={"authorization": key}, timeout=PATIENCE_S, trust_env=False)
    assert answer.status_code == 200, answer.text


def read_flower(seen: Seen, url: str) -> None:
    pages = ["/api/workers?refresh=1", "/api/tasks?limit=1000", "/api/task/types", "/metrics", "/workers", "/tasks"]
    block_until(lambda: len(workers_in_flower(url)) == len(FAMILIES), "Flower knows all workers")
    tasks = httpx.get(f"{url}/api/tasks?limit=1000", timeout=PATIENCE_S, trust_env=False).json()
    pages += [f"/worker/{name}" for name in workers_in_flower(url)] + [f"/api/task/info/{task}" for task in tasks]
    for page in pages:
        answer = get(url + page)
        assert answer is not None
        assert answer.status_code == 200, page
        seen.flower[page] = answer.text


def programs_in(home: Path) -> dict[str, str]:
    """The real ones; scripted ones where those are not installed, but not in CI."""
    if os.environ.get("CI") or all(map(installed, ("claude", "gemini"))):
        return {name: real_program(name) for name in ("claude", "gemini")}
    return {
        "claude": script(home, FAKE_CLAUDE, "scripted-claude"),
        "gemini": script(home, FAKE_GEMINI, "scripted-gemini"),
    }


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """All of it. The jobs' own process, this one, has no secret in its environment or arguments."""
    home = tmp_path_factory.mktemp("secrets")
    programs = programs_in(home)
    planted = Planted.new()
    key_file = home / "key"
    key_file.write_text(planted.keys["PLANTED_FILE"])
    collected = Seen(planted)
    with ExitStack() as stack:
        simulator = stack.enter_context(running_simulator())
        config = home / "promptmill.toml"
        config.write_text(configuration(planted, simulator.url, programs, key_file))
        run(collected, stack, home, config, programs)
        collected.headers = [json.dumps(record.headers) for record in requests_of(simulator)]
    return collected


def requests_of(simulator: SimulatorHandle) -> list[Any]:
    return simulator.requests


def read_figures(seen: Seen, ports: dict[str, int]) -> None:
    for name, port in ports.items():
        # A job is counted behind its end, and the gateway looks at the deployment every few seconds.
        wanted = "promptmill_fleet_workers" if name == "gateway" else 'promptmill_jobs_total{backend="'

        def told(name: str = name, port: int = port, wanted: str = wanted) -> bool:
            answer = get(f"http://127.0.0.1:{port}/metrics")
            assert answer is not None
            assert answer.status_code == 200
            seen.figures[name] = answer.text
            return wanted in answer.text

        block_until(told, f"{name} tells {wanted}")


def run(seen: Seen, stack: ExitStack, home: Path, config: Path, programs: dict[str, str]) -> None:
    receiver = stack.enter_context(receiving_spans())
    ports = {name: free_port() for name in ("gateway", *FAMILIES)}
    told = {"PROMPTMILL_OTLP_ENDPOINT": receiver.url, "OTEL_BSP_SCHEDULE_DELAY": "200"}
    variables = {**seen.planted.variables, **told, "PROMPTMILL_METRICS_PORT": str(ports["gateway"])}
    up = Up(home, ("--workers", "0", "--config", str(config)), variables=variables)
    stack.callback(up.close)
    up.wait_ready()
    url = up.about["redis_url"]
    client = stack.enter_context(redis.Redis.from_url(url))
    seen.store_password = client.connection_pool.connection_kwargs["password"]
    models = re.findall(r"^\[models\.(.+)\]$", config.read_text(), re.MULTILINE)
    flower = stack.enter_context(running_flower(url, home, home / "flower.log"))
    with watching_commands(seen, url), watching_processes(seen, programs):
        submit_all(seen, up, models)
        for key in set(client.scan_iter()):  # a scan may show a key twice
            if client.type(key) == b"list":
                seen.messages += [message.decode() for message in client.lrange(key, 0, -1)]
        with ExitStack() as workers:
            variables = {**environment(home, **seen.planted.variables), **told, "PROMPTMILL_REDIS_URL": url}
            running: list[WorkerProcess] = []
            for number, family in enumerate(FAMILIES):
                own = {
                    "PROMPTMILL_METRICS_PORT": str(ports[family]),
                    "PROMPTMILL_LOG_FORMAT": "json" if number % 2 else "text",
                }
                worker = worker_process(config, f"{family}-worker", family, {**variables, **own})
                running.append(workers.enter_context(worker))
            wait_running_in_flower(seen, flower)
            let_go(seen, up)
            wait_ended(seen, up)
            read_flower(seen, flower)
            read_figures(seen, ports)
            seen.stored = dump(client)
        for worker in running:
            seen.logs[worker.name] = worker.log.read_text()
    assert up.stop() == 0
    seen.logs["up, gateway and store"] = up.err
    seen.spans = receiver.spans
    seen.traces = "".join(body.decode("utf-8", "replace") for body in receiver.raw)
    seen.logs["flower"] = (home / "flower.log").read_text()


def test_the_jobs_did_run_with_the_planted_keys(seen: Seen) -> None:
    states = {model: job["state"] for model, job in seen.jobs.items()}
    expected = {model: "failed" if model.endswith("refused") else "succeeded" for model in states}
    assert states == expected | {HELD: "cancelled"}, seen.jobs
    codes = {job["error"]["code"] for model, job in seen.jobs.items() if model.endswith("refused")}
    assert codes == {"auth"}
    arrived = " ".join(seen.headers)
    sent = {"ANTHROPIC", "LOCAL", "HEADER", "GEMINI", "APART", "FILE"}
    if "scripted-claude" not in " ".join(seen.processes):
        sent |= {"CLAUDE", "GEMINICLI"}
    assert {f"PLANTED_{name}" for name in sent} <= set(seen.planted.found(arrived, prompts=False))


def test_the_process_list_shows_no_prompt_and_no_key(seen: Seen) -> None:
    lines = "\n".join(seen.processes)
    # What was to be looked at was there to be looked at.
    for program in ("claude", "gemini", "promptmill_workers.child", "promptmill_gateway", "--family"):
        assert program in lines, program
    leaks = {line[:60]: found for line in seen.processes if (found := seen.planted.found(line))}
    assert leaks == {}
    assert seen.store_password not in lines


def test_the_environment_of_what_runs_a_backend_shows_no_prompt_and_no_key(seen: Seen) -> None:
    assert any("promptmill_workers.child" in line for line in seen.environments)
    assert any("claude" in line for line in seen.environments)
    assert any("gemini" in line for line in seen.environments)
    leaks = {line[:200]: found for line, text in seen.environments.items() if (found := seen.planted.found(text))}
    assert leaks == {}


def test_no_log_shows_a_prompt_or_a_key(seen: Seen) -> None:
    assert "DEBUG" in seen.logs["api-worker"]
    assert len(seen.logs) == len(FAMILIES) + 2
    assert all(seen.logs.values())
    leaks = {name: found for name, text in seen.logs.items() if (found := seen.planted.found(text))}
    assert leaks == {}
    assert [name for name, text in seen.logs.items() if seen.store_password in text] == []


def test_figures_show_no_prompt_and_no_key(seen: Seen) -> None:
    assert all('promptmill_jobs_total{backend="' in seen.figures[family] for family in FAMILIES)
    assert "promptmill_fleet_workers" in seen.figures["gateway"]
    leaks = {name: found for name, text in seen.figures.items() if (found := seen.planted.found(text))}
    assert leaks == {}
    ids = [job["id"] for job in seen.jobs.values()]
    assert [name for name, text in seen.figures.items() if any(job_id in text for job_id in ids)] == []


def test_traces_show_every_job_and_no_prompt_and_no_key(seen: Seen) -> None:
    runs = {span.attributes["promptmill.job.id"] for span in seen.spans if span.name == "promptmill.run"}
    assert runs == {job["id"] for job in seen.jobs.values()}
    assert {span.service for span in seen.spans} == {"promptmill-gateway", "promptmill-worker"}
    assert seen.planted.found(seen.traces) == []
    assert seen.store_password not in seen.traces


def test_messages_in_the_broker_hold_the_jobs_id_and_nothing_else(seen: Seen) -> None:
    assert len(seen.messages) == len(seen.jobs)
    waiting = {job["id"] for job in seen.jobs.values()}
    for message in seen.messages:
        outer = json.loads(message)
        args, kwargs, _ = json.loads(base64.b64decode(outer["body"]))
        assert (len(args), kwargs) == (1, {})
        waiting.remove(args[0])
        assert seen.planted.found(message + json.dumps(args)) == []


def test_flower_shows_no_prompt_and_no_key(seen: Seen) -> None:
    workers = json.loads(seen.flower["/api/workers?refresh=1"])
    assert len(workers) == len(FAMILIES)
    assert all("stats" in worker for worker in workers.values())
    assert any("active_queues" in text and "conf" in text for text in seen.flower.values())
    leaks = {page: found for page, text in seen.flower.items() if (found := seen.planted.found(text))}
    assert leaks == {}
    assert [page for page, text in seen.flower.items() if seen.store_password in text] == []


def test_the_store_holds_no_key_and_prompts_only_in_their_jobs_own_record(seen: Seen) -> None:
    own = {f"pm:{{{job['id']}}}:{part}" for job in seen.jobs.values() for part in ("job", "events")}
    assert own & set(seen.stored)
    with_prompt = {key for key, value in seen.stored.items() if seen.planted.prompt in value}
    assert with_prompt
    assert with_prompt <= own
    leaks = {
        key: found
        for key, value in seen.stored.items()
        if (found := seen.planted.found(key + value, prompts=key not in own))
    }
    assert leaks == {}


def test_the_store_was_never_told_a_key_nor_a_prompt_but_for_its_jobs_own_record(seen: Seen) -> None:
    assert len(seen.commands) > 100
    assert [found for line in seen.commands if (found := seen.planted.found(line, prompts=False))] == []
    told = [line for line in seen.commands if seen.planted.prompt in line or seen.planted.system in line]
    assert told
    for line in told:
        owner = [job["id"] for job in seen.jobs.values() if f'"pm:{{{job["id"]}}}:job"' in line]
        assert len(owner) == 1, line[:300]


def test_nothing_of_the_run_is_left_in_the_temporary_directory(seen: Seen) -> None:
    """Programs get their keys and system prompts in files of the job, which end with it."""
    marks = [word.encode() for word in (*seen.planted.keys.values(), seen.planted.prompt, seen.planted.system)]
    left: list[str] = []
    # os.walk passes over what vanishes meanwhile: jobs of other tests.
    for directory, _, names in os.walk(jobs_root()):
        for path in (Path(directory, name) for name in names):
            with contextlib.suppress(OSError):
                data = path.read_bytes() if path.is_file() else b""
                left += [str(path)] if any(mark in data for mark in marks) else []
    assert left == []
