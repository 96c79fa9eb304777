"""What monitors of Celery hear of a worker's jobs: only while they ask, and what really happened."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from promptmill.errors import StoreUnavailable
from promptmill.store import Record
from promptmill_workers.counts import Counts
from promptmill_workers.task_events import TaskEvents
from tests.support.processes import block_until, wait_until

WORKER = "w@host-1-ab"


class Broker:
    """Takes what a worker publishes."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, dict[str, Any]]] = []
        self.fails = 0
        self.events = SimpleNamespace(Dispatcher=self._dispatcher)

    @contextmanager
    def connection_for_write(self) -> Any:
        yield SimpleNamespace(ensure_connection=lambda **_: None)

    def _dispatcher(self, connection: Any, **options: Any) -> Any:
        assert options["hostname"] == WORKER
        return SimpleNamespace(send=self._send, flush=lambda: None)

    def _send(self, kind: str, **fields: Any) -> None:
        if self.fails:
            self.fails -= 1
            raise OSError("away")
        self.heard.append((kind, fields))

    def of(self, job_id: str) -> list[str]:
        return [kind for kind, fields in self.heard if fields.get("uuid") == job_id]


class Jobs:
    """A store that knows some jobs."""

    def __init__(self) -> None:
        self.states: dict[str, str | None] = {}

    async def find(self, job_id: str) -> Record | None:
        state = self.states[job_id]
        if state == "away":
            raise StoreUnavailable("away")
        return None if state is None else record(job_id, state)


def record(job_id: str, state: str = "running", worker: str = WORKER) -> Record:
    head = {"user": "ann", "model": "sonnet", "role": None, "priority": "batch", "queue": "promptmill.api.batch"}
    st = {"state": state, "queued": 1_000_000, "worker": "other" if state == "queued" else worker}
    return Record(job_id, [orjson.dumps(head), orjson.dumps(st), None, None, None])


@pytest.fixture
def broker() -> Broker:
    return Broker()


@pytest.fixture
def jobs() -> Jobs:
    return Jobs()


@pytest.fixture
def events(broker: Broker, jobs: Jobs) -> Any:
    made = TaskEvents(broker, jobs, WORKER, 0.05, lambda: (3, 40))  # pyright: ignore[reportArgumentType]
    yield made
    made.stop()


def test_without_a_listener_nothing_is_sent_and_nothing_runs(events: TaskEvents, broker: Broker) -> None:
    threads = set(threading.enumerate())  # others than ours may end meanwhile
    events.began(record("A"))
    events.ended("A", "succeeded", {"model": "sonnet"})
    assert set(threading.enumerate()) <= threads
    events.asked()
    block_until(lambda: broker.heard, "it says that it is there")
    assert broker.of("A") == []


def test_a_job_is_told_from_its_claim_to_its_end(events: TaskEvents, broker: Broker) -> None:
    events.asked()
    counts = Counts()
    counts.listener = events
    counts.began(record("A"))
    counts.ended("A", "succeeded", {"model": "sonnet", "text": "the answer"})
    counts.began(record("B"))
    counts.ended("B", "failed", {"error": {"code": "cut", "message": "said the provider"}})
    counts.began(record("C"))
    counts.put_back("C")
    block_until(lambda: len(broker.of("C")) == 4, "all is told")
    way = ["task-sent", "task-received", "task-started"]
    assert broker.of("A") == [*way, "task-succeeded"]
    assert broker.of("B") == [*way, "task-failed"]
    assert broker.of("C") == [*way, "task-retried"]
    told = {kind: fields for kind, fields in broker.heard if fields.get("uuid") == "A"}
    assert told["task-sent"]["timestamp"] == 1000.0
    assert told["task-received"]["kwargs"] == "{'model': 'sonnet', 'priority': 'batch'}"
    assert told["task-succeeded"]["result"] == "sonnet"
    assert told["task-succeeded"]["runtime"] >= 0
    text = repr(broker.heard)
    assert "the answer" not in text
    assert "said the provider" not in text
    assert "'exception': 'cut'" in text


def test_the_worker_itself_is_told_of_and_its_end(events: TaskEvents, broker: Broker) -> None:
    events.asked()
    block_until(lambda: [k for k, _ in broker.heard].count("worker-heartbeat") > 2, "it beats")
    events.stop()
    # It is waited for a second at most, which a busy machine may take for less than that.
    block_until(lambda: broker.heard[-1][0] == "worker-offline", "its end is told")
    assert broker.heard[0][0] == "worker-online"
    assert broker.heard[0][1]["active"] == 3
    assert broker.heard[0][1]["processed"] == 40
    # Once it ends, nobody can have it begin again.
    events.asked()
    assert not events.wanted


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ("cancelled", {"terminated": True, "expired": False}),
        ("expired", {"terminated": False, "expired": True}),
        ("queued", {"exception": "requeued"}),
        ("running", None),
        ("succeeded", None),
        (None, None),
        ("away", None),
    ],
)
async def test_what_became_of_a_job_that_was_taken_away_is_looked_up(
    events: TaskEvents, broker: Broker, jobs: Jobs, state: str | None, told: dict[str, Any] | None
) -> None:
    events.asked()
    events.began(record("A"))
    jobs.states = {"A": state, "last": "cancelled"}
    events.stopped("A")
    events.passed_over("last")
    await wait_until(lambda: "task-revoked" in broker.of("last"), "the last is told of")
    assert broker.of("last") == ["task-received", "task-revoked"]
    # Behind its three of the claim; heartbeats may stand anywhere between them.
    found = [fields for _, fields in broker.heard if fields.get("uuid") == "A"][3:]
    assert len(found) == (told is not None)
    if told is not None:
        assert told.items() <= found[0].items()


async def test_a_message_of_a_job_that_runs_elsewhere_says_nothing(
    events: TaskEvents, broker: Broker, jobs: Jobs
) -> None:
    events.asked()
    jobs.states = {"A": "queued", "last": "cancelled"}
    events.passed_over("A")
    events.passed_over("last")
    await wait_until(lambda: "task-revoked" in broker.of("last"), "the last is told of")
    assert broker.of("A") == []


def test_a_broker_that_fails_is_tried_again(
    events: TaskEvents, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("promptmill_workers.task_events._PAUSE_S", 0.01)
    broker.fails = 3
    events.asked()
    block_until(lambda: broker.heard, "it says that it is there")
    events.began(record("A"))
    block_until(lambda: broker.of("A"), "jobs are told of again")


def test_who_listens_no_more_is_not_sent_to(events: TaskEvents, broker: Broker) -> None:
    events.asked()
    block_until(lambda: broker.heard, "it says that it is there")
    events.refused()
    events.began(record("A"))
    events.asked()

    def told() -> bool:
        # Again: who asks while the thread ends for lack of a listener misses what is told just then.
        events.began(record("B"))
        return bool(broker.of("B"))

    block_until(told, "who asks again is told")
    assert broker.of("A") == []
