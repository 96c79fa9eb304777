"""compose.yaml by itself: valid by the specification, its variables are settings, nothing open that need not be.

What its services do when they run is in tests/acceptance/test_compose_services.py.
"""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml

from promptmill.cli.app import app
from promptmill.settings import Settings, load_settings
from promptmill.settings.secrets import SECRETS
from promptmill.up.embedded import free_port
from promptmill_relay.server import HARD_S
from tests.support.compose import FILE, environment_of, load, ours, seconds
from tests.support.docs import ROOT
from tests.support.store import running_store
from tests.support.up import ENDED_S, environment
from tests.support.worker import worker_process

CAN_CLAIM = ROOT / "ops" / "images" / "can_claim.py"
TEXT = FILE.read_text()
COMPOSE = load()
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = ours(COMPOSE)
WORKERS = [name for name in OURS if name.startswith("worker")]
NOT_SETTINGS = {"CONFIG", "TOML"}
"""PROMPTMILL_ names that are no setting: where the file is, for `load_settings` and for compose."""
HAND_BACK_S = 20
RABBITMQ = {
    "PROMPTMILL_BROKER_URL": "amqp://promptmill@rabbitmq:5672//",
    "PROMPTMILL_BROKER_PASSWORD_FILE": "/run/secrets/rabbitmq_password",
}
CONFIGS = ("ops/promptmill.toml", "ops/promptmill.programs.toml")


def profile(name: str) -> set[str]:
    """The services that are there only with a profile."""
    return {service for service, about in SERVICES.items() if name in about.get("profiles", [])}


def megabytes(size: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(mb?|gb?)", size).groups()  # type: ignore[union-attr]
    return int(number) * (1024 if unit.startswith("g") else 1)


def can_claim(config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(CAN_CLAIM), *arguments],
        env=environment(config.parent, PROMPTMILL_CONFIG=str(config)),
        capture_output=True,
        text=True,
        timeout=ENDED_S,
        check=False,
    )


def test_it_is_valid_by_the_compose_specification() -> None:
    """By the schema that the linter brings; ops/check installs it."""
    schema = ROOT / ".lint" / "node_modules" / "dclint" / "schemas" / "compose.schema.json"
    if not schema.exists():
        pytest.skip("needs the linter of compose.yaml: ops/lint/compose")
    validator = jsonschema.Draft202012Validator(json.loads(schema.read_text()))
    # As it stands, with variables not yet filled in, and as compose makes it.
    for file in (yaml.safe_load(TEXT), load(), load(RABBITMQ)):
        assert [f"{list(e.absolute_path)}: {e.message}" for e in validator.iter_errors(file)] == []
    broken = {**COMPOSE, "services": {"redis": {**SERVICES["redis"], "healthcheck": {"tests": []}}}}
    assert not validator.is_valid(broken)


def test_the_stack_and_what_its_profiles_add() -> None:
    assert {name for name, about in SERVICES.items() if "profiles" not in about} == {
        *("redis", "worker", "gateway", "relay"),
    }
    assert profile("rabbitmq") == {"rabbitmq"}
    assert profile("programs") == {"worker-claude", "worker-gemini"}
    assert profile("flower") == {"flower"}
    assert profile("monitoring") == {"prometheus", "alertmanager", "grafana"}


@pytest.mark.parametrize("name", OURS)
def test_each_service_of_ours_runs_a_command_that_exists(name: str) -> None:
    command = typer.main.get_command(app)
    assert SERVICES[name]["command"][0] in command.commands  # type: ignore[attr-defined]
    build = SERVICES[name]["build"]
    assert (ROOT / build["context"] / build["dockerfile"]).is_file()
    # Compose looks for an image before it builds one; this one is nobody else's.
    assert SERVICES[name]["pull_policy"] == "build"


def test_every_variable_is_a_setting_or_the_file_of_a_secret() -> None:
    known = {name.upper() for name in Settings.model_fields} | NOT_SETTINGS
    known |= {f"{name.upper()}_FILE" for name in SECRETS}
    used = set(re.findall(r"\bPROMPTMILL_([A-Z_]+)", TEXT))
    assert used
    assert used <= known


@pytest.mark.parametrize("variables", [{}, RABBITMQ], ids=["without", "with RabbitMQ"])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", OURS)
def test_the_values_of_the_settings_are_valid(
    name: str, config: str, variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "redis_password").write_text("stored\n")
    (tmp_path / "rabbitmq_password").write_text("sent\n")
    (tmp_path / "api_key").write_text("key\n")
    (tmp_path / "flower_password").write_text("login\n")
    for variable, value in environment_of(SERVICES[name], variables).items():
        monkeypatch.setenv(variable, value.replace("/run/secrets", str(tmp_path)))
    monkeypatch.setenv("PROMPTMILL_CONFIG", str(ROOT / config))
    settings = load_settings()
    assert settings.redis_url == "redis://:stored@redis:6379/0"
    broker = "amqp://promptmill:sent@rabbitmq:5672//"
    sends = "PROMPTMILL_BROKER_URL" in SERVICES[name]["environment"]
    assert settings.queue_url == (broker if variables and sends else settings.redis_url)
    assert settings.metrics_port == 9464
    if name == "flower":
        assert (settings.flower_host, settings.flower_user, settings.flower_password) == ("0.0.0.0", "admin", "login")
    if settings.host == "0.0.0.0":
        assert settings.keys_by_user() == {"default": "key"}


