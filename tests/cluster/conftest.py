"""The fixtures of tests on a store, with a three-node cluster in the place of the single server."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from tests.support.cluster import RedisCluster, keys_without_ttl, running_cluster
from tests.support.store import StoreServer


@pytest.fixture(scope="session")
def redis_cluster(tmp_path_factory: pytest.TempPathFactory) -> Generator[RedisCluster]:
    """The run's cluster; not to be harmed: tests that do so start their own."""
    with running_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def redis_url(
    redis_cluster: RedisCluster, store_server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> Generator[str]:
    """The cluster, empty. Celery's broker is a database of the single server, for child processes, too.

    After the test every key of ours must have a time to live.
    """
    redis_cluster.flush()
    monkeypatch.setenv("PROMPTMILL_BROKER_URL", store_server.empty_database())
    yield redis_cluster.url
    assert keys_without_ttl(redis_cluster) == []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs on several stores runs here on the cluster alone."""
    items[:] = [item for item in items if "tests/cluster/" not in item.nodeid or "fakeredis" not in item.nodeid]
