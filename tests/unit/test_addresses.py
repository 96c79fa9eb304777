"""Addresses of one server, of a cluster and of Sentinels: what is read, what is refused, and what is never shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio.sentinel import SentinelConnectionPool

from promptmill.addresses import Address, kombu_address, kombu_tls, read_address, where
from promptmill.enqueue import make_app
from promptmill.errors import ConfigError
from promptmill.settings import Settings, load_settings
from promptmill.store.connection import open_redis

CLUSTER = "redis+cluster://ann:s3cr%40t@10.0.0.1:7000,[::1]:7001,node-3"
SENTINEL = "redis+sentinel://:s3cret@s1:26379,s2/mymaster/2?sentinel_password=w%2Fatch&ssl_ca_certs=/ca.pem"


def test_a_cluster_is_read() -> None:
    address = read_address(CLUSTER)
    assert address.kind == "cluster"
    assert address.nodes == (("10.0.0.1", 7000), ("::1", 7001), ("node-3", 6379))
    assert address.url_of("::1", 7001) == "redis://ann:s3cr%40t@[::1]:7001/0"
    assert read_address(CLUSTER.replace("redis+", "rediss+")).url_of("h", 1).startswith("rediss://")
    assert read_address("redis+cluster://h:1/0").nodes == (("h", 1),)


def test_sentinels_are_read() -> None:
    address = read_address(SENTINEL)
    assert (address.service, address.database, address.nodes) == ("mymaster", 2, (("s1", 26379), ("s2", 26379)))
    assert address.sentinel_password == "w/atch"
    assert address.query == "ssl_ca_certs=%2Fca.pem", "what is the Sentinels' own goes to nobody else"
    pool = open_redis("redis+sentinel://ann:s3cr%40t@s1/mymaster/2").connection_pool
    assert isinstance(pool, SentinelConnectionPool)
    assert pool.connection_kwargs["password"] == "s3cr@t"
    assert pool.connection_kwargs["db"] == 2


def test_a_single_server_is_left_to_redis_py() -> None:
    assert read_address("redis://:s3cret@h:1/5") == Address("single")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis+cluster://ann:s3cret@h:1/3", "no database but 0"),
        ("redis+cluster://ann:s3cret@", "the hosts must read"),
        ("redis+cluster://ann:s3cret@h:1,,h:2", "the hosts must read"),
        ("redis+cluster://h:1,ann:s3cret@h:2", "the hosts must read"),
        ("redis+cluster://h:s3cret", "the hosts must read"),
        ("redis+cluster://h:99999", "the hosts must read"),
        ("redis+sentinel://:s3cret@h:1", "ends with the name"),
        ("redis+sentinel://:s3cret@h:1/", "ends with the name"),
        ("redis+sentinel://:s3cret@h:1/name/x", "the database is a number"),
        ("redis+sentinel://:s3cret@h:1/name/1/2", "ends with the name"),
    ],
)
def test_what_is_wrong_is_said_without_the_password(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        load_settings(redis_url=url, broker_url="amqp://h")
    assert refused.value.field == "redis_url"
    assert "s3cret" not in str(refused.value)


@given(st.text(min_size=1), st.sampled_from([CLUSTER, SENTINEL, "redis://:s3cret@h:1/2", "rediss+cluster://:s3cret@h"]))
def test_no_message_shows_a_password(noise: str, url: str) -> None:
    for shown in (where(url), where(url + noise)):
        assert "s3cr" not in shown
        assert "w/atch" not in shown.replace(noise, "")


def test_where_names_what_is_asked() -> None:
    assert where(CLUSTER) == "10.0.0.1:7000,[::1]:7001,node-3:6379 (cluster)"
    assert where(SENTINEL) == "mymaster of Sentinel s1:26379,s2:26379"
    assert where("redis://:s3cret@h/2") == "h:6379"


def test_beside_a_cluster_a_broker_is_needed_that_is_none() -> None:
    with pytest.raises(ConfigError, match="broker_url is missing: Celery cannot use a Redis Cluster"):
        load_settings(redis_url=CLUSTER)
    with pytest.raises(ConfigError, match="Celery cannot use a Redis Cluster") as refused:
        load_settings(redis_url=CLUSTER, broker_url=CLUSTER)
    assert refused.value.field == "broker_url"
    assert load_settings(redis_url=CLUSTER, broker_url="redis://h/1").queue_url == "redis://h/1"
    with pytest.raises(ConfigError, match="broker_url is missing"):
        _ = Settings().model_copy(update={"redis_url": CLUSTER}).queue_url


def test_a_broker_behind_sentinel_is_told_to_celery_in_its_own_way() -> None:
    url, options = kombu_address(SENTINEL)
    assert url == "sentinel://:s3cret@s1:26379/2;sentinel://s2:26379"
    assert options["master_name"] == "mymaster"
    assert kombu_address("amqp://h") == ("amqp://h", {})
    app = make_app(SENTINEL)
    assert app.conf.broker_transport_options["master_name"] == "mymaster"
    assert app.conf.broker_transport_options["sentinel_kwargs"]["password"] == "w/atch"
    assert kombu_tls(SENTINEL) is None
    assert kombu_tls(SENTINEL.replace("redis+", "rediss+")) == {"ssl_cert_reqs": "required", "ssl_ca_certs": "/ca.pem"}