def test_all_but_the_relay_know_the_broker() -> None:
    assert [name for name in OURS if "PROMPTMILL_BROKER_URL" not in SERVICES[name]["environment"]] == ["relay"]
    for name in OURS:
        needs = SERVICES[name]["depends_on"]
        assert needs["redis"] == {"condition": "service_healthy"}
        assert name == "relay" or needs["rabbitmq"] == {"condition": "service_healthy", "required": False}


def test_secrets_are_files_and_each_service_gets_those_that_it_reads() -> None:
    # No password and no key in a variable of any service, and none in a command.
    for service in SERVICES.values():
        for variable in service.get("environment", {}):
            assert variable.endswith("FILE") or not re.search(r"PASSWORD|SECRET|TOKEN|API_KEY", variable)
    for name, service in SERVICES.items():
        read = set(re.findall(r"/run/secrets/(\w+)", json.dumps({**service, "secrets": []})))
        optional = {"rabbitmq_password"} if name in OURS and name != "relay" else set[str]()
        keys = set(service.get("secrets", [])) - read - optional
        assert read <= set(service.get("secrets", []))
        # Keys of providers are named by the configuration; a worker sees that of its own family alone.
        expected = {"worker": {"anthropic_api_key"}, "worker-claude": {"claude_token"}}
        expected |= {"worker-gemini": {"gemini_api_key"}, "alertmanager": {"alert_page", "alert_ticket"}}
        assert keys == expected.get(name, set()), name


def test_the_command_of_the_first_lines_makes_every_secret_and_no_two_the_same(tmp_path: Path) -> None:
    (line,) = re.findall(r"^#   (mkdir .*secrets.*)$", TEXT, re.MULTILINE)
    subprocess.run(["bash", "-euc", f"umask 022; {line}"], cwd=tmp_path, check=True)
    made = {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    assert set(made) == {Path(secret["file"]).name for secret in COMPOSE["secrets"].values()}
    passwords = [text for text in made.values() if text]
    assert len(set(passwords)) == len(passwords) == 5
    assert all(re.fullmatch(r"[0-9a-f]{48}\n", password) for password in passwords)
    # Nobody else of the machine looks in, and the containers' users, whoever they are, read what is mounted.
    assert (tmp_path / "secrets").stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o004 for path in (tmp_path / "secrets").iterdir())
    subprocess.run(["bash", "-euc", line], cwd=tmp_path, check=True)
    assert {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()} == made
    assert {"/secrets/", ".env"} <= set((ROOT / ".gitignore").read_text().split())


def test_whatever_is_mounted_exists() -> None:
    for config in COMPOSE["configs"].values():
        assert (ROOT / config["file"]).is_file()
    for service in SERVICES.values():
        assert {c["source"] for c in service.get("configs", [])} <= set(COMPOSE["configs"])
        assert set(service.get("secrets", [])) <= set(COMPOSE["secrets"])
        for volume in service.get("volumes", []):
            source, _, rest = volume.partition(":")
            if source.startswith("./"):
                assert (ROOT / source).is_dir()
                assert rest.endswith(":ro")
            else:
                assert source in COMPOSE["volumes"]
    for config in CONFIGS:
        named = set(re.findall(r"/run/secrets/(\w+)", (ROOT / config).read_text()))
        assert named <= set(COMPOSE["secrets"])


def test_no_service_is_root_writes_beside_its_volumes_or_gains_rights() -> None:
    for name, service in SERVICES.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.keys() & {"privileged", "cap_add", "network_mode", "pid", "ipc", "devices"}, name
        assert all(mount.split(":")[0] == "/tmp" and "size=" in mount for mount in service["tmpfs"]), name
        if name not in OURS:  # the user of ours stands in the image
            assert service["user"] not in {"root", "0"}, name
        # One init each: that of our image, or the engine's.
        assert ("init" in service) == (name not in OURS), name


