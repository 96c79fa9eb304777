"""The compose stack and its image, as far as they can be checked without a container engine."""

from __future__ import annotations

import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
import typer
import yaml
from redis.backoff import NoBackoff
from redis.retry import Retry

from promptmill.cli.app import app
from promptmill.settings import Settings, load_settings
from promptmill.up.embedded import free_port
from promptmill_relay.server import HARD_S
from tests.support.store import running_store
from tests.support.up import ENDED_S, environment
from tests.support.worker import worker_process

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "ops" / "images"
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = ("worker", "gateway")
NOT_FIELDS = {"CONFIG", "TOML"}
"""PROMPTMILL_ names that are no setting: where the file is, for `load_settings` and for compose."""
UNITS = {"s": 1, "m": 60}


def seconds(duration: str) -> float:
    return sum(float(number) * UNITS[unit] for number, unit in re.findall(r"([\d.]+)([sm])", duration))


def dockerfile() -> list[tuple[str, list[str]]]:
    """Its instructions, with continued lines joined."""
    text = re.sub(r"\\\n\s*", " ", (IMAGES / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split()[0], shlex.split(line)[1:]) for line in lines]


def can_claim(config: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(IMAGES / "can_claim.py")],
        env=environment(config.parent, PROMPTMILL_CONFIG=str(config)),
        capture_output=True,
        text=True,
        timeout=ENDED_S,
        check=False,
    )


def test_the_stack_is_a_store_workers_and_a_gateway_from_one_image() -> None:
    assert set(SERVICES) == {"redis", "worker", "gateway"}
    assert SERVICES["worker"]["image"] == SERVICES["gateway"]["image"]
    for name in OURS:
        build = SERVICES[name]["build"]
        assert (ROOT / build["context"] / build["dockerfile"]).is_file()


@pytest.mark.parametrize("name", OURS)
def test_each_service_runs_a_command_that_exists(name: str) -> None:
    command = typer.main.get_command(app)
    assert SERVICES[name]["command"][0] in command.commands  # type: ignore[attr-defined]
    assert dict(dockerfile())["ENTRYPOINT"] == ["[promptmill]"]


def test_every_variable_is_a_setting() -> None:
    known = {name.upper() for name in Settings.model_fields} | NOT_FIELDS
    used = set(re.findall(r"\bPROMPTMILL_([A-Z_]+)", (ROOT / "compose.yaml").read_text()))
    assert used
    assert used <= known


def test_the_values_of_the_settings_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OURS:
        with monkeypatch.context() as patch:
            for variable, value in SERVICES[name]["environment"].items():
                filled = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)
                patch.setenv(variable, re.sub(r"\$\{\w+:\?[^}]*\}", "secret", filled))
            patch.setenv("PROMPTMILL_CONFIG", str(ROOT / "ops" / "promptmill.toml"))
            settings = load_settings()
        assert settings.redis_url == "redis://:secret@redis:6379/0"
        assert "sonnet" in settings.models


def test_secrets_have_no_default_and_the_provider_key_goes_to_workers_only() -> None:
    text = (ROOT / "compose.yaml").read_text()
    for secret in ("REDIS_PASSWORD", "PROMPTMILL_API_KEY"):
        assert re.findall(rf"\$\{{{secret}(:.)", text)
        assert set(re.findall(rf"\$\{{{secret}(:.)", text)) == {":?"}
    assert "ANTHROPIC_API_KEY" in SERVICES["worker"]["environment"]
    assert "ANTHROPIC_API_KEY" not in SERVICES["gateway"]["environment"]


def test_whatever_is_mounted_exists() -> None:
    for config in COMPOSE["configs"].values():
        path = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", config["file"])
        assert (ROOT / path).is_file()
    for service in SERVICES.values():
        assert {c["source"] for c in service["configs"]} <= set(COMPOSE["configs"])


def test_each_service_has_a_health_check_and_more_time_to_stop_than_it_takes() -> None:
    for service in SERVICES.values():
        assert service["healthcheck"]["test"][0] in {"CMD", "CMD-SHELL"}
        assert service["init"] is True
    drain_s = float(SERVICES["worker"]["environment"]["PROMPTMILL_DRAIN_S"])
    assert seconds(SERVICES["worker"]["stop_grace_period"]) >= drain_s + 20
    assert seconds(SERVICES["gateway"]["stop_grace_period"]) > HARD_S


