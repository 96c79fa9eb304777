"""compose.yaml as compose reads it, and its services as processes of this machine instead of containers.

A process gets the file's command, and the file's environment and nothing else but what the image sets. Places of a
container (``/run/secrets``, ``/etc/promptmill.toml``, ``/tmp``) become places of a directory, and the addresses of
services become ports of this machine.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml

from promptmill.up.embedded import find_store_program
from tests.support.docs import ROOT
from tests.support.processes import PATIENCE_S, block_until, tree, wait_gone
from tests.support.rabbit import rabbit_program, steady_port

FILE: Final = ROOT / "compose.yaml"
DOCKERFILE: Final = ROOT / "ops" / "images" / "Dockerfile"
IMAGE: Final = "promptmill:local"
PROGRAMS_IMAGE: Final = "promptmill-programs:local"
_ENTRY_POINTS: Final = {"prometheus": ("prometheus",), "alertmanager": ("alertmanager",)}
"""Those of other people's images, where a command holds the arguments alone."""
_SECONDS: Final = {"h": 3600, "m": 60, "s": 1, "ms": 0.001}
# $1 on: what may be written to, "--", the command. As `read_only`, `cap_drop: [ALL]` and `no-new-privileges` have it.
_CONFINE: Final = """
while [ "$1" != -- ]; do mount --bind "$1" "$1"; shift; done
mount -o remount,ro,bind /
exec setpriv --no-new-privs --bounding-set=-all --inh-caps=-all "$@"
"""
_VARIABLE: Final = re.compile(r"\$(?:\$|\{(?P<name>\w+)(?:(?P<how>:[-?])(?P<text>[^}]*))?\})")


