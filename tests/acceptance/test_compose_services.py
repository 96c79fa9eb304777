"""Every service of compose.yaml that can be had here, started as a process: its own command, its own environment, its
own secrets and configuration, waited for by its own health check, and stopped as compose would.

Grafana cannot be had; its provisioning is looked at in tests/unit/test_compose_monitoring.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Generator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from tests.support.compose import Place, Running, alertmanager_program, can_confine, ours, running
from tests.support.event_source import EventSourceParser
from tests.support.kubernetes import build, of_kind
from tests.support.processes import PATIENCE_S, alive, block_until, tree
from tests.support.programs import script
from tests.support.rabbit import RabbitServer, rabbit_missing

pytestmark = [pytest.mark.xdist_group("compose"), pytest.mark.timeout(400)]

PROGRAMS = {"PROMPTMILL_TOML": "./ops/promptmill.programs.toml"}
RABBITMQ = {
    "PROMPTMILL_BROKER_URL": "amqp://promptmill@rabbitmq:5672//",
    "PROMPTMILL_BROKER_PASSWORD_FILE": "/run/secrets/rabbitmq_password",
}
"""What compose.yaml says that .env is to hold for its profile."""

STANDS_FOR_CLAUDE = """
import json, sys
sys.stdin.readline()
def say(value):
    print(json.dumps(value), flush=True)
say({"type": "system", "subtype": "init"})
delta = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "from a program"}}
say({"type": "stream_event", "event": delta})
say({"type": "result", "subtype": "success", "is_error": False, "result": "from a program", "stop_reason": "end_turn",
     "usage": {"input_tokens": 1, "output_tokens": 3}, "total_cost_usd": 0.1})
"""


class Stack:
    """The services that run, in the order in which they were started."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.services: dict[str, Running] = {}

    def url(self, service: str, port: int) -> str:
        return f"http://127.0.0.1:{self.place.port(service, port)}"

    def client(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.place.secret('api_key')}"}
        return httpx.Client(headers=headers, timeout=60, trust_env=False)


def get(url: str, **options: Any) -> httpx.Response:
    """One request, with the patience of a test on a busy machine."""
    return httpx.get(url, timeout=PATIENCE_S, trust_env=False, **options)


def shown(pid: int, *names: str) -> bytes:
    """Files of a process in /proc; nothing where it has ended, as programs of jobs and forks of the store do."""
    try:
        return b"".join(Path(f"/proc/{pid}/{name}").read_bytes() for name in names)
    except OSError:
        assert not alive(pid)
        return b""


def missing(name: str) -> str | None:
    """Why a service cannot be started here."""
    if name == "redis" and not shutil.which("valkey-cli") and not shutil.which("redis-cli"):
        return "the health check of the store needs valkey-cli or redis-cli: apt-get install redis-tools"
    if name == "prometheus" and (not shutil.which("prometheus") or not shutil.which("promtool")):
        return "prometheus is not installed: apt-get install prometheus"
    if name == "alertmanager" and (alertmanager_program() is None or not shutil.which("wget")):
        return "alertmanager or wget is not installed: apt-get install prometheus-alertmanager wget"
    return None


def skip_without(name: str) -> None:
    """Skip the test where a service cannot be started; in CI that is a failure."""
    if reason := missing(name):
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Generator[Stack]:
    """All services but the broker and Grafana, healthy."""
    skip_without("redis")
    place = Place(tmp_path_factory.mktemp("compose"), PROGRAMS)
    for name in ("anthropic_api_key", "gemini_api_key"):  # as `touch` leaves them: without a key there is still echo
        (place.directory / "secrets" / name).write_text("")
    script(place.programs("worker-claude"), STANDS_FOR_CLAUDE, "claude")
    found = Stack(place)
    with ExitStack() as exits:
        # As depends_on has it: the store first, then the others together.
        found.services["redis"] = exits.enter_context(running(place, "redis"))
        found.services["redis"].wait_healthy()
        for name in [*ours(place.file), "prometheus", "alertmanager"]:
            if missing(name) is None:
                found.services[name] = exits.enter_context(running(place, name))
        for service in found.services.values():
            service.wait_healthy()
        yield found


def test_every_service_of_ours_is_healthy_by_its_own_check(stack: Stack) -> None:
    assert set(ours(stack.place.file)) <= set(stack.services)
    for name in stack.services:
        done = stack.place.healthy(name)
        assert done.returncode == 0, f"{name}: {done.stderr}"


