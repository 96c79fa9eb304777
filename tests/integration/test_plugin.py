"""The worked example of docs/backends/your-own.md, taken from the page: installed, checked by its suite, and run."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.support.docs import blocks
from tests.support.processes import PATIENCE_S
from tests.support.up import Up, environment, promptmill

PAGE = "docs/backends/your-own.md"
ANSWER = ["Hello ", "from ", "naïve ", "Ollama."]


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    """The page's files by name."""
    named = ((re.match(r"not run: `([\w.]+)` is ", block.say), block.text) for block in blocks(PAGE))
    return {match[1]: text for match, text in named if match}


@pytest.fixture(scope="module")
def site(files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory where the package is installed."""
    directory = tmp_path_factory.mktemp("site")
    (directory / "promptmill_ollama.py").write_text(files["promptmill_ollama.py"])
    # As pip leaves it, by hand: a build would need a network for its build backend.
    project = tomllib.loads(files["pyproject.toml"])["project"]
    name, version = project["name"], project["version"]
    info = directory / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    groups = project["entry-points"].items()
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items()) for group, entries in groups]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return directory


@pytest.fixture(scope="module")
def ollama() -> Generator[str]:
    """An Ollama that always gives the same answer."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert (self.path, body["model"]) == ("/api/chat", "llama3.2")
            self.send_response(200)
            self.end_headers()
            for piece in ANSWER:
                self._line({"message": {"content": piece}, "done": False})
            end = {"message": {"content": ""}, "done": True, "done_reason": "stop"}
            self._line(end | {"prompt_eval_count": 3, "eval_count": len(ANSWER)})

        def _line(self, value: object) -> None:
            self.wfile.write(json.dumps(value).encode() + b"\n")
            self.wfile.flush()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_the_page_shows_a_whole_package_and_a_short_backend(files: dict[str, str]) -> None:
    assert set(files) == {"pyproject.toml", "promptmill_ollama.py", "test_promptmill_ollama.py", "promptmill.toml"}
    for name in ("promptmill_ollama.py", "test_promptmill_ollama.py"):
        assert ast.parse(files[name]).body
    code = [line for line in files["promptmill_ollama.py"].splitlines() if line.strip()]
    assert len(code) < 90


def test_the_examples_own_tests_pass(files: dict[str, str], site: Path, tmp_path: Path) -> None:
    for name in ("pyproject.toml", "test_promptmill_ollama.py"):
        (tmp_path / name).write_text(files[name])
    # On a busy machine a cancelled call may take longer to return than the suite expects of it.
    patient = f"import promptmill_workers.testing\n\npromptmill_workers.testing.PROMPT_S = {PATIENCE_S}\n"
    (tmp_path / "conftest.py").write_text(patient)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:cloudcoil", "-q"],  # as in pyproject
        cwd=tmp_path,
        env=environment(tmp_path, PYTHONPATH=str(site)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    assert int(passed[1]) >= 18


def test_a_job_runs_through_it_with_and_without_isolation(
    files: dict[str, str], site: Path, ollama: str, tmp_path: Path
) -> None:
    config = files["promptmill.toml"].replace("http://127.0.0.1:11434", ollama)
    assert config.count(ollama) == 2
    (tmp_path / "promptmill.toml").write_text(config)
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    up = Up(tmp_path, variables={"PYTHONPATH": path})
    try:
        up.wait_ready()
        for model in ("llama", "llama-apart"):
            arguments = ("run", "--model", model, "--json", "Say hello.", "--data-dir", str(up.data_dir))
            done = promptmill(*arguments, home=tmp_path, PYTHONPATH=path)
            assert done.returncode == 0, done.stderr + up.err
            events = [json.loads(line) for line in done.stdout.splitlines()]
            tokens = [event["text"] for event in events if event["type"] == "token"]
            assert "".join(tokens) == events[-1]["text"] == "".join(ANSWER)
            assert (events[-1]["type"], events[-1]["backend"], events[-1]["model"]) == ("done", "ollama", model)
            assert events[-1]["usage"]["output_tokens"] == len(ANSWER)
    finally:
        up.close()