def load(variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The file with ``variables`` (of .env) put in, as compose does it. Raises KeyError for one that must be set."""
    given = variables or {}

    def value(match: re.Match[str]) -> str:
        if match["name"] is None:
            return "$"
        found = given.get(match["name"], "")
        if found or match["how"] is None:
            return found
        if match["how"] == ":?":
            raise KeyError(match["text"])
        return match["text"]

    def filled(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: filled(inner) for key, inner in node.items()}
        if isinstance(node, list):
            return [filled(inner) for inner in node]
        return _VARIABLE.sub(value, node) if isinstance(node, str) else node

    return filled(yaml.safe_load(FILE.read_text()))


def seconds(duration: str) -> float:
    """``1m30s`` as a number."""
    return sum(float(number) * _SECONDS[unit] for number, unit in re.findall(r"([\d.]+)(ms|[hms])", duration))


def environment_of(service: Mapping[str, Any], variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """A service's variables: those without a value are handed through, or are not there."""
    found: dict[str, str] = {}
    for name, value in service.get("environment", {}).items():
        handed = (variables or {}).get(name) if value is None else value
        if handed is not None:
            found[name] = handed
    return found


def ours(file: Mapping[str, Any]) -> list[str]:
    """The services that run from our images."""
    return [name for name, service in file["services"].items() if service["image"] in {IMAGE, PROGRAMS_IMAGE}]


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions and what stands behind them, continued lines joined, in order."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


class Place:
    """One directory in which services run: its secrets, its configuration, a port for each address of the file."""

    def __init__(self, directory: Path, variables: Mapping[str, str] | None = None) -> None:
        self.directory = directory
        self.variables = dict(variables or {})
        self.file = load(self.variables)
        self._ports: dict[tuple[str, int], int] = {}
        (directory / "secrets").mkdir()
        for name in self.file["secrets"]:
            (directory / "secrets" / name).write_text(f"{name.replace('_', '')}0\n")

    def secret(self, name: str) -> str:
        """What its file holds."""
        return (self.directory / "secrets" / name).read_text().strip()

    def port(self, service: str, number: int) -> int:
        """The port of this machine that stands for one of a service."""
        return self._ports.setdefault((service, number), steady_port())

    def translate(self, name: str, text: str) -> str:
        """A command's word, a variable or a file of the service ``name``, with this machine's places and ports."""
        places = {
            **{config["target"]: self._config(name, config["source"]) for config in self._configs(name)},
            **self._mounts(name),
            "/run/secrets": self.directory / "secrets",
            "/opt/promptmill/can_claim.py": ROOT / "ops" / "images" / "can_claim.py",
            "/tmp": self._own(name, "tmp"),
        }
        # At once: what is put in has such places in its own path.
        anywhere = "|".join(map(re.escape, sorted(places, key=len, reverse=True)))
        return self._with_ports(name, re.sub(rf"(?<![\w.])(?:{anywhere})\b", lambda match: str(places[match[0]]), text))

    def _with_ports(self, name: str, text: str) -> str:
        def port(match: re.Match[str]) -> str:
            host = name if match[1] in {"127.0.0.1", "0.0.0.0"} else match[1]
            return f"127.0.0.1:{self.port(host, int(match[2]))}" if host in self.file["services"] else match[0]

        return re.sub(r"\b([a-z][a-z-]*|127\.0\.0\.1|0\.0\.0\.0):(\d{4,5})\b", port, text)

    def _configs(self, name: str) -> list[dict[str, str]]:
        return self.file["services"][name].get("configs", [])

    def _mounts(self, name: str) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for volume in self.file["services"][name].get("volumes", []):
            source, target = volume.split(":")[:2]
            found[target] = self._mounted(name, source) if source.startswith("./") else self._own(name, source)
        return found

    def _mounted(self, name: str, source: str) -> Path:
        """A directory of the repository: a copy, in which files name this machine's ports."""
        copy = self._own(name, "mounted") / Path(source).name
        if not copy.exists():
            shutil.copytree(ROOT / source, copy)
            for path in copy.glob("*.yml"):
                path.write_text(self._with_ports(name, path.read_text()))
        return copy

    def _own(self, name: str, kind: str) -> Path:
        path = self.directory / name / kind
        path.mkdir(parents=True, exist_ok=True)
        return path

    def _config(self, name: str, source: str) -> Path:
        path = self._own(name, "etc") / f"{source}.conf"
        if not path.exists():
            text = (ROOT / self.file["configs"][source]["file"]).read_text()
            text = text.replace("/run/secrets", str(self.directory / "secrets"))
            if source == "redis":
                text = text.replace("port 6379", f"port {self.port(name, 6379)}\nbind 127.0.0.1")
                text = text.replace("dir /data", f"dir {self._mounts(name)['/data']}")
            path.write_text(text)
        return path

    def environment(self, name: str) -> dict[str, str]:
        """The file's variables for a service, and what the image and a container bring."""
        found = {
            key: self.translate(name, value)
            for key, value in environment_of(self.file["services"][name], self.variables).items()
        }
        for key in ("PROMPTMILL_PORT", "PROMPTMILL_METRICS_PORT", "PROMPTMILL_FLOWER_PORT"):
            if key in found:
                found[key] = str(self.port(name, int(found[key])))
        path = [self.programs(name), Path(sys.executable).parent, *map(Path, os.environ["PATH"].split(os.pathsep))]
        return {
            "PATH": os.pathsep.join(map(str, path)),
            "HOME": "/nonexistent",
            "TMPDIR": str(self._own(name, "tmp")),
            "LANG": "C.UTF-8",
            "PYTHONUNBUFFERED": "1",
            **found,
        }

    def programs(self, name: str) -> Path:
        """The first directory on the service's PATH, where servers that have another name here have the image's."""
        path = self._own(name, "bin")
        store = find_store_program()
        broker = rabbit_program()
        here = {"rabbitmq-server": broker, "valkey-server": str(store.path) if store else None}
        # Beside the server: what Debian puts on PATH becomes another user.
        here["rabbitmq-diagnostics"] = str(Path(broker).with_name("rabbitmq-diagnostics")) if broker else None
        here["valkey-cli"] = shutil.which("valkey-cli") or shutil.which("redis-cli")
        here["alertmanager"] = alertmanager_program()
        for link, program in here.items():
            if program and not (path / link).exists():
                # No link: a script looks for its neighbours.
                (path / link).write_text(f'#!/bin/sh\nexec {program} "$@"\n')
                (path / link).chmod(0o755)
        return path

    def command(self, name: str) -> list[str]:
        """What the container runs: the image's entry point, where it is ours, and the file's command."""
        words = [self.translate(name, word) for word in self.file["services"][name].get("command", [])]
        if self.file["services"][name]["image"] in {IMAGE, PROGRAMS_IMAGE}:
            return [*entrypoint(), *words]
        return [*_ENTRY_POINTS.get(name, ()), *words]

    def confined(self, name: str, command: list[str]) -> list[str]:
        """The command in the walls that the file sets; without them where this user may not build such walls."""
        service = self.file["services"][name]
        if not (can_confine() and service["read_only"] and service["cap_drop"] == ["ALL"]):
            return command
        sources = [volume.partition(":")[0] for volume in service.get("volumes", [])]
        volumes = [self._own(name, source) for source in sources if not source.startswith("./")]
        writable = [self._own(name, "tmp"), *volumes]
        return [*("unshare", "--mount", "sh", "-euc", _CONFINE, "sh"), *map(str, writable), "--", *command]

    def healthy(self, name: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run the service's health check once; ``env`` comes on top of its environment."""
        kind, *words = self.file["services"][name]["healthcheck"]["test"]
        words = [self.translate(name, word) for word in words]
        return subprocess.run(
            self.confined(name, ["sh", "-c", *words] if kind == "CMD-SHELL" else words),
            env={**self.environment(name), **(env or {})},
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )


def alertmanager_program() -> str | None:
    """Where Alertmanager is, which Debian gives another name."""
    return shutil.which("alertmanager") or shutil.which("prometheus-alertmanager")


@cache
def can_confine() -> bool:
    """Whether this user may make a mount namespace and a read-only file system in it."""
    command = ["unshare", "--mount", "sh", "-euc", _CONFINE, "sh", "--", "true"]
    return (
        all(map(shutil.which, ("unshare", "setpriv")))
        and subprocess.run(command, capture_output=True, check=False).returncode == 0
    )


def entrypoint() -> list[str]:
    """The image's, with tini where it is installed here."""
    (words,) = [rest for word, rest in instructions() if word == "ENTRYPOINT"]
    init, dashes, *program = yaml.safe_load(words)
    assert (init, dashes) == ("/usr/bin/tini", "--")
    return [init, "-s", dashes, *program] if Path(init).exists() else program


class Running:
    """A service that runs as a process. Its output goes to ``log``."""

    def __init__(self, place: Place, name: str, env: Mapping[str, str] | None = None) -> None:
        self.place = place
        self.name = name
        self.service = place.file["services"][name]
        self.log = place.directory / name / "out.log"
        self.seen: set[int] = set()
        environment = {**place.environment(name), **(env or {})}
        command = place.command(name)
        command[0] = shutil.which(command[0], path=environment["PATH"]) or command[0]
        command = place.confined(name, command)
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                command,
                env=environment,
                cwd=place.directory,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def said(self) -> str:
        """All that it wrote so far."""
        return self.log.read_text(errors="replace")

    def wait_healthy(self) -> None:
        """Until its own health check passes."""
        last: list[str] = []

        def passes() -> bool:
            assert self.process.poll() is None, f"{self.name} ended with {self.process.returncode}:\n{self.said()}"
            done = self.place.healthy(self.name)
            last[:] = [done.stdout + done.stderr]
            return done.returncode == 0

        try:
            block_until(passes, f"{self.name} is healthy", 2 * PATIENCE_S)
        except AssertionError as err:
            raise AssertionError(f"{err}\nits check: {last}\nit said: {self.said()[-3000:]}") from None

    def stop(self) -> int:
        """Its stop signal, and the time that compose gives it; answers the exit code. Fails where it takes longer."""
        self.seen |= tree(self.process.pid)
        self.process.send_signal(getattr(signal, self.service.get("stop_signal", "SIGTERM")))
        return self.process.wait(seconds(self.service["stop_grace_period"]))

    def kill(self) -> None:
        """Whatever happened: end it, and see that nothing is left of it."""
        if self.process.poll() is None:
            self.seen |= tree(self.process.pid)
            for pid in self.seen:
                with contextlib.suppress(ProcessLookupError):  # it ended in its time
                    os.kill(pid, signal.SIGKILL)
        self.process.wait(PATIENCE_S)
        wait_gone(self.seen)


@contextmanager
def running(place: Place, name: str, env: Mapping[str, str] | None = None) -> Generator[Running]:
    """A service that ends with the block."""
    service = Running(place, name, env)
    try:
        yield service
    finally:
        service.kill()
