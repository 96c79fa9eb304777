"""Real workers, a gateway and a relay tell Prometheus what they do, in figures that its own parser reads."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from promptmill import AsyncProducer, JobCancelled, JobFailed, keys
from promptmill.enqueue import Enqueuer
from promptmill.errors import ConfigError, PromptmillError, StoreUnavailable
from promptmill.metrics import code_label, metrics_port
from promptmill.settings import Settings, load_settings
from promptmill.store import Store
from promptmill.up.embedded import free_port
from promptmill.watch import Watcher
from promptmill_relay.server import measured
from tests.support.docs import tables
from tests.support.gateway import running_gateway, running_relay
from tests.support.metrics import Figures, scrape
from tests.support.processes import PATIENCE_S, wait_until
from tests.support.streams import follow_sse, wait_for_tokens
from tests.support.sweeping import swept
from tests.support.worker import QUICK, WorkerProcess, worker_process

MODELS = """
[models.priced]
type = "echo"
price = { input = 1000000, output = 1000000 }
[models.broken]
type = "echo"
options = { fault = "refused" }
[models.endless]
type = "echo"
options = { text = "on ", repeat = 9999, tokens_per_s = 20 }
"""


@dataclass
class Mill:
    """A worker with its figures' port, and a producer."""

    settings: Settings
    producer: AsyncProducer
    worker: WorkerProcess
    port: int

    async def until(self, holds: Callable[[Figures], bool], what: str) -> Figures:
        """The first scrape for which something holds."""
        found: list[Figures] = []

        async def look() -> bool:
            found[:] = [await scrape(self.port)]
            return holds(found[0])

        await wait_until(look, what)
        return found[0]


@asynccontextmanager
async def mill(url: str, directory: Path, name: str = "metered") -> AsyncGenerator[Mill]:
    path, port = directory / f"{name}.toml", free_port()
    path.write_text(f'redis_url = "{url}"\n{QUICK}{MODELS}')
    settings = load_settings(path)
    with worker_process(path, name, env={"PROMPTMILL_METRICS_PORT": str(port)}) as worker:
        async with AsyncProducer(settings) as producer:
            await worker.ready(url)
            yield Mill(settings, producer, worker, port)


async def test_a_worker_counts_jobs_attempts_tokens_cost_and_times(redis_url: str, tmp_path: Path) -> None:
    async with mill(redis_url, tmp_path) as it:
        before = await scrape(it.port)
        job = await it.producer.submit("one two three", model="priced")
        done = await job.result()
        failed = await it.producer.submit("x", model="broken", priority="batch")
        with pytest.raises(JobFailed):
            await failed.result()
        running = await it.producer.submit("x", model="endless")
        await wait_for_tokens(it.producer, running.id, 2)
        # A machine that pauses makes a heartbeat old, but not every one.
        during = await it.until(
            lambda f: (
                f.value("worker_running_jobs") == 1 and f.value("heartbeat_age_seconds") < it.settings.dead_after_s
            ),
            "a job runs",
        )
        await running.cancel()
        with pytest.raises(JobCancelled):
            await running.result()
        after = await it.until(lambda f: f.value("stops_total", why="taken") == 1, "the worker has stopped the job")

    assert before.value("worker_ready") == 1
    assert before.value("worker_slots") == it.settings.concurrency
    assert [labels["family"] for name, labels, _ in before if name == "promptmill_worker_info"] == ["api"]
    assert during.value("heartbeat_age_seconds") > 0
    assert after.value("jobs_total", state="succeeded", model="priced", backend="echo", code="") == 1
    assert after.value("jobs_total", state="failed", model="broken", code="refused") == 1
    assert after.value("jobs_total", state="cancelled") == 0, "whoever cancelled it counts it"
    assert after.value("attempts_total", model="priced", outcome="succeeded") == 1
    assert after.value("attempts_total", model="broken", outcome="refused") == 1
    assert after.value("claims_total", outcome="claimed") == 3
    assert done.usage is not None
    assert after.value("tokens_total", model="priced", kind="input") == done.usage.input_tokens
    assert after.value("tokens_total", model="priced", kind="output") == done.usage.output_tokens
    assert done.cost_usd
    assert after.value("cost_dollars_total", model="priced") == pytest.approx(done.cost_usd)
    assert after.value("first_token_seconds_count", model="priced") == 1
    assert after.value("first_token_seconds_count", model="broken") == 0
    assert after.value("attempt_seconds_count", model="broken") == 1
    assert after.value("queue_seconds_count", priority="interactive") == 2
    assert after.value("queue_seconds_count", priority="batch") == 1
    assert after.value("job_seconds_count", priority="batch") == 1
    assert after.value("publish_lag_seconds_count") == after.value("write_events_count") > 0
    assert after.value("write_events_sum") >= 3
    assert after.value("loop_lag_seconds_count") > 0
    assert after.value("unsent_bytes") == 0
    assert not [name for name, _, _ in after if name.endswith("_created")]


