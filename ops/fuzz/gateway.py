"""Requests made from the gateway's own OpenAPI document, right ones and wrong ones, and what every answer must be.

No answer may be a server's error, or anything that the document does not say: status, content type, body. What the
document calls wrong must be refused, what it calls right must not be refused as malformed.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import hypothesis
import requests
import schemathesis
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.core.errors import InvalidSchema
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi import checks
from tests.support.store import running_store

import promptmill.keys
from promptmill import Producer
from promptmill.settings import Settings, child_environment
from promptmill.up.embedded import free_port

CHECKS: Final = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
]
__all__ = ["CHECKS", "FailureGroup", "Gateway", "document", "fuzz", "operations", "running"]

STREAM: Final = "GET /v1/jobs/{job_id}/stream"
READY: Final = "GET /readyz"
_ANSWER_S: Final = 60.0
_ENTRY: Final = re.compile(r"^(?=\d{4}-\d\d-\d\d )", re.MULTILINE)


@dataclass(frozen=True)
class Gateway:
    """One that runs, with nobody who claims its jobs."""

    port: int
    log: Path
    queued: Sequence[str]
    """Jobs that wait."""
    ended: Sequence[str]
    """Jobs that were cancelled: their streams have an end."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def complaints(self) -> list[str]:
        """What it logged that it should not have had to."""
        return [entry for entry in _ENTRY.split(self.log.read_text()) if " ERROR " in entry or "Traceback" in entry]


@contextmanager
def running() -> Generator[Gateway]:
    """A gateway process and a store of its own, both gone behind the block."""
    with tempfile.TemporaryDirectory(prefix="promptmill-fuzz-") as name:
        directory = Path(name)
        with running_store(directory, append_only=False) as server:
            log = directory / "gateway.log"
            port = free_port()
            command = [sys.executable, "-m", "promptmill_gateway", "--port", str(port)]
            with log.open("wb") as out:
                process = subprocess.Popen(
                    command, env=child_environment({"redis_url": server.url, "max_queued": 0}), stderr=out
                )
            try:
                _wait_ready(process, f"http://127.0.0.1:{port}", log)
                with Producer(Settings(redis_url=server.url)) as producer:
                    jobs = producer.submit_many([{"prompt": "x", "model": "echo"}] * 6)
                    for job in jobs[:3]:
                        job.cancel()
                yield Gateway(port, log, [job.id for job in jobs[3:]], [job.id for job in jobs[:3]])
            finally:
                process.terminate()
                process.wait()


def _wait_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    while process.poll() is None:
        try:
            requests.get(f"{url}/healthz", timeout=_ANSWER_S)
        except requests.ConnectionError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError(f"the gateway ended:\n{log.read_text()}")


def document(gateway: Gateway) -> dict[str, Any]:
    """What the gateway says of itself."""
    return requests.get(f"{gateway.url}/openapi.json", timeout=_ANSWER_S).json()


def operations(gateway: Gateway, described: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the document, or another one, describes, by method and path."""
    schema = schemathesis.openapi.from_dict(described or document(gateway), config=SchemathesisConfig())
    schema.config.update(base_url=gateway.url)
    return {operation.ok().label: operation.ok() for operation in schema.get_all_operations()}


def fuzz(gateway: Gateway, operation: Any, *, examples: int, seed: int, until: float | None = None) -> int:
    """Ask again and again; answers how often. Raises ``FailureGroup`` for the smallest request that shows it.

    Nothing is asked after ``until``, on ``time.monotonic``.
    """
    known = gateway.ended if operation.label == STREAM else (*gateway.queued, *gateway.ended)
    never = st.just(promptmill.keys.new_job_id())
    # What would end the path there is left out: it would ask for another one.
    odd = st.text(st.characters(exclude_characters="/?#%", exclude_categories=["Cs"]), min_size=1, max_size=80)
    ids = st.one_of(st.sampled_from(known), odd, never)
    asked = 0
    session = requests.Session()
    # No worker runs: that it is not ready is the right answer there, and 503 the status of it.
    found = [check for check in CHECKS if operation.label != READY or check is not not_a_server_error]

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )
    @hypothesis.given(data=st.data())
    def ask(data: st.DataObject) -> None:
        nonlocal asked
        try:
            case = data.draw(_cases(operation), label="case")
        except InvalidSchema:
            hypothesis.reject()  # some of the wrong requests that schemathesis plans cannot be made
        if "job_id" in (case.path_parameters or {}) and data.draw(st.booleans(), label="a known id"):
            case.path_parameters["job_id"] = data.draw(ids, label="id")
        if until is not None and time.monotonic() > until:
            return  # after all was drawn: drawing less than before would look like a flaw of the test
        asked += 1
        case.call_and_validate(session=session, checks=found, timeout=_ANSWER_S)

    ask()
    session.close()
    return asked


def _cases(operation: Any) -> st.SearchStrategy[Any]:
    right = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
    wrong = operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)
    return st.one_of(right, wrong)