def test_prometheus_runs_with_the_configuration_of_the_stack(stack: Stack) -> None:
    skip_without("prometheus")
    prometheus = f"{stack.url('prometheus', 9090)}/api/v1"

    def scraped() -> set[str]:
        return {target["labels"]["job"] for target in get(f"{prometheus}/targets").json()["data"]["activeTargets"]}

    # It takes over what it is to scrape five seconds after it is ready.
    block_until(lambda: scraped() >= {"prometheus", "alertmanager"}, "both are scraped")
    groups = get(f"{prometheus}/rules").json()["data"]["groups"]
    assert {rule["type"] for group in groups for rule in group["rules"]} == {"recording", "alerting"}


def test_prometheus_passes_its_alerts_to_the_alertmanager_of_the_stack(stack: Stack) -> None:
    skip_without("prometheus")
    skip_without("alertmanager")
    known = f"{stack.url('prometheus', 9090)}/api/v1/alertmanagers"
    # As with what it scrapes, it knows of it a while after it is ready.
    told = block_until(lambda: get(known).json()["data"]["activeAlertmanagers"], "it knows an Alertmanager")
    about = get(f"{stack.url('alertmanager', 9093)}/api/v2/status").json()
    assert [target["url"] for target in told] == [f"{stack.url('alertmanager', 9093)}/api/v2/alerts"]
    for receiver in ("page", "ticket"):
        assert f"- name: {receiver}\n" in about["config"]["original"]


def test_a_job_goes_through_gateway_worker_and_relay(stack: Stack) -> None:
    with stack.client() as client:
        made = client.post(f"{stack.url('gateway', 8080)}/v1/jobs", json={"prompt": "one two", "model": "echo"})
        assert made.status_code == 202, made.text
        stream = f"{stack.url('relay', 8081)}/v1/jobs/{made.json()['id']}/stream"
        assert get(stream).status_code == 401
        with client.stream("GET", stream) as response:
            reader = EventSourceParser()
            events = [message for chunk in response.iter_bytes() for message in reader.feed(chunk)]
    assert events[-1].type == "done"
    assert "".join(json.loads(event.data)["text"] for event in events if event.type == "token") == "one two"


def test_a_job_of_a_program_runs_in_the_worker_of_its_family(stack: Stack) -> None:
    with stack.client() as client:
        made = client.post(f"{stack.url('gateway', 8080)}/v1/jobs", json={"prompt": "x", "model": "claude"})
        job = f"{stack.url('gateway', 8080)}/v1/jobs/{made.json()['id']}"
        done = block_until(lambda: ended(client.get(job).json()), "the job ended")
    assert (done["state"], done["text"]) == ("succeeded", "from a program"), done["error"]


def test_every_service_of_ours_serves_its_figures_those_that_scaling_asks_for_too(stack: Stack) -> None:
    asked = json.dumps([about["spec"]["triggers"] for about in of_kind(build(), "ScaledObject").values()])
    wanted = set(re.findall(r"promptmill_\w+", asked))
    assert len(wanted) == 3

    def told() -> bool:
        names = set(ours(stack.place.file)) - {"flower"}
        found = [get(f"{stack.url(name, 9464)}/metrics").text for name in names]
        assert all("promptmill_" in text for text in found)
        return wanted <= set(re.findall(r"^(promptmill_\w+)", "\n".join(found), re.MULTILINE))

    # The gateway looks at the deployment every few seconds.
    block_until(told, f"{wanted} are told")


def test_flower_shows_itself_to_who_has_the_login_alone(stack: Stack) -> None:
    url = f"{stack.url('flower', 5555)}/workers"
    assert get(url).status_code == 401
    login = ("admin", stack.place.secret("flower_password"))
    assert get(url, auth=login).status_code == 200


def test_no_secret_stands_in_the_environment_or_the_arguments_of_a_process(stack: Stack) -> None:
    secrets = [s for s in (stack.place.secret(name).encode() for name in stack.place.file["secrets"]) if s]
    assert len(secrets) > 4
    looked_at = 0
    for service in stack.services.values():
        for pid in tree(service.process.pid):
            seen = shown(pid, "environ", "cmdline")
            assert not [secret for secret in secrets if secret in seen], f"{service.name}: {seen!r}"
            looked_at += bool(seen)
    assert looked_at >= len(stack.services)


