"""Which backend a configuration gives, and what is said when it cannot."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator
from importlib import metadata
from typing import Any

import pytest

from promptmill.errors import ConfigError, MissingExtra
from promptmill.settings import FAMILIES, ModelConfig
from promptmill_workers import backends
from promptmill_workers.backends import load_backend
from promptmill_workers.backends.base import Call, Finished, Item, TextDelta
from promptmill_workers.testing import call, collect, failure, text_of


class Parrot:
    def __init__(self, name: str, config: ModelConfig) -> None:
        self.name = name

    async def complete(self, asked: Call) -> AsyncGenerator[Item, None]:
        yield TextDelta(f"{self.name} {asked.job_id}")
        yield Finished("stop")

    async def aclose(self) -> None:
        return


@pytest.fixture
def entry_point(monkeypatch: pytest.MonkeyPatch) -> Any:
    def register(target: str) -> None:
        entries = metadata.EntryPoints([metadata.EntryPoint("parrot", target, "promptmill.backends")])
        monkeypatch.setattr(metadata, "entry_points", entries.select)

    return register


async def test_a_third_partys_backend_is_found_by_its_entry_point(entry_point: Any) -> None:
    entry_point(f"{__name__}:Parrot")
    backend = load_backend("polly", ModelConfig(type="parrot"))
    assert text_of(await collect(backend, call(job_id="7"))) == "polly 7"


def test_a_third_partys_missing_library_is_named(entry_point: Any) -> None:
    entry_point("no_such_distribution:Backend")
    with pytest.raises(MissingExtra, match="install no_such_distribution"):
        load_backend("polly", ModelConfig(type="parrot"))


@pytest.mark.parametrize(
    ("kind", "library"), [("local_openai", "httpx_aiohttp"), ("anthropic_api", "anthropic"), ("local_openai", "httpx")]
)
def test_a_missing_library_says_which_extra_to_install(
    monkeypatch: pytest.MonkeyPatch, kind: str, library: str
) -> None:
    for module in list(sys.modules):
        if module.startswith("promptmill_workers.backends."):
            monkeypatch.delitem(sys.modules, module)
            # `from package import module` finds the attribute before it looks for the module.
            monkeypatch.delattr(backends, module.removeprefix("promptmill_workers.backends."), raising=False)
    monkeypatch.setitem(sys.modules, library, None)
    config = ModelConfig(type=kind, model_name="m", api_url="http://127.0.0.1:1")
    with pytest.raises(MissingExtra, match=r'pip install "promptmill\[workers\]"'):
        load_backend("model", config)


def test_an_unknown_type_names_those_that_are_built_in() -> None:
    config = ModelConfig.model_construct(type="nonsense")
    with pytest.raises(ConfigError, match=", ".join(sorted(FAMILIES))):
        load_backend("model", config)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"type": "echo", "options": {"txt": "x"}}, "models.m.options.txt"),
        ({"type": "echo", "options": {"fault": "nonsense"}}, "models.m.options.fault"),
        ({"type": "echo", "options": {"tokens_per_s": -1}}, "models.m.options.tokens_per_s"),
        ({"type": "local_openai", "options": {"extra_body": {"stream": False}}}, "models.m.options.extra_body"),
        ({"type": "local_openai", "options": {"max_tokens_field": "x"}}, "models.m.options.max_tokens_field"),
        ({"type": "anthropic_api", "options": {"max_tokens": 0}}, "models.m.options.max_tokens"),
    ],
)
def test_a_wrong_option_is_named_with_its_key(config: dict[str, Any], key: str) -> None:
    made = ModelConfig(model_name="x", api_url="http://127.0.0.1:1", **config)
    with pytest.raises(ConfigError) as caught:
        load_backend("m", made)
    assert caught.value.field == key
    assert str(caught.value).startswith(key)


async def test_anthropics_own_address_takes_the_usual_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    backend = load_backend("sonnet", ModelConfig(type="anthropic_api", model_name="x"))
    _, error = await failure(backend, call())
    assert (error.code, "ANTHROPIC_API_KEY" in str(error)) == ("auth", True)
