"""Fixtures with real parts: a Valkey server for the run, stores, workers."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncGenerator, Generator
from pathlib import Path

import hypothesis
import pytest

from promptmill import AsyncProducer
from promptmill.settings import Settings, load_settings
from promptmill.store import Store
from tests.support.distribution import mark_groups
from tests.support.store import StoreServer, keys_without_ttl, running_store

# Hundreds of processes are started here. Where bytecode may not be kept, each of them compiles anew all that it
# imports, which takes three times as long as the rest of its start.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A busy machine holds a property's example up for longer than any deadline that would mean something.
hypothesis.settings.register_profile(
    "without-deadlines",
    parent=hypothesis.settings.get_profile(hypothesis.settings.get_current_profile_name()),
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("without-deadlines")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Behind pytest-xdist's own hook."""
    mark_groups(config, items)


@pytest.fixture(scope="session", autouse=True)
def clean_environment() -> None:
    """No test sees the configuration of whoever runs it."""
    for name in [n for n in os.environ if n.startswith("PROMPTMILL_")]:
        del os.environ[name]


@pytest.fixture(scope="session")
def store_server(tmp_path_factory: pytest.TempPathFactory) -> Generator[StoreServer]:
    """The run's Valkey; not to be killed: tests that do so start their own."""
    with running_store(tmp_path_factory.mktemp("store"), append_only=False) as server:
        yield server


@pytest.fixture
def redis_url(store_server: StoreServer) -> Generator[str]:
    """A database of the run's Valkey, empty: no worker of this test finds jobs that another test left.

    After the test every key of ours must have a time to live.
    """
    url = store_server.empty_database()
    yield url
    assert keys_without_ttl(url) == []


@pytest.fixture
def settings(redis_url: str) -> Settings:
    """Settings without any file."""
    return Settings(redis_url=redis_url)


@pytest.fixture
async def store(redis_url: str) -> AsyncGenerator[Store]:
    """A connected store with its scripts loaded."""
    connected = await Store.connect(redis_url)
    await connected.load_scripts()
    yield connected
    await connected.aclose()


@pytest.fixture
async def producer(settings: Settings) -> AsyncGenerator[AsyncProducer]:
    """A producer on the test's database."""
    async with AsyncProducer(settings) as made:
        yield made


@pytest.fixture
def write_config(tmp_path: Path, redis_url: str):
    """Write a promptmill.toml that names the test's database; answers its path and the settings read from it."""

    def write(text: str, name: str = "promptmill.toml", url: str = redis_url) -> tuple[Path, Settings]:
        path = tmp_path / name
        path.write_text(f'redis_url = "{url}"\n{text}')
        return path, load_settings(path)

    return write