def test_only_the_gateway_is_published_and_on_loopback() -> None:
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["gateway"]
    assert all(port.startswith("127.0.0.1:") for port in SERVICES["gateway"]["ports"])


def test_the_image_copies_what_exists_and_its_context_admits_it() -> None:
    ignore = (IMAGES / "Dockerfile.dockerignore").read_text().split()
    admitted = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    copied = [args for name, args in dockerfile() if name == "COPY" and not args[0].startswith("--from")]
    sources = {source for args in copied for source in args[:-1]}
    assert sources == admitted
    assert all((ROOT / source).exists() for source in sources)
    packages = {
        path.split("/")[0] for path in re.findall(r'"(\w+/promptmill\w*)"', (ROOT / "pyproject.toml").read_text())
    }
    assert packages <= sources


def test_the_image_runs_as_an_ordinary_user_with_extras_that_exist() -> None:
    instructions = dockerfile()
    assert ("USER", ["promptmill"]) in instructions
    runs = [" ".join(args) for name, args in instructions if name == "RUN"]
    assert any("useradd" in run for run in runs)
    extras = {extra for run in runs for extra in re.findall(r"--extra (\w+)", run)}
    assert extras == {"cli", "gateway", "workers"}
    # Its health check is where the compose file looks for it.
    copied = [args for name, args in instructions if name == "COPY"]
    assert ["ops/images/can_claim.py", SERVICES["worker"]["healthcheck"]["test"][2]] in copied


def test_the_gateway_check_tells_ready_from_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    test = SERVICES["gateway"]["healthcheck"]["test"]
    assert test[1:3] == ["python", "-c"]
    for status, expected in ((b"200 OK", 0), (b"503 Service Unavailable", 1)):
        with socket.create_server(("127.0.0.1", 0)) as server:
            code = test[3].replace(":8080", f":{server.getsockname()[1]}")
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
        assert "can claim: no heartbeat" in before.stderr
        with worker_process(config) as worker:
            await worker.ready(settings.store_url)
            during = can_claim(config)
            assert (during.returncode, during.stderr) == (0, "")
        after = can_claim(config)
        assert after.returncode == 1


def test_the_worker_check_says_in_one_line_that_redis_is_away(tmp_path: Path) -> None:
    config = tmp_path / "promptmill.toml"
    config.write_text(f'redis_url = "redis://127.0.0.1:{free_port()}/0"\n')
    done = can_claim(config)
    assert done.returncode == 1
    assert done.stderr.startswith("error [store_unavailable]: Redis at 127.0.0.1:")
    assert done.stderr.count("\n") == 1


def test_the_store_starts_with_its_configuration_and_its_password(tmp_path: Path) -> None:
    from promptmill.up.embedded import find_store_program

    program = find_store_program()
    assert program is not None
    port = free_port()
    conf = (ROOT / "ops" / "redis.conf").read_text().replace("dir /data", f"dir {tmp_path}")
    (tmp_path / "redis.conf").write_text(conf.replace("port 6379", f"port {port}\nbind 127.0.0.1"))
    shell, options, script = SERVICES["redis"]["command"]
    # As compose does: $$ is a dollar. Places of the image become places of this machine.
    script = script.replace("$$", "$").replace("/etc/redis.conf", str(tmp_path / "redis.conf"))
    script = script.replace("/tmp/redis.conf", str(tmp_path / "whole.conf"))
    script = script.replace("valkey-server", str(program.path))
    server = subprocess.Popen(
        [shell, options, script], env=environment(tmp_path, REDIS_PASSWORD="pass123"), stdout=subprocess.DEVNULL
    )
    try:
        with redis.Redis(port=port, password="pass123", retry=Retry(NoBackoff(), 0)) as client:
            while True:
                assert server.poll() is None
                try:
                    client.ping()
                    break
                except redis.ConnectionError:
                    continue
            held = client.config_get("appendonly", "maxmemory-policy", "dir")
        assert held == {"appendonly": "yes", "maxmemory-policy": "noeviction", "dir": str(tmp_path)}
        with redis.Redis(port=port) as stranger, pytest.raises(redis.AuthenticationError):
            stranger.ping()
        assert (tmp_path / "whole.conf").stat().st_mode & 0o077 == 0
    finally:
        server.kill()
        server.wait()
