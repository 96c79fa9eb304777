"""A role's job succeeds on its backup, whatever way its primary fails; a chosen model's failure surfaces."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from promptmill import AsyncProducer, JobFailed
from promptmill.contract import Done, Error, Progress, Restart
from tests.support.processes import PATIENCE_S
from tests.support.simulator import Plan, Simulator
from tests.support.streams import collect, phases, text_of
from tests.support.worker import WorkerProcess, worker_process

QUICK = "heartbeat_s = 1\nmax_attempts = 2\n"
"""What waits in the queue is looked at each second; a family whose workers are silent for four has none."""
ANSWER = "the backup says it all"


@pytest.fixture
async def sim() -> AsyncIterator[Simulator]:
    async with Simulator() as simulator:
        simulator.default = Plan(text=ANSWER)
        yield simulator


PATIENCE = {"silent": "first_token_s = 1.5", "stalls": "idle_s = 1.5"}
"""Of the models that are to be given up; the others may take as long as a busy machine makes them."""


def config(sim: Simulator, **faults: str) -> str:
    """A role for each fault, whose primary has it and whose backup answers."""
    text = QUICK
    for name, fault in {**faults, "good": "tokens=5"}.items():
        model = f"sim:{fault}" if name != "good" else "plain"
        text += f'[models.{name}]\ntype = "local_openai"\napi_url = "{sim.url}/v1"\nmodel_name = "{model}"\n'
        text += f"timeouts = {{ {PATIENCE[name]} }}\n" if name in PATIENCE else ""
    for name in faults:
        text += f'[roles.{name}]\nprimary = "{name}"\nbackup_1 = "good"\n'
    return text


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


async def test_a_roles_job_succeeds_on_its_backup_whatever_way_its_primary_fails(
    write_config, sim: Simulator, tmp_path: Path
) -> None:
    path, settings = write_config(config(sim, **{name: row[0] for name, row in FAULTS.items()}))
    with worker_process(path) as worker:
        async with AsyncProducer(settings) as producer:
            await worker.ready(settings.store_url)
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


async def test_a_chosen_model_and_a_bad_request_do_not_fall_back(write_config, sim: Simulator) -> None:
    path, settings = write_config(config(sim, busy="tokens=5,fault=529", wrong="tokens=5,fault=400"))
    with worker_process(path) as worker:
        async with AsyncProducer(settings) as producer:
            await worker.ready(settings.store_url)
            for asked, code in (
                ({"model": "busy"}, "overloaded"),
                ({"role": "busy", "slot": "primary"}, "overloaded"),
                ({"role": "wrong"}, "bad_request"),
            ):
                job = await producer.submit("hello", **asked)
                with pytest.raises(JobFailed) as failed:
                    await job.result(PATIENCE_S)
                assert failed.value.code == code
                assert {a.model for a in (await job.get()).attempts} == {asked.get("model") or asked["role"]}


async def test_a_slot_that_is_not_configured_is_routed_automatically_and_says_so(write_config, sim: Simulator) -> None:
    path, settings = write_config(config(sim, busy="tokens=5,fault=529"))
    with worker_process(path) as worker:
        async with AsyncProducer(settings) as producer:
            await worker.ready(settings.store_url)
            job = await producer.submit("hello", role="busy", slot="backup_7")
            events = await collect(producer, job.id)
            assert isinstance(events[-1], Done)
            note = next(e for e in events if isinstance(e, Progress) and e.phase == "routing")
            assert "no slot backup_7" in (note.message or "")


async def test_a_fallback_into_another_family_goes_on_with_its_workers(write_config, sim: Simulator) -> None:
    text = config(sim, busy="tokens=5,fault=529") + (
        f'[models.apart]\ntype = "local_openai"\napi_url = "{sim.url}/v1"\nmodel_name = "plain"\nfamily = "apart"\n'
        '[roles.across]\nprimary = "busy"\nbackup_1 = "apart"\n'
    )
    path, settings = write_config(text)

    async def ready(worker: WorkerProcess) -> None:
        await worker.ready(settings.store_url)

    with worker_process(path) as here, worker_process(path, "apart", "apart") as there:
        async with AsyncProducer(settings) as producer:
            await ready(here)
            await ready(there)
            job = await producer.submit("hello", role="across")
            events = await collect(producer, job.id)
            end = events[-1]
            assert isinstance(end, Done), end
            assert text_of(events) == end.text == ANSWER
            done = await job.get()
            assert done.model == "apart"
            # Once or twice: what an earlier test let the fleet learn of the model may hold.
            *failed, last = [(a.attempt, a.model, a.outcome) for a in done.attempts]
            assert failed in ([(1, "busy", "overloaded")], [(1, "busy", "overloaded"), (2, "busy", "overloaded")])
            assert last == (len(failed) + 1, "apart", "succeeded")
            assert phases(events).count("started") == 2
            assert "requeued" in phases(events)


async def test_what_was_tried_before_a_wait_counts_and_its_error_surfaces(write_config, sim: Simulator) -> None:
    # A wait of over a second is waited in the queue: the attempts of both claims are the model's attempts.
    path, settings = write_config(config(sim, waits="tokens=5,fault=429,retry_after=2"))
    with worker_process(path) as worker:
        async with AsyncProducer(settings) as producer:
            await worker.ready(settings.store_url)
            job = await producer.submit("hello", model="waits")
            events = await collect(producer, job.id)
            assert isinstance(events[-1], Error)
            assert events[-1].code == "rate_limited"
            done = await job.get()
            assert [(a.attempt, a.outcome) for a in done.attempts] == [(1, "rate_limited"), (2, "rate_limited")]
            assert "waiting" in phases(events)


async def test_the_time_that_a_job_ran_is_not_time_in_the_queue(write_config, sim: Simulator) -> None:
    text = config(sim, silent="tokens=5,fault=hang") + (
        f'[models.paced]\ntype = "local_openai"\napi_url = "{sim.url}/v1"\nmodel_name = "plain"\n'
        "limits = { requests_per_minute = 30 }\n"
        '[roles.late]\nprimary = "silent"\nbackup_1 = "paced"\n'
    )
    path, settings = write_config(text)
    with worker_process(path) as worker:
        async with AsyncProducer(settings) as producer:
            await worker.ready(settings.store_url)
            # The primary takes 1.5 s to fail; the backup has a place every 2 s: the third waits 4 s after that.
            asked = {"role": "late", "timeouts": {"queue_s": 30}}
            jobs = [await producer.submit("hello", **asked) for _ in range(3)]
            for job in jobs:
                assert (await job.result(PATIENCE_S)).text == ANSWER


async def test_a_users_own_short_patience_makes_no_model_sick(write_config, sim: Simulator) -> None:
    text = config(sim) + (
        f'[models.steady]\ntype = "local_openai"\napi_url = "{sim.url}/v1"\nmodel_name = "sim:tokens=3,first=0.5"\n'
    )
    path, settings = write_config(text)
    with worker_process(path) as worker:
        async with AsyncProducer(settings) as producer:
            await worker.ready(settings.store_url)
            hasty = [
                await producer.submit("x", model="steady", timeouts={"first_token_s": 0.01}, user="mallory")
                for _ in range(12)
            ]
            for job in hasty:
                with pytest.raises(JobFailed) as failed:
                    await job.result(PATIENCE_S)
                assert failed.value.code == "timeout_first_token"
            job = await producer.submit("x", model="steady", user="alice")
            events = await collect(producer, job.id)
            assert isinstance(events[-1], Done)
            assert "waiting" not in phases(events)


async def test_a_backup_whose_family_has_no_worker_is_passed_over(write_config, sim: Simulator) -> None:
    text = config(sim, broken="tokens=5,fault=401") + (
        f'[models.nowhere]\ntype = "local_openai"\napi_url = "{sim.url}/v1"\nmodel_name = "plain"\nfamily = "nowhere"\n'
        '[roles.over]\nprimary = "broken"\nbackup_1 = "nowhere"\nbackup_2 = "good"\n'
    )
    path, settings = write_config(text)
    with worker_process(path) as worker:
        async with AsyncProducer(settings) as producer:
            await worker.ready(settings.store_url)
            done = await (await producer.submit("hello", role="over")).result(PATIENCE_S)
            assert (done.model, done.text) == ("good", ANSWER)
            assert [(a.attempt, a.model, a.outcome) for a in done.attempts] == [
                (1, "broken", "auth"),
                (2, "good", "succeeded"),
            ]
