"""Every example of the documentation, run against a real `promptmill up`.

Models that the pages take from a provider (`sonnet`, `ollama`) are of type `echo` here.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from promptmill.settings import load_settings
from promptmill_workers.backends import load_backend
from tests.support.docs import PAGES, Block, blocks, steady
from tests.support.up import ENDED_S, Up, environment

pytestmark = pytest.mark.xdist_group("docs")

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
ADDRESS = "127.0.0.1:8080"
GENERATED = {"docs/benchmarks.md"}
"""Written by a command of its own, which measures for minutes."""
CODE = {"python", "bash", "sh", "console", "toml", "html", "yaml", "json", "javascript", "text", ""}

CONFIG = """
cors_origins = ["http://127.0.0.1:{page_port}"]
[models.sonnet]
type = "echo"
options = {{ tokens_per_s = 200 }}
[models.ollama]
type = "echo"
[models.slow]
type = "echo"
options = {{ first_token_s = 2, tokens_per_s = 5 }}
"""


@pytest.fixture(scope="module")
def page_listener() -> Generator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory, page_listener: socket.socket) -> Generator[Up]:
    home = tmp_path_factory.mktemp("docs")
    (home / "promptmill.toml").write_text(CONFIG.format(page_port=page_listener.getsockname()[1]))
    started = Up(home)
    try:
        yield started.wait_ready()
    finally:
        started.close()


def run(block: Block, up: Up) -> str:
    """What the block prints, standard error included; it must end well."""
    text = block.text.replace(ADDRESS, up.about["url"].removeprefix("http://"))
    command = [sys.executable, "-c", text] if block.language == "python" else ["bash", "-euo", "pipefail", "-c", text]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command,
        cwd=up.home,
        env=environment(up.home, PROMPTMILL_DATA_DIR=str(up.data_dir), PATH=path, NO_PROXY="127.0.0.1"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=ENDED_S,
        check=False,
    )
    assert done.returncode == 0, f"{block.place}\n{done.stdout}\n{up.err}"
    return done.stdout


def check_toml(block: Block, directory: Path) -> None:
    path = directory / f"{block.line}.toml"
    path.write_text(block.text)
    settings = load_settings(path)
    for name, config in settings.models.items():
        load_backend(name, config)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in GENERATED])
def test_every_block_of_code_is_run_or_says_why_not(page: str) -> None:
    silent = [b.place for b in blocks(page) if b.language in CODE and not b.say.startswith(("run", "not run: "))]
    assert silent == []


@pytest.mark.parametrize("page", [page for page in PAGES if any(b.say == "run" for b in blocks(page))])
def test_the_examples_run_and_print_what_the_page_says(page: str, up: Up, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("the examples need curl")
    for block in (b for b in blocks(page) if b.say == "run"):
        if block.language == "toml":
            check_toml(block, tmp_path)
            continue
        assert block.language in {"python", "bash"}, block.place
        printed = run(block, up)
        if block.output is not None:
            assert steady(printed) == steady(block.output), f"{block.place} prints:\n{printed}"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_shows_the_whole_answer_in_a_browser(up: Up, page_listener: socket.socket, tmp_path: Path) -> None:
    (block,) = [b for b in blocks("docs/guide.md") if b.language == "html"]
    prompt = "wörd " * 20 + "end"
    request = {"prompt": prompt, "model": "sonnet"}
    job = httpx.post(f"{up.about['url']}/v1/jobs", json=request, timeout=ENDED_S, trust_env=False).json()
    page = block.text.replace("STREAM_URL", up.about["url"] + job["stream_url"])
    # What the example has no need of: tell the test what the page shows, and whether its source is closed.
    page += '<script>setInterval(() => fetch("/seen", {method: "POST", body: JSON.stringify('
    page += "[answer.textContent, source.readyState])}), 50)</script>"
    seen: list[list[object]] = []
    closed = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(b'<!doctype html><meta charset="utf-8">' + page.encode())

        def do_POST(self) -> None:
            seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self._answer(b"")
            if seen[-1][1] == 2:
                closed.set()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            pass

        def _answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(page_listener.getsockname(), Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = page_listener.dup()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
    url = f"http://127.0.0.1:{page_listener.getsockname()[1]}/"
    shown = subprocess.Popen(
        [str(CHROMIUM), *options, f"--user-data-dir={tmp_path}", "--remote-debugging-port=0", url],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert closed.wait(ENDED_S), seen[-1:]
        assert seen[-1][0] == prompt
    finally:
        shown.terminate()
        shown.wait()
        server.shutdown()
        thread.join()
        server.server_close()
