"""A real browser's ``EventSource`` reads a stream: across origins, with a signed address, cut off in the middle.

The page connects through a small proxy of the test's own that cuts the first connection, so that the browser itself
must reconnect with ``Last-Event-ID``; what it saw, it posts back.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from promptmill.settings import Settings
from promptmill_gateway.app import open_gateway
from tests.support.web import serving
from tests.support.worker import worker_process

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (found := shutil.which(name))),
    None,
)

PAGE = """<!doctype html><meta charset="utf-8"><script>
const seen = [], source = new EventSource("STREAM");
let opened = 0;
source.onopen = () => { opened += 1 };
const report = () => fetch("/seen", {method: "POST", body: JSON.stringify({seen, opened})});
for (const type of ["progress", "token", "restart", "done"])
  source.addEventListener(type, (e) => seen.push([e.type, e.lastEventId, JSON.parse(e.data)]));
// Never closed by the page: the browser reconnects by itself, and only a 204 makes it stop.
source.addEventListener("error", (e) => {
  if (e.data) seen.push([e.type, e.lastEventId, JSON.parse(e.data)]);
  else if (source.readyState === EventSource.CLOSED) report();
});
</script>"""


class Site:
    """The page's own server: another origin than the gateway's."""

    def __init__(self) -> None:
        self.page = ""
        self.seen: dict[str, Any] = {}
        self.reported = threading.Event()
        self.port = 0

    @contextmanager
    def serving(self) -> Generator[None]:
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(200 if self.path == "/" else 404, site.page.encode() if self.path == "/" else b"")

            def do_POST(self) -> None:
                site.seen = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self._answer(200, b"")
                site.reported.set()

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
                pass

            def _answer(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", "text/html")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            self.port = server.server_address[1]
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            try:
                yield
            finally:
                server.shutdown()
                thread.join()


class CuttingProxy:
    """Passes bytes on, and cuts the connection on which ``marker`` would pass first.

    Before it, and not behind the piece that holds it: to a browser that took long to start all comes in one piece.
    """

    def __init__(self, port: int, marker: bytes) -> None:
        self._to = port
        self._marker = marker
        self._tasks: set[asyncio.Task[None]] = set()
        self.asked = b""
        """Everything that clients sent."""
        self.cuts = 0

    @asynccontextmanager
    async def serving(self) -> AsyncGenerator[int]:
        """Answers its port."""
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        async with server:
            yield server.sockets[0].getsockname()[1]
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._to)
        upwards = asyncio.create_task(self._upwards(reader, up_writer))
        try:
            passed = b""
            while data := await up_reader.read(65536):
                passed += data
                behind = 0 if self.cuts or self._marker not in passed else len(passed) - passed.index(self._marker)
                writer.write(data[: max(0, len(data) - behind)])
                await writer.drain()
                if behind:
                    self.cuts += 1
                    break
        except ConnectionError:
            pass  # the browser was first
        finally:
            upwards.cancel()
            for each in (writer, up_writer):
                each.transport.abort()
            self._tasks.discard(task)

    async def _upwards(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            self.asked += data
            writer.write(data)
        writer.close()


@asynccontextmanager
async def browser(url: str, profile: Path) -> AsyncGenerator[None]:
    assert CHROMIUM is not None
    process = await asyncio.create_subprocess_exec(
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--no-first-run",
        f"--user-data-dir={profile}",
        "--remote-debugging-port=0",
        url,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        process.terminate()
        await process.wait()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
async def test_a_browser_gets_every_token_once_across_a_cut_and_stops_after_the_end(
    write_config: Callable[..., tuple[Path, Settings]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"wörd-{n}\u2028" for n in range(40)]
    monkeypatch.setenv("TEST_KEY", "the-key")
    site = Site()
    with site.serving():
        config, settings = write_config(f"""
            cors_origins = ["http://127.0.0.1:{site.port}"]
            retry_ms = 100
            api_keys.page = {{ key_env = "TEST_KEY" }}
            [models.slow]
            type = "echo"
            options = {{ tokens_per_s = 20, chunk_chars = 9, first_token_s = 10 }}
        """)
        with worker_process(config) as worker:
            await worker.ready(settings.store_url)
            async with open_gateway(settings) as service, serving(service.app, service.streams) as gateway:
                proxy = CuttingProxy(gateway.port, b"-17")
                async with proxy.serving() as port, httpx.AsyncClient(timeout=60) as http:
                    answer = await http.post(
                        f"http://127.0.0.1:{gateway.port}/v1/jobs",
                        json={"prompt": "".join(words), "model": "slow"},
                        headers={"Authorization": "Bearer the-key"},
                    )
                    assert answer.status_code == 202, answer.text
                    site.page = PAGE.replace("STREAM", f"http://127.0.0.1:{port}{answer.json()['stream_url']}")
                    async with browser(f"http://127.0.0.1:{site.port}/", tmp_path / "profile"):
                        assert await asyncio.to_thread(site.reported.wait, 90), proxy.asked
    seen = site.seen["seen"]
    tokens = [data["text"] for kind, _, data in seen if kind == "token"]
    ids = [event_id for _, event_id, _ in seen]
    assert "".join(tokens) == "".join(words) == seen[-1][2]["text"]
    assert seen[-1][0] == "done"
    assert len(set(ids)) == len(ids)
    assert proxy.cuts == 1
    # First, behind the cut, and once more behind the end, where 204 told it to stop.
    assert site.seen["opened"] == 2
    assert proxy.asked.lower().count(b"last-event-id: ") == 2
    assert f"last-event-id: {ids[-1]}".encode() in proxy.asked.lower()
