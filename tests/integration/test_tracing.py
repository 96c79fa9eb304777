"""Spans of real processes, received over OTLP: one trace a job, whoever submitted it."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import httpx

from promptmill import AsyncProducer
from promptmill.settings import load_settings
from tests.support.gateway import gateway_process
from tests.support.otlp import Receiver, receiving_spans
from tests.support.processes import PATIENCE_S, wait_until
from tests.support.streams import follow_sse, wait_for_tokens
from tests.support.worker import QUICK, worker_process

MODELS = """
[models.broken]
type = "echo"
options = { fault = "refused" }
[models.endless]
type = "echo"
options = { text = "on ", repeat = 9999, tokens_per_s = 20 }
[roles.safe]
primary = "broken"
backup_1 = "echo"
"""
CALLER = "4bf92f3577b34da6a3ce929d0e0e4736"
"""The trace of whoever sends a request."""


def tracing(receiver: Receiver) -> dict[str, str]:
    """The environment of a process that sends its spans at once."""
    return {"PROMPTMILL_OTLP_ENDPOINT": receiver.url, "OTEL_BSP_SCHEDULE_DELAY": "100"}


async def received(receiver: Receiver, name: str, count: int = 1, **attributes: str) -> None:
    async def there() -> bool:
        return len(receiver.named(name, **attributes)) >= count

    await wait_until(there, f"{count} spans {name}")


async def test_a_job_is_one_trace_from_the_request_to_its_reader(redis_url: str, tmp_path: Path) -> None:
    path = tmp_path / "promptmill.toml"
    path.write_text(f'redis_url = "{redis_url}"\n{MODELS}')
    with receiving_spans() as receiver, worker_process(path, env=tracing(receiver)) as worker:
        await worker.ready(redis_url)
        async with (
            gateway_process(redis_url, PROMPTMILL_CONFIG=str(path), **tracing(receiver)) as (_, port),
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=PATIENCE_S) as http,
        ):
            answer = await http.post(
                "/v1/jobs",
                json={"prompt": "planted words", "role": "safe"},
                headers={"traceparent": f"00-{CALLER}-00f067aa0ba902b7-01"},
            )
            job_id = answer.json()["id"]
            await follow_sse(port, job_id)
            await received(receiver, "promptmill.stream")
            await received(receiver, "POST /v1/jobs")
            await received(receiver, "promptmill.run")
        spans = {s.span_id: s for s in receiver.spans if s.trace_id == CALLER}
        submit, run = receiver.named("promptmill.submit")[0], receiver.named("promptmill.run", job_id=job_id)[0]
        attempts = receiver.named("promptmill.attempt")

    by_name = {s.name for s in spans.values()}
    assert by_name >= {
        *("POST /v1/jobs", "promptmill.submit", "promptmill.queue"),
        *("promptmill.run", "promptmill.attempt", "promptmill.stream"),
    }
    assert len(spans) == len(receiver.spans), "nothing stands in another trace"
    assert spans[submit.parent_id].name == "POST /v1/jobs"
    assert (submit.kind, run.kind) == ("producer", "consumer")
    assert run.parent_id == submit.span_id
    assert run.attributes["promptmill.job.state"] == "succeeded"
    assert not run.failed
    assert [(a.attributes["gen_ai.request.model"], a.failed) for a in attempts] == [("broken", True), ("echo", False)]
    assert attempts[0].attributes["error.type"] == "refused"
    assert attempts[1].events == ["first token"]
    assert attempts[1].attributes["gen_ai.usage.output_tokens"] == 2
    assert {a.parent_id for a in attempts} == {run.span_id}
    assert {s.service for s in spans.values()} == {"promptmill-gateway", "promptmill-worker"}
    assert receiver.named("promptmill.stream")[0].attributes["promptmill.stream.outcome"] == "ended"
    assert not [body for body in receiver.raw if b"planted" in body]


async def test_without_a_word_from_the_producer_two_workers_agree_on_the_trace(redis_url: str, tmp_path: Path) -> None:
    """The producer does not trace; the first worker dies, another one goes on."""
    path = tmp_path / "promptmill.toml"
    path.write_text(f'redis_url = "{redis_url}"\n{QUICK}{MODELS}')
    with receiving_spans() as receiver:
        async with AsyncProducer(load_settings(path)) as producer:
            with worker_process(path, "first", env=tracing(receiver)) as first:
                await first.ready(redis_url)
                job = await producer.submit("x", model="endless")
                await wait_for_tokens(producer, job.id, 2)
                await received(receiver, "promptmill.queue")
                with worker_process(path, "second", env=tracing(receiver)) as second:
                    await second.ready(redis_url)
                    first.signal(signal.SIGKILL)
                    await received(receiver, "promptmill.queue", 2)
                    await job.cancel()
                    await received(receiver, "promptmill.run", job_id=job.id)
                    assert second.stop() == 0

    run = receiver.named("promptmill.run")[0]
    assert run.attributes["promptmill.worker"].startswith("second@")
    assert run.attributes["promptmill.stopped"] == "taken"
    assert {s.trace_id for s in receiver.spans} == {run.trace_id}
    assert len({s.parent_id for s in receiver.named("promptmill.queue")}) == 1, "all stand below the same unseen root"
    assert receiver.named("promptmill.attempt")[0].attributes["error.type"] == "cancelled"


PROGRAM = """
import asyncio, sys
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from promptmill import AsyncProducer

