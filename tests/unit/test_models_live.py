"""The live registry without a store: what lies over what, what looks like a key, and backends that are replaced."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptmill.client.routes import Routes
from promptmill.contract import JobRequest
from promptmill.errors import BackendError, BadRequest, StoreUnavailable
from promptmill.live.entries import read_entries
from promptmill.live.keylike import find_key, looks_like_key
from promptmill.registry import Registry
from promptmill.routing import Route
from promptmill.settings import ModelConfig, Settings
from promptmill.store import Store
from promptmill_workers import models as worker_models
from promptmill_workers.models import Backends

ECHO = ModelConfig(type="echo")


def stored(version: int = 9, **entries: Any) -> dict[bytes, bytes]:
    """Fields as they stand in Redis; ``model__a`` is ``model:a``."""
    fields = {name.replace("__", ":").encode(): orjson.dumps(value) for name, value in entries.items()}
    return {b"version": str(version).encode(), **fields}


def model(added: int, **config: Any) -> dict[str, Any]:
    return {"config": {"type": "echo", **config}, "added": added}


# -- what lies over what ------------------------------------------------------------------------------------------


BASE = Registry(
    {"echo": ECHO, "b": ECHO, "a": ECHO},
    {"chat": {"primary": "a"}, "sum": {"primary": "b"}},
    {"eva": {"chat": {"primary": "b"}, "sum": {"primary": "a"}}},
    "a",
)


def test_live_models_keep_the_files_places_and_new_ones_follow_in_the_order_in_which_they_came() -> None:
    entries = read_entries(
        stored(model__z=model(3), model__m=model(7), model__k=model(5), model__b=model(8, family="x"))
    )
    merged = entries.over(BASE)
    assert list(merged.models) == ["echo", "b", "a", "z", "k", "m"]
    assert merged.models["b"].family == "x"
    assert merged.version == 9


def test_the_live_part_wins_by_name_and_leaves_the_rest_of_the_file() -> None:
    entries = read_entries(
        stored(
            role__chat={"primary": "b"}, role__new={"primary": "a"}, user__eva={"chat": {"backup_1": "a"}}, default="b"
        )
    )
    merged = entries.over(BASE)
    assert merged.roles == {"chat": {"primary": "b"}, "sum": {"primary": "b"}, "new": {"primary": "a"}}
    assert merged.users == {"eva": {"chat": {"backup_1": "a"}, "sum": {"primary": "a"}}}
    assert merged.default_model == "b"


def test_a_default_that_is_gone_gives_way_to_the_files_and_that_to_none() -> None:
    gone = read_entries(stored(default="gone"))
    assert gone.over(BASE).default_model == "a"
    hidden = read_entries(stored(default="gone", model__a={"hidden": True}))
    assert hidden.over(BASE).default_model is None
    assert "a" not in hidden.over(BASE).models


@given(
    st.dictionaries(
        st.binary(max_size=20) | st.sampled_from([b"model:a", b"role:x", b"user:u", b"default", b"version"]),
        st.binary(max_size=40) | st.sampled_from([b"null", b"[]", b"{}", b'{"config": 1}', b'{"a": {}}']),
        max_size=6,
    )
)
def test_nothing_that_stands_in_redis_keeps_a_reader_from_the_rest(raw: Mapping[bytes, bytes]) -> None:
    good = {b"model:good": orjson.dumps(model(1))}
    entries = read_entries({**raw, **good})
    merged = entries.over(BASE)
    assert merged.models["good"] == ECHO
    assert "echo" in merged.models
    assert set(entries.models) - {"good"} <= {"a"}


# -- keys ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "sk-ant-api03-AbCdEf0123456789",
        "sk-proj-0123456789abcdef",
        "gsk_0123456789abcdefABCD",
        "AIzaSyA0123456789abcdefghijklmnopqrstu",
        "Authorization: Bearer abcdef123456",
        "0123456789abcdef0123456789abcdef",
        "https://user:password@example.org/v1",
        "http://example.org/v1?key=AIzaSyA0123456789abcdefghijklmnopqrstu",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.abc",
        "aB3dE5fG7hI9jK1lM3nO5pQ7rS9tU1vW",
    ],
)
def test_a_key_is_known_by_its_form(text: str) -> None:
    assert looks_like_key(text)
    assert find_key({"options": {"a": [text]}}, "m") == "m.options.a.0"


@pytest.mark.parametrize(
    "text",
    [
        "claude-sonnet-4-6-20260101",
        "Qwen/Qwen2.5-Coder-32B-Instruct-GPTQ-Int4",
        "meta-llama/Llama-3.3-70B-Instruct-Turbo",
        "hf.co/bartowski/Meta-Llama-3.1-8B-Instruct-GGUF:Q4_K_M",
        "ANTHROPIC_API_KEY_EU_2026",
        "KEY_FOR_TEAM_12_PRODUCTION",
        "/run/secrets/anthropic-key-2026",
        "http://127.0.0.1:11434/v1",
        "a task-oriented text of risk-12-analysis-documents, please",
    ],
)
def test_what_models_variables_and_files_are_called_is_no_key(text: str) -> None:
    assert not looks_like_key(text)


def test_a_secret_is_known_by_its_name_but_not_where_a_reference_stands() -> None:
    assert find_key({"options": {"api_key": "short"}}, "m") == "m.options.api_key"
    assert find_key({"options": {"db_password": "short"}}, "m") == "m.options.db_password"
    assert find_key({"headers_env": {"Authorization": "VARIABLE"}, "token_file": "where"}, "m") is None
    assert find_key({"max_tokens": 5, "api_key_env": "VARIABLE", "api_key": ""}, "m") is None
    assert find_key({"sk-ant-api03-AbCdEf0123456789": 1}, "m") == "a name in m"


# -- what producers know ------------------------------------------------------------------------------------------


async def no_store() -> Store:
    raise StoreUnavailable("away")


async def test_without_a_store_a_wrong_request_is_told_first() -> None:
    routes = Routes(Settings(models={"m": ECHO}))
    with pytest.raises(BadRequest, match="configured: echo, m"):
        await routes.check([JobRequest.model_validate({"prompt": "x", "model": "nope"})], no_store)
    with pytest.raises(StoreUnavailable):
        await routes.check([JobRequest.model_validate({"prompt": "x", "model": "m"})], no_store)


def test_what_was_taken_away_after_the_check_is_left_to_the_workers() -> None:
    routes = Routes(Settings(models={"m": ModelConfig(type="echo", family="lab")}))
    request = JobRequest.model_validate({"prompt": "x", "model": "m"})
    assert routes.family(request) == "lab"
    routes.live.registry = Registry({"echo": ECHO})
    assert routes.family(request) == "api"
    assert routes.timeouts(request).total_s


# -- backends -----------------------------------------------------------------------------------------------------


class Fake:
    def __init__(self, name: str, config: ModelConfig) -> None:
        self.config = config
        self.closed = 0

    def complete(self, call: object) -> AsyncGenerator[Any, None]:
        raise NotImplementedError

    async def aclose(self) -> None:
        self.closed += 1
        if self.config.options.get("text") == "fails":
            raise OSError("no end")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Fake]:
    every: list[Fake] = []

    def make(name: str, config: ModelConfig) -> Fake:
        every.append(Fake(name, config))
        return every[-1]

    monkeypatch.setattr(worker_models, "make_backend", make)
    return every


def echo(text: str, **more: Any) -> ModelConfig:
    return ModelConfig(type="echo", options={"text": text}, **more)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_model_whose_configuration_changed_gets_a_new_backend_and_the_old_ends_behind_its_last_call(
    made: list[Fake],
) -> None:
    backends, old, new = Backends(), echo("old"), echo("new")
    await backends.use({"m": old, "other": echo("o"), "far": echo("f", family="far")}, "api")
    assert [fake.config.options["text"] for fake in made] == ["old", "o"]
    with backends.lend(Route("m", old)) as first:
        with backends.lend(Route("m", old)) as second:
            assert first is second is made[0]
            # The same in other words: the snapshot is new, this model is not.
            await backends.use({"m": new, "other": echo("o")}, "api")
            with backends.lend(Route("m", new)) as third:
                assert third is made[2]
            # A job that was decided before keeps its configuration, also for its next attempt.
            with backends.lend(Route("m", old)) as again:
                assert again is first
        await settle()
        assert [fake.closed for fake in made] == [0, 0, 0]
    await settle()
    assert [fake.closed for fake in made] == [1, 0, 0]
    with backends.lend(Route("other", echo("o"))) as other:
        assert other is made[1]
    await backends.aclose()
    assert [fake.closed for fake in made] == [1, 1, 1]


async def test_a_removed_models_backend_is_closed_and_one_of_a_late_job_is_closed_behind_it(made: list[Fake]) -> None:
    backends, config = Backends(), echo("x")
    await backends.use({"m": config}, "api")
    await backends.use({}, "api")
    await settle()
    assert [fake.closed for fake in made] == [1]
    with backends.lend(Route("m", config)) as late:
        assert late is made[1]
    await settle()
    assert [fake.closed for fake in made] == [1, 1]
    await backends.aclose()
    assert [fake.closed for fake in made] == [1, 1]


async def test_a_backend_that_does_not_close_is_logged_and_stops_nothing(
    made: list[Fake], caplog: pytest.LogCaptureFixture
) -> None:
    backends = Backends()
    await backends.use({"m": echo("fails")}, "api")
    with caplog.at_level(logging.ERROR):
        await backends.use({"m": echo("y")}, "api")
        await settle()
    assert "the former backend of model m did not close" in caplog.text
    with backends.lend(Route("m", echo("y"))) as backend:
        assert backend is made[1]
    await backends.aclose()


async def test_a_model_that_cannot_be_made_is_logged_and_its_job_is_told(caplog: pytest.LogCaptureFixture) -> None:
    backends = Backends()
    bad = ModelConfig(type="echo", options={"colour": "green"})
    with caplog.at_level(logging.ERROR):
        await backends.use({"bad": bad, "good": ECHO}, "api")
    assert "model 'bad'" in caplog.text
    with pytest.raises(BackendError, match="colour") as refused, backends.lend(Route("bad", bad)):
        pytest.fail("it was lent")
    assert refused.value.code == "bad_request"
    with backends.lend(Route("good", ECHO)) as good:
        assert good is not None
    await backends.aclose()
