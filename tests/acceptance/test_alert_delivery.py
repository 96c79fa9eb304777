"""An alert on its whole way: a real Prometheus with the rules, a real Alertmanager, and who is to hear of it."""

from __future__ import annotations

import json
import queue
import re
import shutil
import subprocess
import threading
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from promptmill.up.embedded import free_port
from tests.support.docs import ROOT
from tests.support.processes import PATIENCE_S, wait_gone
from tests.support.promql import program

Heard = queue.Queue[tuple[str, dict[str, Any]]]


@contextmanager
def receivers() -> Generator[tuple[str, Heard]]:
    """A server that takes what Alertmanager sends: its address, and what came, with the path that it came to."""
    heard: Heard = queue.Queue()

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            heard.put((self.path.strip("/"), json.loads(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing to standard error."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", heard
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def process(*command: str | Path, log: Path) -> Generator[None]:
    with log.open("wb") as out:
        started = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        yield
    finally:
        started.terminate()
        started.wait(PATIENCE_S)
        wait_gone([started.pid])


def alertmanager_config(url: str) -> str:
    """The stack's file with receivers, and without the time that it gives alerts to come together."""
    config = yaml.safe_load((ROOT / "ops" / "alertmanager" / "alertmanager.yml").read_text())
    for receiver in config["receivers"]:
        receiver["webhook_configs"] = [{"url": f"{url}/{receiver['name']}"}]
    for route in (config["route"], *config["route"]["routes"]):
        route["group_wait"] = "0s"
    return yaml.safe_dump(config)


def prometheus_config(directory: Path, port: int) -> Path:
    """The stack's file and rules, quick: looked at each second, and no alert waits before it fires."""
    shutil.copytree(ROOT / "ops" / "prometheus" / "rules", directory / "rules")
    for path in (directory / "rules").glob("*.yml"):
        path.write_text(re.sub(r"^ +for: .*\n", "", path.read_text(), flags=re.MULTILINE))
    config = yaml.safe_load((ROOT / "ops" / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"] = []
    (static,) = config["alerting"]["alertmanagers"][0]["static_configs"]
    static["targets"] = [f"127.0.0.1:{port}"]
    path = directory / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_with_no_gateway_and_no_worker_one_is_woken_and_one_told(tmp_path: Path) -> None:
    prometheus = program("prometheus")
    alertmanager = program("alertmanager", "prometheus-alertmanager", package="prometheus-alertmanager")
    port = free_port()
    with ExitStack() as stack:
        url, heard = stack.enter_context(receivers())
        (tmp_path / "alertmanager.yml").write_text(alertmanager_config(url))
        command = [
            alertmanager,
            f"--config.file={tmp_path / 'alertmanager.yml'}",
            f"--storage.path={tmp_path / 'kept'}",
        ]
        command += ["--cluster.listen-address=", f"--web.listen-address=127.0.0.1:{port}"]
        stack.enter_context(process(*command, log=tmp_path / "alertmanager.log"))
        # What fires before Prometheus knows of the Alertmanager is told again after that delay only.
        command = [prometheus, "--rules.alert.resend-delay=1s", f"--config.file={prometheus_config(tmp_path, port)}"]
        command += [f"--storage.tsdb.path={tmp_path / 'data'}", f"--web.listen-address=127.0.0.1:{free_port()}"]
        stack.enter_context(process(*command, log=tmp_path / "prometheus.log"))
        told: dict[str, str] = {}
        while told.keys() < {"PromptmillGatewaysAbsent", "PromptmillWorkersAbsent"}:
            receiver, message = heard.get(timeout=PATIENCE_S)
            for alert in message["alerts"]:
                told[alert["labels"]["alertname"]] = receiver
                assert alert["status"] == "firing"
                assert alert["annotations"]["runbook_url"].startswith("docs/runbook.md#promptmill")
    assert told == {"PromptmillGatewaysAbsent": "page", "PromptmillWorkersAbsent": "ticket"}