trace.set_tracer_provider(TracerProvider())

async def main():
    async with AsyncProducer(redis_url=sys.argv[1]) as producer:
        with trace.get_tracer("shop").start_as_current_span("order") as span:
            job = await producer.submit("x", model="echo")
        await job.result()
        print(f"{span.get_span_context().trace_id:032x}")

asyncio.run(main())
"""


async def test_a_program_with_traces_of_its_own_is_joined(redis_url: str, tmp_path: Path) -> None:
    path = tmp_path / "promptmill.toml"
    path.write_text(f'redis_url = "{redis_url}"\n')
    with receiving_spans() as receiver, worker_process(path, env=tracing(receiver)) as worker:
        await worker.ready(redis_url)
        program = await asyncio.create_subprocess_exec(
            sys.executable, "-c", PROGRAM, redis_url, stdout=asyncio.subprocess.PIPE
        )
        said, _ = await program.communicate()
        assert program.returncode == 0
        await received(receiver, "promptmill.run")
    assert {s.trace_id for s in receiver.spans} == {said.decode().strip()}


async def test_a_receiver_that_is_away_holds_nothing_up(redis_url: str, tmp_path: Path) -> None:
    path = tmp_path / "promptmill.toml"
    path.write_text(f'redis_url = "{redis_url}"\notlp_endpoint = "http://127.0.0.1:9"\n')
    with worker_process(path) as worker:
        await worker.ready(redis_url)
        async with AsyncProducer(load_settings(path)) as producer:
            job = await producer.submit("one two", model="echo")
            assert (await job.result()).text == "one two"
        assert worker.stop() == 0


async def test_a_receiver_that_hangs_holds_no_end_up(redis_url: str, tmp_path: Path) -> None:
    path = tmp_path / "promptmill.toml"
    path.write_text(f'redis_url = "{redis_url}"\n')
    with (
        receiving_spans() as receiver,
        worker_process(path, env={**tracing(receiver), "OTEL_EXPORTER_OTLP_TIMEOUT": "300"}) as worker,
    ):
        receiver.answers.clear()
        await worker.ready(redis_url)
        async with AsyncProducer(load_settings(path)) as producer:
            await (await producer.submit("one two", model="echo")).result()
        # Released only once the worker is gone.
        assert await asyncio.to_thread(worker.stop) == 0
        assert receiver.spans == []