def test_every_service_is_bounded_in_what_it_takes_and_in_what_it_logs() -> None:
    for name, service in SERVICES.items():
        limits = service["deploy"]["resources"]["limits"]
        assert 0 < float(limits["cpus"]) <= 2, name  # more than a machine has is refused by the engine
        assert limits["memory"]
        assert limits["pids"] >= 128, name
        assert service["logging"]["options"].keys() == {"max-size", "max-file"}, name
    # A worker has a thread for each of its jobs, and they count as processes.
    assert SERVICES["worker"]["deploy"]["resources"]["limits"]["pids"] > Settings().concurrency + 100
    for name in profile("programs"):
        programs = Settings().concurrency_of(name.removeprefix("worker-"))
        assert megabytes(SERVICES[name]["deploy"]["resources"]["limits"]["memory"]) >= programs * 400
    # Refused in time, not killed: what the server needs to write its file anew comes on top.
    full = megabytes(SERVICES["redis"]["environment"]["MAXMEMORY"])
    assert full * 1.5 < megabytes(SERVICES["redis"]["deploy"]["resources"]["limits"]["memory"])


def test_images_are_named_by_a_version() -> None:
    for name, service in SERVICES.items():
        tag = service["image"].partition(":")[2]
        assert tag == "local" if name in OURS else re.fullmatch(r"v?\d+\.\d+\.\d+", tag), name


def test_each_service_has_a_health_check_and_more_time_to_stop_than_it_takes() -> None:
    for name, service in SERVICES.items():
        assert service["healthcheck"]["test"][0] in {"CMD", "CMD-SHELL"}, name
        assert seconds(service["healthcheck"]["start_period"]) >= 60, name
    for name in WORKERS:
        drain_s = float(SERVICES[name]["environment"]["PROMPTMILL_DRAIN_S"])
        assert seconds(SERVICES[name]["stop_grace_period"]) >= drain_s + HAND_BACK_S + 5
        # The check asks for the family that the command serves.
        family = SERVICES[name]["command"][-1] if "--family" in SERVICES[name]["command"] else "api"
        assert SERVICES[name]["healthcheck"]["test"] == ["CMD", "python", "/opt/promptmill/can_claim.py", family]
    for name in ("gateway", "relay"):
        assert seconds(SERVICES[name]["stop_grace_period"]) > HARD_S


def test_only_http_services_are_published_on_loopback_and_the_store_has_no_way_out() -> None:
    assert {name for name, service in SERVICES.items() if "ports" in service} == {
        *("gateway", "relay", "flower", "alertmanager", "grafana"),
    }
    for service in SERVICES.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert COMPOSE["networks"]["backend"] == {"internal": True}
    for name in ("redis", "rabbitmq", "prometheus"):
        assert SERVICES[name]["networks"] == ["backend"]
    for name in OURS:
        assert SERVICES[name]["networks"] == ["backend", "outside"]


@pytest.mark.parametrize("name", ["gateway", "relay"])
def test_the_check_of_a_server_tells_ready_from_not_ready(name: str) -> None:
    test = SERVICES[name]["healthcheck"]["test"]
    port = SERVICES[name]["environment"]["PROMPTMILL_PORT"]
    assert test[1:3] == ["python", "-c"]
    for status, expected in ((b"200 OK", 0), (b"503 Service Unavailable", 1)):
        with socket.create_server(("127.0.0.1", 0)) as server:
            code = test[3].replace(f":{port}/", f":{server.getsockname()[1]}/")
            assert code != test[3]
            check = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
            connection, _ = server.accept()
            with connection:
                assert connection.recv(4096).startswith(b"GET /readyz ")
                connection.sendall(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                assert check.wait(30) == expected


async def test_the_worker_check_passes_while_its_worker_can_claim_and_only_then(
    tmp_path: Path, write_config: Callable[..., tuple[Path, Settings]]
) -> None:
    # A store of its own: workers that other tests killed may still stand in the shared one.
    with running_store(tmp_path, append_only=False) as server:
        config, settings = write_config("", url=server.url)
        before = can_claim(config)
        assert before.returncode == 1
        assert "can claim api jobs: no heartbeat" in before.stderr
        with worker_process(config) as worker:
            await worker.ready(settings.store_url)
            during = can_claim(config, "api")
            assert (during.returncode, during.stderr) == (0, "")
            other = can_claim(config, "claude")
            assert other.returncode == 1
            assert "can claim claude jobs: no heartbeat" in other.stderr
        after = can_claim(config)
        assert after.returncode == 1


def test_the_worker_check_says_in_one_line_that_redis_is_away(tmp_path: Path) -> None:
    config = tmp_path / "promptmill.toml"
    config.write_text(f'redis_url = "redis://127.0.0.1:{free_port()}/0"\n')
    done = can_claim(config)
    assert done.returncode == 1
    assert done.stderr.startswith("error [store_unavailable]: Redis at 127.0.0.1:")
    assert done.stderr.count("\n") == 1


def test_the_scripts_in_commands_are_shell_that_parses() -> None:
    for name, service in SERVICES.items():
        if service.get("command", [""])[0] == "sh":
            shell, options, script = service["command"]
            assert (shell, options) == ("sh", "-ec"), name
            subprocess.run(["sh", "-n", "-c", script], check=True)
            # What is started is the container's process itself, and gets its signals.
            assert shlex.split(script.strip().splitlines()[-1])[0] == "exec", name
