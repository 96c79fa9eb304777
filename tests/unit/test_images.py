"""The images' Dockerfile: linted, and what it copies is there and reaches the builder. tests/acceptance/test_image.py
runs its installation."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support.compose import DOCKERFILE, instructions, load
from tests.support.docs import ROOT

INSTRUCTIONS = instructions()
IGNORE = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().split()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINNED = re.compile(r"^([\w.-]+)==([^\s;]+)", re.MULTILINE)


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage by its name."""
    found: dict[str, list[tuple[str, str]]] = {}
    for word, rest in INSTRUCTIONS:
        if word == "FROM":
            found[rest.split(" AS ")[1]] = []
        if found:
            list(found.values())[-1].append((word, rest))
    return found


def copied() -> list[str]:
    """Every source of a COPY from the context."""
    return [
        source
        for word, rest in INSTRUCTIONS
        if word == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    ]


def admitted(path: str) -> bool:
    """Whether the .dockerignore leaves a file in the context: the last line that fits it counts."""
    inside = False
    for line in IGNORE:
        pattern = line.removeprefix("!").removeprefix("**/")
        parts = [path, *map(str, Path(path).parents)]
        if any(fnmatch.fnmatch(part, pattern) for part in [*parts, *Path(path).parts]):
            inside = line.startswith("!")
    return inside


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("needs the group manifests, as ops/check has")
    done = subprocess.run(
        [hadolint, "--no-color", str(DOCKERFILE)], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_what_is_copied_exists_and_reaches_the_builder_and_nothing_else_does() -> None:
    for source in copied():
        path = ROOT / source
        assert path.exists(), source
        files = [path] if path.is_file() else [f for f in path.rglob("*") if f.suffix == ".py"]
        assert files
        assert all(admitted(str(file.relative_to(ROOT))) for file in files), source
    allowed = {line.removeprefix("!") for line in IGNORE if line.startswith("!")}
    assert allowed == set(copied())
    for secret in (".env", "secrets/api_key", ".git/config", "uv.lock", "producer/promptmill/__pycache__/a.pyc"):
        assert not admitted(secret), secret
    packages = {path.split("/")[0] for path in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]}
    assert packages <= set(copied())


def test_the_stages_are_those_that_compose_builds_and_only_the_first_ones_have_tools() -> None:
    found = stages()
    assert list(found) == ["build", "node", "promptmill", "programs"]
    for service in load()["services"].values():
        if "build" in service:
            assert service["build"]["target"] in found
    for final in ("promptmill", "programs"):
        runs = " ".join(rest for word, rest in found[final] if word == "RUN")
        assert not re.search(r"\b(gcc|build-essential|uv|npm|pip install|curl)\b", runs)
        assert "apt-get install" not in runs or "rm -rf /var/lib/apt/lists/*" in runs
    assert "pip uninstall --yes pip setuptools wheel" in " ".join(rest for _, rest in found["promptmill"])


def test_it_runs_as_a_numbered_user_under_an_init() -> None:
    words = dict(stages()["promptmill"])
    assert words["USER"] == "10001:10001"
    assert "USER" not in dict(stages()["programs"])
    assert json.loads(words["ENTRYPOINT"]) == ["/usr/bin/tini", "--", "promptmill"]
    # Health is the orchestrator's: each role has a check of its own.
    assert not [word for word, _ in INSTRUCTIONS if word == "HEALTHCHECK"]
    targets = [rest.split()[-1] for word, rest in INSTRUCTIONS if word == "COPY"]
    check = load()["services"]["worker"]["healthcheck"]["test"][2]
    assert check in targets


def test_its_version_is_that_of_the_project() -> None:
    labels = " ".join(rest for word, rest in INSTRUCTIONS if word == "LABEL")
    assert f'version="{PROJECT["project"]["version"]}"' in labels


def test_every_package_is_installed_by_its_hash_in_the_version_that_was_tested() -> None:
    runs = [rest for word, rest in INSTRUCTIONS if word == "RUN"]
    for run in runs:
        for command in re.findall(r"\bpip install [^&]*", run):
            assert "--require-hashes" in command or "--no-deps /tmp/dist" in command, command
    pins = {tuple(PINNED.match(pin).groups()) for pin in PROJECT["tool"]["uv"]["constraint-dependencies"]}  # type: ignore[union-attr]
    text = (DOCKERFILE.parent / "requirements.txt").read_text()
    required = set(PINNED.findall(text))
    assert required <= pins
    names = {name for name, _ in required}
    extras = PROJECT["project"]["optional-dependencies"]
    roles = [lines for extra, lines in extras.items() if extra not in {"demo", "all"}]
    for lines in (PROJECT["project"]["dependencies"], *roles):
        direct = {re.match(r"[\w.-]+", line)[0] for line in lines} - {"promptmill"}  # type: ignore[index]
        assert direct <= names, "run python ops/pins.py"
    for requirements in ("requirements.txt", "build.txt"):
        text = (DOCKERFILE.parent / requirements).read_text()
        # A line for each version, and behind each at least one hash.
        assert not re.search(r"==[^\n]*[^\\]\n(?!    --hash)", text), requirements
        assert "://" not in text
    build = dict(PINNED.findall((DOCKERFILE.parent / "build.txt").read_text()))
    assert [f"hatchling=={build['hatchling']}"] == PROJECT["tool"]["uv"]["build-constraint-dependencies"]
    assert dict(PINNED.findall((DOCKERFILE.parent / "build.in").read_text())).items() <= build.items()


def test_the_programs_are_those_of_the_lock_that_the_tests_run() -> None:
    node = dict(stages()["node"])
    assert "npm ci --ignore-scripts" in node["RUN"]
    lock = json.loads((ROOT / "ops" / "programs" / "package-lock.json").read_text())
    assert lock["packages"][""]["dependencies"].keys() == {"@anthropic-ai/claude-code", "@google/gemini-cli"}
    copies = [rest for word, rest in stages()["programs"] if word == "COPY"]
    assert copies == [
        "--from=node /usr/local/bin/node /usr/local/bin/node",
        "--from=node /opt/programs /opt/programs",
    ]
