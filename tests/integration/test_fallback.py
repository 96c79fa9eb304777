"""A role's job succeeds on its backup, whatever way its primary fails; a chosen model's failure surfaces."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator

import pytest

from promptmill import AsyncProducer, JobFailed
from promptmill.contract import Done, Error, Progress, Restart
from promptmill.settings import Settings, load_settings
from tests.support.processes import PATIENCE_S
from tests.support.simulator import Plan, running_simulator
from tests.support.store import StoreServer
from tests.support.streams import collect, phases, text_of
from tests.support.worker import worker_process

pytestmark = pytest.mark.xdist_group("fallback")

QUICK = "heartbeat_s = 1\nmax_attempts = 2\n"
"""What waits in the queue is looked at each second; a family whose workers are silent for four has none."""
ANSWER = "the backup says it all"


FAULTS = {
    "busy": ("tokens=20,fault=529", "overloaded", False),
    "limited": ("tokens=20,fault=429,retry_after=60", "rate_limited", False),
    "silent": ("tokens=20,fault=hang", "timeout_first_token", False),
    "stalls": ("tokens=20,fault=stall,after=3", "timeout_idle", True),
    "cuts": ("tokens=20,fault=cut,after=10", "cut", True),
    "garbles": ("tokens=20,fault=malformed,after=4", "malformed", True),
    "refuses": ("tokens=20,fault=refusal", "refused", False),
    "wordless": ("tokens=20,fault=empty", "empty", False),
    "full": ("tokens=20,fault=context", "context_too_long", False),
    "locked": ("tokens=20,fault=401", "auth", False),
}
"""What is wrong with the primary of a role of that name, its code, and whether tokens came before."""
# A model for each test: what the fleet learned of another test's would hold.
MODELS = {name: f"sim:{fault}" for name, (fault, _, _) in FAULTS.items()} | {
    "good": "plain",
    "chosen": "sim:tokens=5,fault=529",
    "wrong": "sim:tokens=5,fault=400",
    "slotted": "sim:tokens=5,fault=529",
    "near": "sim:tokens=5,fault=529",
    "far": "plain",
    "waits": "sim:tokens=5,fault=429,retry_after=2",
    "mute": "sim:tokens=5,fault=hang",
    "paced": "plain",
    "steady": "sim:tokens=3,first=0.5",
    "broken": "sim:tokens=5,fault=401",
    "nowhere": "plain",
}
MORE = {
    "silent": "timeouts = { first_token_s = 1.5 }",
    "stalls": "timeouts = { idle_s = 1.5 }",
    "mute": "timeouts = { first_token_s = 1.5 }",
    "far": 'family = "apart"',
    "nowhere": 'family = "nowhere"',
    "paced": "limits = { requests_per_minute = 30 }",
}
"""Of the models that are to be given up, bounds; the others may take as long as a busy machine makes them."""
ROLES = {name: (name, "good") for name in (*FAULTS, "chosen", "wrong", "slotted")} | {
    "across": ("near", "far"),
    "late": ("mute", "paced"),
    "over": ("broken", "nowhere", "good"),
}


def config(redis_url: str, provider_url: str) -> str:
    text = f'redis_url = "{redis_url}"\n' + QUICK
    for name, model in MODELS.items():
        text += f'[models.{name}]\ntype = "local_openai"\napi_url = "{provider_url}/v1"\nmodel_name = "{model}"\n'
        text += MORE.get(name, "") + "\n"
    for role, (primary, *backups) in ROLES.items():
        text += f'[roles.{role}]\nprimary = "{primary}"\n'
        text += "".join(f'backup_{n} = "{backup}"\n' for n, backup in enumerate(backups, 1))
    return text


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, store_server: StoreServer) -> Generator[Settings]:
    """A worker and one of another family, which all tests leave as they are."""
    path = tmp_path_factory.mktemp("fallback") / "promptmill.toml"
    with running_simulator(default=Plan(text=ANSWER)) as provider:
        path.write_text(config(store_server.url, provider.url))
        with worker_process(path) as here, worker_process(path, "apart", "apart") as there:
            for worker in (here, there):
                asyncio.run(worker.ready(store_server.url))
            yield load_settings(path)


@pytest.fixture
async def producer(fleet: Settings) -> AsyncGenerator[AsyncProducer]:
    async with AsyncProducer(fleet) as made:
        yield made


async def test_a_roles_job_succeeds_on_its_backup_whatever_way_its_primary_fails(producer: AsyncProducer) -> None:
    jobs = {name: await producer.submit("hello", role=name) for name in FAULTS}
    for name, (_, code, void) in FAULTS.items():
        events = await collect(producer, jobs[name].id)
        end = events[-1]
        assert isinstance(end, Done), f"{name}: {end}"
        done = await jobs[name].get()
        assert text_of(events) == end.text == done.text == ANSWER, name
        assert (done.model, done.backend, done.role) == ("good", "local_openai", name)
        assert [a.outcome for a in done.attempts][-1] == "succeeded"
        assert {a.outcome for a in done.attempts[:-1]} == {code}, name
        assert {a.model for a in done.attempts[:-1]} == {name}
        assert any(isinstance(e, Restart) for e in events) is void, name
        fallback = next(e for e in events if isinstance(e, Progress) and e.phase == "fallback")
        assert (fallback.model, fallback.backend) == ("good", "local_openai")
        assert code in (fallback.message or "")
        numbers = [a.attempt for a in done.attempts]
        assert numbers == list(range(1, len(numbers) + 1)), name


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ({"model": "chosen"}, "overloaded"),
        ({"role": "chosen", "slot": "primary"}, "overloaded"),
        ({"role": "wrong"}, "bad_request"),
    ],
)
async def test_a_chosen_model_and_a_bad_request_do_not_fall_back(
    producer: AsyncProducer, asked: dict[str, str], code: str
) -> None:
    job = await producer.submit("hello", **asked)
    with pytest.raises(JobFailed) as failed:
        await job.result(PATIENCE_S)
    assert failed.value.code == code
    assert {a.model for a in (await job.get()).attempts} == {asked.get("model") or asked["role"]}


async def test_a_slot_that_is_not_configured_is_routed_automatically_and_says_so(producer: AsyncProducer) -> None:
    job = await producer.submit("hello", role="slotted", slot="backup_7")
    events = await collect(producer, job.id)
    assert isinstance(events[-1], Done)
    note = next(e for e in events if isinstance(e, Progress) and e.phase == "routing")
    assert "no slot backup_7" in (note.message or "")


async def test_a_fallback_into_another_family_goes_on_with_its_workers(producer: AsyncProducer) -> None:
    job = await producer.submit("hello", role="across")
    events = await collect(producer, job.id)
    end = events[-1]
    assert isinstance(end, Done), end
    assert text_of(events) == end.text == ANSWER
    done = await job.get()
    assert done.model == "far"
    *failed, last = [(a.attempt, a.model, a.outcome) for a in done.attempts]
    assert failed == [(1, "near", "overloaded"), (2, "near", "overloaded")]
    assert last == (3, "far", "succeeded")
    assert phases(events).count("started") == 2
    assert "requeued" in phases(events)


async def test_what_was_tried_before_a_wait_counts_and_its_error_surfaces(producer: AsyncProducer) -> None:
    # A wait of over a second is waited in the queue: the attempts of both claims are the model's attempts.
    job = await producer.submit("hello", model="waits")
    events = await collect(producer, job.id)
    assert isinstance(events[-1], Error)
    assert events[-1].code == "rate_limited"
    done = await job.get()
    assert [(a.attempt, a.outcome) for a in done.attempts] == [(1, "rate_limited"), (2, "rate_limited")]
    assert "waiting" in phases(events)


async def test_the_time_that_a_job_ran_is_not_time_in_the_queue(producer: AsyncProducer) -> None:
    # The primary takes 1.5 s to fail; the backup has a place every 2 s: the third waits 4 s after that.
    asked = {"role": "late", "timeouts": {"queue_s": 30}}
    jobs = [await producer.submit("hello", **asked) for _ in range(3)]
    for job in jobs:
        assert (await job.result(PATIENCE_S)).text == ANSWER


async def test_a_users_own_short_patience_makes_no_model_sick(producer: AsyncProducer) -> None:
    hasty = [
        await producer.submit("x", model="steady", timeouts={"first_token_s": 0.01}, user="mallory") for _ in range(12)
    ]
    for job in hasty:
        with pytest.raises(JobFailed) as failed:
            await job.result(PATIENCE_S)
        assert failed.value.code == "timeout_first_token"
    job = await producer.submit("x", model="steady", user="alice")
    events = await collect(producer, job.id)
    assert isinstance(events[-1], Done)
    assert "waiting" not in phases(events)


async def test_a_backup_whose_family_has_no_worker_is_passed_over(producer: AsyncProducer) -> None:
    done = await (await producer.submit("hello", role="over")).result(PATIENCE_S)
    assert (done.model, done.text) == ("good", ANSWER)
    assert [(a.attempt, a.model, a.outcome) for a in done.attempts] == [
        (1, "broken", "auth"),
        (2, "good", "succeeded"),
    ]