async def test_what_an_alert_must_see_once_is_there_before_it_happens(redis_url: str, tmp_path: Path) -> None:
    """A series that begins with 1 has no rise: the first crash of a model would go unseen."""
    async with mill(redis_url, tmp_path) as it:
        first = await scrape(it.port)
    models = {"priced", "broken", "endless"}

    def at_zero(name: str, key: str, value: str) -> set[str]:
        return {
            labels["model"]
            for found, labels, count in first
            if found == f"promptmill_{name}" and labels[key] == value and labels["backend"] == "echo" and count == 0
        }

    assert at_zero("jobs_total", "code", "crashed") >= models
    assert at_zero("attempts_total", "outcome", "auth") >= models


async def test_a_sweep_that_fails_is_none(store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the alert on sweeps stays quiet while nobody looks after what waits."""
    enqueuer = Enqueuer(settings.queue_url)
    try:
        watcher = Watcher(store, settings, enqueuer)

        async def refused(*_ids: object) -> None:
            raise StoreUnavailable("a node is silent")

        with monkeypatch.context() as patched:
            patched.setattr(watcher, "_outbox", refused)
            with pytest.raises(StoreUnavailable):
                await swept(watcher, store)
        assert watcher.counted["sweeps"] == 0
        await swept(watcher, store)
        assert watcher.counted["sweeps"] == 1
    finally:
        await enqueuer.aclose()


async def test_a_survivor_counts_the_dead_and_what_it_puts_back(redis_url: str, tmp_path: Path) -> None:
    async with mill(redis_url, tmp_path, "victim") as victim:
        job = await victim.producer.submit("x", model="endless")
        await wait_for_tokens(victim.producer, job.id, 2)
        async with mill(redis_url, tmp_path, "survivor") as it:
            victim.worker.signal(signal.SIGKILL)
            await it.until(lambda f: f.value("worker_running_jobs") == 1, "the survivor runs the job")
            # It may run the job before it is through with the dead one.
            after = await it.until(lambda f: f.value("dead_workers_total") == 1, "the dead one is counted")
            assert after.value("requeued_jobs_total", phase="requeued") == 1
            assert after.value("claims_total", outcome="claimed") == 1
            await job.cancel()


async def test_a_relay_and_a_gateway_count_their_readers_and_the_fleet(redis_url: str, tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        it = await stack.enter_async_context(mill(redis_url, tmp_path))
        gateway_settings = it.settings.model_copy(update={"metrics_port": free_port()})
        gateway = await stack.enter_async_context(running_gateway(gateway_settings))
        # Both in this process and its one registry, so one is measured after the other.
        with measured(gateway.service, gateway_settings) as port:
            assert port is not None
            before = await scrape(port)
            answer = await gateway.http.post("/v1/jobs", json={"prompt": "one two three", "model": "priced"})
            job_id = answer.json()["id"]
            events = await follow_sse(gateway.port, job_id)
            assert (await gateway.http.get("/v1/jobs/nobody-knows-this-one")).status_code == 404
            endless = (await gateway.http.post("/v1/jobs", json={"prompt": "x", "model": "endless"})).json()["id"]
            await wait_for_tokens(it.producer, endless, 2)
            follower = asyncio.create_task(follow_sse(gateway.port, endless))
            during = list[Figures]()

            async def seen() -> bool:
                figures = await scrape(port)
                during[:] = [figures]
                # The ledger is told of an attempt behind its end.
                counted = figures.value("today_attempts", model="priced")
                running = figures.value("fleet_running_jobs", family="api")
                return figures.value("readers") == running == counted == 1

            await wait_until(seen, "the reader, the running job and the attempt before it are counted")
            await gateway.http.post(f"/v1/jobs/{endless}/cancel")
            await follower
            after = await scrape(port)

        relay_settings = it.settings.model_copy(update={"metrics_port": 0})
        relay = await stack.enter_async_context(running_relay(relay_settings))
        with measured(relay.service, relay_settings) as port:
            assert port is not None
            await follow_sse(relay.port, job_id)
            late = await scrape(port)

    assert during[0].value("followed_jobs") == 1
    assert during[0].value("fleet_workers", family="api", state="ready") == 1
    assert during[0].value("fleet_slots", family="api") == it.settings.concurrency
    assert during[0].value("fleet_servers", kind="gateway") == 1
    assert during[0].value("today_attempts", model="priced") == 1
    assert during[0].value("fleet_age_seconds") < PATIENCE_S
    assert during[0].value("queue_jobs", family="api", priority="interactive") == 0

    def grown(name: str, **labels: str) -> float:
        return after.value(name, **labels) - before.value(name, **labels)

    assert after.value("readers") == 0
    assert grown("sent_events_total") >= len(events)
    assert grown("streams_total", outcome="ended") == 2
    assert grown("log_reads_total") >= 2
    assert grown("submitted_jobs_total", priority="interactive") == 2
    assert grown("jobs_total", state="cancelled") == 1
    assert grown("http_requests_total", method="POST", path="/v1/jobs", status="202") == 2
    assert grown("http_requests_total", path="/v1/jobs/{job_id}", status="404") == 1
    assert not any("nobody-knows" in text for text in (after.text, late.text)), "a path would be a label without bound"
    assert late.value("streams_total", outcome="ended") == after.value("streams_total", outcome="ended") + 1
    assert "fleet_workers" not in late.text


def test_a_port_in_use_and_a_wrong_host_are_told() -> None:
    with metrics_port(Settings(metrics_port=0)) as port:
        assert port is not None
        assert httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).status_code == 200
        with (
            pytest.raises(PromptmillError, match="choose another") as refused,
            metrics_port(Settings(metrics_port=port)),
        ):
            pass
        assert refused.value.code == "port_in_use"
    with (
        pytest.raises(ConfigError, match="metrics_host"),
        metrics_port(Settings(metrics_host="192.0.2.1", metrics_port=0)),
    ):
        pass
    with metrics_port(Settings()) as none:
        assert none is None


def test_a_plug_ins_own_error_code_is_no_label() -> None:
    assert code_label(None) == ""
    assert code_label("rate_limited") == "rate_limited"
    assert code_label("code-of-a-plug-in-4711") == "other"


PAGE = "docs/observing.md"
HEADINGS = (
    "Of every process",
    "Of workers and gateways, which watch over the others",
    "Of workers",
    "Of relays and gateways",
    "Of gateways",
)


async def test_the_page_lists_the_figures_that_there_are(redis_url: str, tmp_path: Path) -> None:
    """By name, type and labels, in the order in which the labels stand on the page."""
    listed = {
        row["figure"]: (row["type"], tuple(re.findall(r"\w+", row["labels"])))
        for heading in HEADINGS
        for rows in tables(PAGE, heading)
        for row in rows
    }
    async with AsyncExitStack() as stack:
        it = await stack.enter_async_context(mill(redis_url, tmp_path))
        job = await it.producer.submit("one", model="priced")
        await job.result()
        settings = it.settings.model_copy(update={"metrics_port": 0})
        gateway = await stack.enter_async_context(running_gateway(settings))
        with measured(gateway.service, settings) as port:
            assert port is not None

            async def looked() -> bool:
                return (await scrape(port)).value("fleet_workers") == 1

            await wait_until(looked, "the gateway has looked at the fleet")
            shown = [await scrape(it.port), await scrape(port)]
    found: dict[str, str] = {}
    labels: dict[str, set[str]] = {}
    for figures in shown:
        for family in figures.families.values():
            if family.name.startswith("promptmill_"):
                name = family.name + ("_total" if family.type == "counter" else "")
                found[name] = family.type
                for sample in family.samples:
                    labels.setdefault(name, set()).update(sample.labels.keys() - {"le"})
    assert found == {name: kind for name, (kind, _) in listed.items()}
    assert {n: found_labels for n, found_labels in labels.items() if found_labels != set(listed[n][1])} == {}


async def test_what_cannot_be_looked_at_ends_no_gateway(redis_url: str, store: Store) -> None:
    """A worker of another version says something of itself that this one cannot read."""
    settings = Settings(redis_url=redis_url, metrics_port=0)
    await store.wire.call("HSET", keys.SERVERS, "relay@elsewhere", "not JSON")
    await store.wire.call("EXPIRE", keys.SERVERS, 60)
    async with running_gateway(settings) as gateway:
        with measured(gateway.service, settings) as port:
            assert port is not None
            assert (await scrape(port)).value("fleet_workers") == 0
            await store.wire.call("HDEL", keys.SERVERS, "relay@elsewhere")

            async def looked() -> bool:
                return "promptmill_fleet_age_seconds" in (await scrape(port)).text

            await wait_until(looked, "it looks again")
        assert not any(task.done() for task in gateway.service.background)
