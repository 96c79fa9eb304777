"""The live registry with a real store and real workers: changed while everything runs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import AsyncExitStack, aclosing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from promptmill import AsyncProducer, JobFailed, keys
from promptmill.contract import Token
from promptmill.errors import BadRequest, ConfigError
from promptmill.heartbeat import ready_workers
from promptmill.live import Editor, LiveRegistry
from promptmill.settings import Settings
from promptmill.store import Store
from tests.support.plugin import install_plugin
from tests.support.processes import PATIENCE_S, wait_until
from tests.support.worker import WorkerProcess, worker_process

QUICK = "heartbeat_s = 0.2\n"
"""How soon workers tell which version of the registry they go by."""
FILE = QUICK + '[models.filed]\ntype = "echo"\noptions = { text = "of the file" }\n[roles.chat]\nprimary = "filed"\n'

SLOW = """
import asyncio
from pathlib import Path
from promptmill_workers.backends.base import Finished, TextDelta

class Backend:
    def __init__(self, name, config):
        self.word = config.options["word"]
        self.closed = Path(config.options["closed"])
        self.go = Path(config.options["go"])
        self.open = True

    async def complete(self, call):
        yield TextDelta(self.word)
        while not self.go.exists():
            await asyncio.sleep(0.02)
        yield TextDelta(" and still " + self.word if self.open else " but closed")
        yield Finished("stop")

    async def aclose(self):
        self.open = False
        with self.closed.open("a") as out:
            out.write(self.word + "\\n")