def test_services_run_without_rights_and_write_to_nothing_but_tmp_and_their_volumes(stack: Stack) -> None:
    if not can_confine():
        pytest.skip("only root may make a read-only file system in a mount namespace")
    for service in stack.services.values():
        for pid in tree(service.process.pid):
            status, mounts = shown(pid, "status").decode(), shown(pid, "mounts").decode()
            if not (status and mounts):
                continue
            assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE), service.name
            assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE), service.name
            root = next(line for line in mounts.splitlines() if line.split()[1] == "/")
            assert "ro" in root.split()[3].split(","), service.name


def test_the_store_is_set_up_as_the_file_says_and_takes_nobody_without_the_password(stack: Stack) -> None:
    port = stack.place.port("redis", 6379)
    with redis.Redis(port=port, password=stack.place.secret("redis_password")) as client:
        held = client.config_get("appendonly", "maxmemory-policy", "maxmemory")
    assert held == {"appendonly": "yes", "maxmemory-policy": "noeviction", "maxmemory": str(1200 * 2**20)}
    with redis.Redis(port=port) as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()
    assert (stack.place.directory / "redis" / "tmp" / "redis.conf").stat().st_mode & 0o077 == 0


def test_doctor_finds_what_is_configured_working(stack: Stack) -> None:
    done = subprocess.run(
        [*stack.place.command("worker")[:-1], "doctor", "--json"],
        env=stack.place.environment("worker"),
        cwd=stack.place.directory,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert '"redis"' in done.stdout, done.stderr
    assert "Traceback" not in done.stderr


def test_with_the_profile_rabbitmq_jobs_go_through_it(tmp_path: Path) -> None:
    skip_without("redis")
    if reason := rabbit_missing():
        pytest.skip(reason)
    place = Place(tmp_path, RABBITMQ)
    data = tmp_path / "data"
    data.mkdir()
    broker = RabbitServer(
        data,
        port=place.port("rabbitmq", 5672),
        command=place.command("rabbitmq"),
        variables={**place.environment("rabbitmq"), "HOME": str(data)},
    )
    found = Stack(place)
    with ExitStack() as exits:
        exits.callback(broker.kill)
        broker.start()
        checked = place.healthy("rabbitmq", broker.environment)
        assert checked.returncode == 0, checked.stderr
        for name in ("redis", "worker", "gateway"):
            found.services[name] = exits.enter_context(running(place, name))
            found.services[name].wait_healthy()
        with found.client() as client:
            made = client.post(f"{found.url('gateway', 8080)}/v1/jobs", json={"prompt": "over AMQP", "model": "echo"})
            job = f"{found.url('gateway', 8080)}/v1/jobs/{made.json()['id']}"
            done = block_until(lambda: ended(client.get(job).json()), "the job ended")
        assert (done["state"], done["text"]) == ("succeeded", "over AMQP")
        # Nothing went through the store instead.
        url = f"redis://:{place.secret('redis_password')}@127.0.0.1:{place.port('redis', 6379)}/0"
        with redis.Redis.from_url(url) as client:
            assert not client.exists("_kombu.binding.promptmill.api")
        for name in ("gateway", "worker", "redis"):
            assert found.services[name].stop() == 0, found.services[name].said()
        broker.stop()


def ended(job: dict[str, Any]) -> dict[str, Any] | None:
    """The job, where it has ended."""
    return job if job["state"] in {"succeeded", "failed", "cancelled", "expired"} else None


# The last tests of this file: the services of the stack end here.


def test_a_worker_that_drains_is_not_healthy_and_its_neighbours_are(stack: Stack) -> None:
    assert stack.services["worker-claude"].stop() == 0, stack.services["worker-claude"].said()
    done = stack.place.healthy("worker-claude")
    assert done.returncode == 1
    assert "can claim claude jobs: no heartbeat" in done.stderr
    assert stack.place.healthy("worker").returncode == 0


def test_each_ends_well_on_its_stop_signal_within_the_time_that_compose_gives_it(stack: Stack) -> None:
    for name, service in reversed(stack.services.items()):
        if service.process.poll() is None:
            assert service.stop() == 0, f"{name}: {service.said()}"
        service.kill()
    with pytest.raises(httpx.ConnectError):
        get(f"{stack.url('gateway', 8080)}/healthz")
