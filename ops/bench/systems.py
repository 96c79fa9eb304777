"""The three ways from the provider to a reader, each started for one run and stopped after it."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import orjson
from ops.bench.procs import Part, can_connect, free_port, start_valkey
from ops.bench.sse import Dialect, event_dialect, openai_dialect

SLOTS = 1000
"""Jobs that one worker process may run at once."""
PROMPT = "Count."
Roots = Mapping[str, list[int]]


@dataclass(kw_only=True)
class DirectTarget:
    """Read the provider itself: the floor under every latency."""

    url: str
    submit_path: str = "/v1/chat/completions"
    direct: bool = True
    dialect: Dialect = openai_dialect

    def submit_body(self, model: str) -> bytes:
        """Return a chat completion request."""
        messages = [{"role": "user", "content": PROMPT}]
        return orjson.dumps({"model": model, "stream": True, "messages": messages})

    def job_paths(self, answer: bytes) -> tuple[str, str]:
        """Never called: the answer is the stream."""
        raise NotImplementedError("the provider's answer is the stream itself")

    def stored_text(self, answer: bytes) -> str | None:
        """Never called: the provider stores nothing."""
        raise NotImplementedError("the provider stores no text")


@dataclass(kw_only=True)
class BaselineTarget:
    """The obvious implementation's relay."""

    url: str
    submit_path: str = "/jobs"
    direct: bool = False
    dialect: Dialect = event_dialect

    def submit_body(self, model: str) -> bytes:
        """Return the relay's submission."""
        return orjson.dumps({"model": model, "prompt": PROMPT})

    def job_paths(self, answer: bytes) -> tuple[str, str]:
        """Return the paths of the stream and of the stored text."""
        job_id = orjson.loads(answer)["id"]
        return f"/jobs/{job_id}/stream", f"/jobs/{job_id}"

    def stored_text(self, answer: bytes) -> str | None:
        """Return the stored text."""
        return orjson.loads(answer)["text"]


@dataclass(kw_only=True)
class PromptmillTarget:
    """promptmill's gateway; ``models`` maps the simulator's specifications to the registry names of the config."""

    url: str
    models: Mapping[str, str]
    submit_path: str = "/v1/jobs"
    direct: bool = False
    dialect: Dialect = event_dialect

    def submit_body(self, model: str) -> bytes:
        """Return a job request."""
        return orjson.dumps({"model": self.models[model], "prompt": PROMPT})

    def job_paths(self, answer: bytes) -> tuple[str, str]:
        """Return the given stream URL's path and query, and the job's path."""
        job = orjson.loads(answer)
        parts = urlsplit(str(job["stream_url"]))
        return f"{parts.path}?{parts.query}" if parts.query else parts.path, f"/v1/jobs/{job['id']}"

    def stored_text(self, answer: bytes) -> str | None:
        """Return the text of a job that has one."""
        return orjson.loads(answer).get("text")


@dataclass(frozen=True, kw_only=True)
class Running:
    """A started system: where to send jobs, and the root processes of each of its roles."""

    target: DirectTarget | BaselineTarget | PromptmillTarget
    roots: Roots = field(default_factory=dict[str, list[int]])


@contextmanager
def direct(provider_url: str, models: Mapping[str, str], directory: Path) -> Generator[Running]:
    """Nothing to start: the readers go to the provider."""
    del models, directory
    yield Running(target=DirectTarget(url=provider_url))


@contextmanager
def baseline(provider_url: str, models: Mapping[str, str], directory: Path) -> Generator[Running]:
    """Start Valkey, one Celery gevent worker process and one relay process. Raises ``PartFailedError``."""
    del models
    with ExitStack() as stack:
        redis, redis_url = start_valkey(directory)
        stack.callback(redis.stop)
        env = {"BASELINE_REDIS_URL": redis_url, "BASELINE_PROVIDER_URL": f"{provider_url}/v1"}
        port = free_port()
        options = ["--host", "127.0.0.1", "--port", str(port), "--loop", "uvloop", "--http", "httptools"]
        relay = stack.enter_context(
            Part(
                "baseline-relay",
                [sys.executable, "-m", "uvicorn", "ops.bench.baseline.relay:app", *options, "--no-access-log"],
                directory=directory,
                env=env,
            )
        )
        options = ["--pool", "gevent", "--concurrency", str(SLOTS), "--loglevel", "WARNING"]
        worker = stack.enter_context(
            Part(
                "baseline-worker",
                [sys.executable, "-m", "celery", "-A", "ops.bench.baseline.tasks", "worker", *options],
                directory=directory,
                env=env,
            )
        )
        relay.wait_until("a listening port", lambda: can_connect(port))
        yield Running(
            target=BaselineTarget(url=f"http://127.0.0.1:{port}"),
            roots={"worker": [worker.pid], "relay": [relay.pid], "redis": [redis.pid]},
        )


def config_text(provider_url: str, models: Mapping[str, str]) -> str:
    """Return a promptmill configuration with one model a simulator specification."""
    tables = [
        f'[models.{name}]\ntype = "local_openai"\napi_url = {json.dumps(provider_url + "/v1")}\n'
        f'host_type = "openai"\nmodel_name = {json.dumps(model)}\n'
        for model, name in models.items()
    ]
    return "\n".join(tables)


@contextmanager
def promptmill(provider_url: str, models: Mapping[str, str], directory: Path) -> Generator[Running]:
    """Start ``promptmill up`` with its own Valkey, one worker process and one gateway. Raises ``PartFailedError``."""
    config = directory / "promptmill.toml"
    config.write_text(config_text(provider_url, models))
    command = [
        str(Path(sys.executable).with_name("promptmill")),
        "up",
        "--json",
        "--config",
        str(config),
        "--port",
        "0",
    ]
    command += ["--workers", "1", "--concurrency", str(SLOTS), "--data-dir", str(directory / "data")]
    with Part("promptmill-up", command, directory=directory) as up:
        ready = orjson.loads(orjson.dumps(up.json_line()))
        pids: dict[str, int] = ready["pids"]
        roots = {
            "worker": [pid for name, pid in pids.items() if name.startswith("worker")],
            "relay": [pids["gateway"]],
            "redis": [pids["redis"]],
            "supervisor": [up.pid],
        }
        yield Running(target=PromptmillTarget(url=ready["url"], models=models), roots=roots)


SYSTEMS = {"direct": direct, "baseline": baseline, "promptmill": promptmill}