"""


@pytest.fixture(autouse=True)
async def forgotten(store: Store) -> AsyncGenerator[None]:
    """Tests share a store: each begins without a live part."""
    await store.redis.delete(keys.REGISTRY, keys.REGISTRY_AUDIT)
    yield
    await store.redis.delete(keys.REGISTRY, keys.REGISTRY_AUDIT)


@pytest.fixture
def editor(store: Store, settings: Settings) -> Editor:
    return Editor(store, settings, "ops@here")


@contextmanager
def two_workers(path: Path, env: dict[str, str] | None = None) -> Generator[tuple[WorkerProcess, WorkerProcess]]:
    with worker_process(path, "one", env=env) as one, worker_process(path, "two", env=env) as two:
        yield one, two


async def heard(store: Store, count: int) -> None:
    """Until ``count`` ready workers go by the newest version."""

    async def all_of_them() -> bool:
        version = int(await store.redis.hget(keys.REGISTRY, "version"))
        return [b.registry for b in await ready_workers(store)].count(version) == count

    await wait_until(all_of_them, "all workers heard of the change")


async def answer(producer: AsyncProducer, **options: Any) -> str | None:
    return (await (await producer.submit("x", **options)).result(PATIENCE_S)).text


async def test_a_model_that_is_added_live_answers_on_two_running_workers(
    write_config, store: Store, editor: Editor
) -> None:
    path, settings = write_config(FILE)
    with two_workers(path) as (one, two):
        ids = [await one.ready(settings.store_url), await two.ready(settings.store_url)]
        async with AsyncProducer(settings) as producer:
            with pytest.raises(BadRequest, match="configured: echo, filed"):
                await producer.submit("x", model="late")
            change = await editor.add_model("late", {"type": "echo", "options": {"text": "live"}})
            assert change.changed
            # At once, before any heartbeat: a worker that does not know it looks before it fails the job.
            async with AsyncProducer(settings) as fresh:
                assert await answer(fresh, model="late") == "live"
            await heard(store, 2)
            texts = await asyncio.gather(*(answer(producer, model="late") for _ in range(20)))
            assert texts == ["live"] * 20
            assert sorted(b.worker for b in await ready_workers(store) if b.registry == change.version) == sorted(ids)
            assert one.process.poll() is two.process.poll() is None
            # A name that nobody knows is still refused, and fails where only a worker could tell.
            async with AsyncProducer(settings.model_copy(update={"models": {}, "roles": {}})) as unknowing:
                with pytest.raises(JobFailed, match="configured: echo, filed, late") as failed:
                    await answer(unknowing, model="nobody")
                assert failed.value.code == "unknown_model"


async def test_a_running_call_ends_on_the_old_options_and_new_calls_use_the_new_ones(
    write_config, store: Store, editor: Editor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    install_plugin(site, "slowly", SLOW)
    monkeypatch.syspath_prepend(str(site))
    closed, go = tmp_path / "closed", tmp_path / "go"

    def config(word: str) -> dict[str, Any]:
        return {"type": "slowly", "options": {"word": word, "closed": str(closed), "go": str(go)}}

    path, settings = write_config(QUICK)
    await editor.add_model("m", config("old"))
    with worker_process(path, env={"PYTHONPATH": str(site)}) as worker:
        await worker.ready(settings.store_url)
        async with AsyncProducer(settings) as producer:
            running = await producer.submit("x", model="m")
            async with aclosing(running.events()) as events:
                async for event in events:
                    if isinstance(event, Token):
                        break
            await editor.add_model("m", config("new"), replace=True)
            await heard(store, 1)
            later = await producer.submit("x", model="m")
            async with aclosing(later.events()) as events:
                first = next(iter([e.text async for e in _tokens(events)]))
            assert first == "new"
            assert not closed.exists(), "a backend was closed under a call"
            go.touch()
            assert (await running.result(PATIENCE_S)).text == "old and still old"
            assert (await later.result(PATIENCE_S)).text == "new and still new"
            await wait_until(lambda: closed.exists() and closed.read_text() == "old\n", "the old backend is closed")


async def test_a_plug_in_that_cannot_be_made_ends_its_own_jobs_and_no_worker(
    write_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    install_plugin(site, "unmade", "class Backend:\n    def __init__(self):\n        pass\n")
    monkeypatch.syspath_prepend(str(site))
    path, settings = write_config('[models.unmade]\ntype = "unmade"\n')
    with worker_process(path, env={"PYTHONPATH": str(site)}) as worker:
        await worker.ready(settings.store_url)
        async with AsyncProducer(settings) as producer:
            with pytest.raises(JobFailed, match="cannot be made: TypeError") as failed:
                await answer(producer, model="unmade")
            assert failed.value.code == "crashed"
            assert await answer(producer, model="echo")
        assert worker.process.poll() is None


async def _tokens(events: AsyncGenerator[Any]) -> AsyncGenerator[Token]:
    """Up to the first."""
    async for event in events:
        if isinstance(event, Token):
            yield event
            return


async def test_who_answers_for_a_role_is_changed_live_for_everybody_and_for_one_user(
    write_config, store: Store
) -> None:
    path, settings = write_config(FILE)
    editor = Editor(store, settings, "ops@here")
    with two_workers(path) as (one, two):
        await one.ready(settings.store_url)
        await two.ready(settings.store_url)
        async with AsyncProducer(settings) as producer:
            assert await answer(producer, role="chat") == "of the file"
            await editor.add_model("b", {"type": "echo", "options": {"text": "b"}})
            await editor.set_role("chat", {"primary": "b", "backup_1": "filed"})
            await editor.set_role("chat", {"primary": "echo"}, user="eva")
            await editor.set_default("b")
            await heard(store, 2)
            assert {await answer(producer, role="chat") for _ in range(6)} == {"b"}
            assert await answer(producer, role="chat", user="eva") == "x"
            assert await answer(producer) == "b"
            # Its backup goes on where the primary is gone.
            await editor.remove_model("b", force=True)
            await heard(store, 2)
            assert {await answer(producer, role="chat") for _ in range(6)} == {"of the file"}
            await editor.unset_role("chat")
            await editor.unset_role("chat", user="eva")
            await heard(store, 2)
            assert await answer(producer, role="chat", user="eva") == "of the file"


async def test_a_removed_model_is_unknown_and_the_files_is_uncovered_hidden_and_restored(
    write_config, store: Store
) -> None:
    path, settings = write_config(FILE + '[models.second]\ntype = "echo"\noptions = { text = "second" }\n')
    editor = Editor(store, settings, "ops@here")
    with worker_process(path) as worker:
        await worker.ready(settings.store_url)

        async def refused(model: str) -> str:
            async with AsyncProducer(settings) as fresh:
                with pytest.raises(BadRequest) as error:
                    await fresh.submit("x", model=model)
            # And by the worker, for a producer that cannot tell.
            async with AsyncProducer(settings.model_copy(update={"models": {}, "roles": {}})) as unknowing:
                with pytest.raises(JobFailed) as failed:
                    await answer(unknowing, model=model)
            assert failed.value.code == error.value.code == "unknown_model"
            assert failed.value.message == error.value.message
            return error.value.message

        async def says(model: str) -> str | None:
            await heard(store, 1)
            async with AsyncProducer(settings) as fresh:
                return await answer(fresh, model=model)

        await editor.add_model("extra", {"type": "echo"})
        await heard(store, 1)
        await editor.remove_model("extra")
        await heard(store, 1)
        assert await refused("extra") == "there is no model 'extra'; configured: echo, filed, second"
        await editor.add_model("second", {"type": "echo", "options": {"text": "covered"}}, replace=True)
        assert await says("second") == "covered"
        await editor.remove_model("second")
        assert await says("second") == "second"
        await editor.remove_model("second")
        await heard(store, 1)
        assert await refused("second") == "there is no model 'second'; configured: echo, filed"
        with pytest.raises(BadRequest, match="removed already"):
            await editor.remove_model("second")
        await editor.restore_model("second")
        assert await says("second") == "second"


async def test_a_web_app_without_models_learns_the_live_ones_and_sends_to_their_family(
    write_config, store: Store, editor: Editor
) -> None:
    path, settings = write_config(QUICK)
    await editor.add_model("apart", {"type": "echo", "family": "lab"})
    with worker_process(path, "lab", "lab") as lab:
        await lab.ready(settings.store_url)
        # No API worker runs: only who knows the family reaches it.
        async with AsyncProducer(Settings(redis_url=settings.redis_url)) as producer:
            assert await answer(producer, model="apart") == "x"
            await editor.set_role("chat", {"primary": "apart"})
            await heard(store, 1)
            producer.live._read_at = None  # as after 2 s
            assert await answer(producer, role="chat") == "x"


async def test_a_family_that_no_model_has_is_no_worker_and_the_message_lists_the_live_ones(
    write_config, editor: Editor
) -> None:
    path, _ = write_config(QUICK)
    await editor.add_model("apart", {"type": "echo", "family": "lab"})
    with worker_process(path, "wrong", "nope") as wrong:
        assert await asyncio.to_thread(wrong.process.wait, PATIENCE_S) == 6
        assert "--family nope: no model belongs to it; there is: api, lab" in wrong.log.read_text()


async def test_writers_at_the_same_time_lose_no_update(store: Store, settings: Settings, redis_url: str) -> None:
    async with AsyncExitStack() as stack:
        editors: list[Editor] = []
        for number in range(4):
            own = await Store.connect(redis_url)
            stack.push_async_callback(own.aclose)
            editors.append(Editor(own, settings, f"writer-{number}@here"))
        names = [f"m{number}" for number in range(24)]
        work = [editors[i % 4].add_model(name, {"type": "echo"}) for i, name in enumerate(names)]
        work += [editors[i % 4].set_role(f"r{i}", {"primary": "echo"}, user="eva") for i in range(8)]
        changes = await asyncio.gather(*work)
        live = LiveRegistry(settings)
        await live.refresh(store)
        assert set(live.registry.models) == {"echo", *names}
        assert set(live.registry.users["eva"]) == {f"r{i}" for i in range(8)}
        versions = [change.version for change in changes]
        assert len(set(versions)) == len(versions)
        assert live.registry.version == max(versions)
        # Models keep the order in which they came, on every reader.
        by_version = sorted(zip(versions[:24], names, strict=True))
        assert list(live.registry.models)[1:] == [name for _, name in by_version]


async def test_each_change_says_who_made_it_what_was_and_what_is_and_tells_the_channel(
    store: Store, settings: Settings, redis_url: str
) -> None:
    redis = Redis.from_url(redis_url)
    async with redis, redis.pubsub() as channel:
        await channel.subscribe(keys.REGISTRY_CHANGES)
        first = await Editor(store, settings, "ann@one").add_model("m", {"type": "echo"})
        again = await Editor(store, settings, "ann@one").add_model("m", {"type": "echo"})
        assert (again.changed, again.version) == (False, first.version)
        second = await Editor(store, settings, "bob@two").add_model(
            "m", {"type": "echo", "options": {"text": "y"}}, replace=True
        )
        third = await Editor(store, settings, "bob@two").remove_model("m")
        told: list[int] = []
        async with asyncio.timeout(PATIENCE_S):
            async for message in channel.listen():
                if message["type"] == "message":
                    told.append(int(message["data"]))
                if len(told) == 3:
                    break
        assert told == [first.version, second.version, third.version]
    entries = await Editor(store, settings, "x").audit()
    assert [(e.who, e.action, e.name) for e in entries] == [
        ("bob@two", "remove", "m"),
        ("bob@two", "replace", "m"),
        ("ann@one", "add", "m"),
    ]
    assert [e.version for e in entries] == told[::-1]
    assert entries[1].before["config"] == {"type": "echo"}
    assert entries[1].after["config"] == {"type": "echo", "options": {"text": "y"}}
    assert entries[0].after is entries[2].before is None
    assert all(abs(e.at_ms - e.version) < 1000 for e in entries)


async def test_the_audit_keeps_the_last_thousand_and_every_key_has_a_year(store: Store, editor: Editor) -> None:
    await store.ask([("XADD", keys.REGISTRY_AUDIT, "*", "who", "filler")] * (keys.REGISTRY_AUDIT_LENGTH + 10))
    await editor.add_model("m", {"type": "echo"})
    assert await store.redis.xlen(keys.REGISTRY_AUDIT) == keys.REGISTRY_AUDIT_LENGTH
    year = int(keys.REGISTRY_TTL.total_seconds())
    held = (keys.REGISTRY, keys.REGISTRY_AUDIT)
    assert [year - 60 < await store.redis.ttl(key) <= year for key in held] == [True, True]
    for key in held:
        await store.redis.expire(key, 100)
    live = LiveRegistry(Settings())
    await live.refresh(store)
    assert [await store.redis.ttl(key) <= 100 for key in held] == [True, True], "only workers renew"
    await live.refresh(store, renew=True)
    assert [await store.redis.ttl(key) > year - 60 for key in held] == [True, True]
    await store.redis.expire(keys.REGISTRY, 100)
    await live.refresh(store, renew=True)
    assert await store.redis.ttl(keys.REGISTRY) <= 100, "at most once an hour"


async def test_an_entry_of_a_newer_version_is_left_out_with_a_warning_and_the_rest_works(
    write_config, store: Store, editor: Editor
) -> None:
    path, settings = write_config(FILE)
    with worker_process(path) as worker:
        await worker.ready(settings.store_url)
        await editor.add_model("good", {"type": "echo", "options": {"text": "good"}})
        newer = {"config": {"type": "echo", "colour": "green"}, "added": 7}
        version = int(await store.redis.hget(keys.REGISTRY, "version")) + 1
        await store.redis.hset(
            keys.REGISTRY,
            mapping={
                "model:newer": json.dumps(newer),
                "model:torn": "{",
                "model:list": "[]",
                "role:odd": json.dumps({"third": "good"}),
                "user:eva": json.dumps({"chat": 7}),
                "shelf:x": "1",
                "default": "7",
                "version": version,
            },
        )
        await heard(store, 1)
        async with AsyncProducer(settings) as producer:
            assert await answer(producer, model="good") == "good"
            assert await answer(producer, role="chat", user="eva") == "of the file"
            # This producer cannot tell what it is: the worker may be newer. This one is not.
            with pytest.raises(JobFailed) as failed:
                await answer(producer, model="newer")
            assert failed.value.code == "unknown_model"
            with pytest.raises(BadRequest):
                await producer.submit("x", model="unheard-of")
            problems = producer.live.entries.problems
        assert set(problems) == {
            "model:newer",
            "model:torn",
            "model:list",
            "role:odd",
            "user:eva",
            "shelf:x",
            "default",
        }
        assert problems["model:newer"] == "colour: no such setting"
        log = worker.log.read_text()
        assert "entry model:newer is left out: colour: no such setting" in log
        assert log.count("entry model:newer is left out") == 1
        # It can be covered, and taken away.
        with pytest.raises(BadRequest, match="--replace"):
            await editor.add_model("newer", {"type": "echo"})
        await editor.add_model("newer", {"type": "echo", "options": {"text": "mine"}}, replace=True)
        await editor.unset_role("odd")
        await heard(store, 1)
        async with AsyncProducer(settings) as producer:
            assert await answer(producer, model="newer") == "mine"


async def test_a_registry_that_redis_lost_uncovers_the_files(write_config, store: Store) -> None:
    _, settings = write_config(FILE)
    editor = Editor(store, settings, "ops@here")
    live = LiveRegistry(settings)
    await editor.add_model("filed", {"type": "echo"}, replace=True)
    assert await live.refresh(store)
    before = live.registry.version
    await store.redis.delete(keys.REGISTRY)
    assert await live.refresh(store)
    assert live.registry == live.base

    async def later() -> bool:
        seconds, micros = await store.redis.time()
        return seconds * 1000 + micros // 1000 > before

    await wait_until(later, "the clock of Redis went on")
    # A version is never used twice, so nobody takes the new registry for the one that was lost.
    assert (await editor.add_model("other", {"type": "echo"})).version > before


async def test_workers_that_are_told_to_leave_the_live_part_out_do_so(write_config, store: Store) -> None:
    _, settings = write_config(FILE + "\n")
    await Editor(store, settings, "ops@here").add_model("late", {"type": "echo"})
    without = settings.model_copy(update={"live_registry": False})
    live = LiveRegistry(without)
    assert not await live.refresh(store)
    assert live.registry == live.base
    with pytest.raises(ConfigError, match="live_registry is false"):
        await Editor(store, without, "ops@here").add_model("later", {"type": "echo"})


REFUSED: list[tuple[str, Callable[[Editor], Any]]] = [
    ("option", lambda e: e.add_model("m", {"type": "echo", "options": {"api_key": "hunter2secret"}})),
    ("value", lambda e: e.add_model("m", {"type": "echo", "options": {"text": "sk-ant-api03-hunter2secret"}})),
    ("variable", lambda e: e.add_model("m", {"type": "echo", "api_key_env": "sk-ant-api03-hunter2secret"})),
    ("deep", lambda e: e.add_model("m", {"type": "echo", "options": {"a": [{"b": "Bearer hunter2secret"}]}})),
    (
        "url",
        lambda e: e.add_model(
            "m", {"type": "local_openai", "model_name": "m", "api_url": "http://u:hunter2secret@127.0.0.1/v1"}
        ),
    ),
    ("name", lambda e: e.add_model("sk-ant-api03-hunter2secret", {"type": "echo"})),
    ("role", lambda e: e.set_role("sk-ant-api03-hunter2secret", {"primary": "echo"})),
    ("user", lambda e: e.set_role("chat", {"primary": "echo"}, user="sk-ant-api03-hunter2secret")),
]


@pytest.mark.parametrize(("where", "act"), REFUSED, ids=[where for where, _ in REFUSED])
async def test_what_looks_like_a_key_is_refused_and_nothing_of_it_is_stored_or_told(
    where: str, act: Callable[[Editor], Any], store: Store, editor: Editor
) -> None:
    with pytest.raises(BadRequest, match="looks like a key") as refused:
        await act(editor)
    assert "hunter2" not in refused.value.message
    assert "--api-key-env" in refused.value.message
    assert await store.redis.exists(keys.REGISTRY, keys.REGISTRY_AUDIT) == 0


async def test_a_model_with_a_key_by_reference_leaves_only_the_reference_in_redis(
    write_config, store: Store, editor: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIVE_TEST_KEY", "hunter2-the-key-itself")
    config = {
        "type": "local_openai",
        "model_name": "m",
        "api_url": "http://127.0.0.1:9/v1",
        "api_key_env": "LIVE_TEST_KEY",
        "options": {"headers_env": {"x-api-key": "LIVE_TEST_KEY"}},
    }
    await editor.add_model("m", config)
    live = LiveRegistry(Settings())
    await live.refresh(store)
    assert live.registry.models["m"].secret() == "hunter2-the-key-itself"
    stored = await store.redis.hgetall(keys.REGISTRY)
    audited = await store.redis.xrange(keys.REGISTRY_AUDIT)
    assert b"LIVE_TEST_KEY" in stored[b"model:m"]
    assert "hunter2" not in repr((stored, audited))
