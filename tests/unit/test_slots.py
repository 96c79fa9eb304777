"""Where commands and keys belong on a cluster."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.crc import key_slot

from promptmill import keys
from promptmill.batch.store import names
from promptmill.store import scripts
from promptmill.store.slots import HOME, everywhere, sharded, slot_of

ids = st.text(alphabet=sorted(keys._ID_CHARS), min_size=1, max_size=64)
texts = st.text(min_size=1, max_size=80)


def slots(*found: str) -> set[int]:
    return {key_slot(key.encode("utf-8", "surrogatepass")) for key in found}


@given(ids)
def test_all_of_a_job_and_all_of_a_batch_is_in_one_slot(name: str) -> None:
    assert len(slots(keys.record(name), keys.log(name), keys.channel(name))) == 1
    assert len(slots(*names(name))) == 1


@given(st.dates().map(str), ids)
def test_what_a_script_writes_together_is_in_one_slot(day: str, model: str) -> None:
    assert len(slots(keys.ledger(day), keys.ledger_sums(day))) == 1
    parts = ("health", "probe", "paces", "running", "held", "line", "due", "needs", "turns")
    assert len(slots(*(keys.traffic(f"model:{model}", part) for part in parts))) == 1
    assert len(slots(keys.REGISTRY, keys.REGISTRY_AUDIT, keys.REGISTRY_CHANGES)) == 1


@given(ids, st.sampled_from(scripts.ALL))
def test_a_call_of_a_script_goes_to_its_job(job_id: str, script: scripts.Script) -> None:
    (slot,) = slots(keys.record(job_id))
    rest = (keys.record(job_id), keys.log(job_id), "token")
    for command in (("EVALSHA", script.sha, 2, *rest), (b"EVAL", script.source.encode(), b"2", *rest)):
        assert slot_of(command) == slot
        assert sharded(command)[2:] == command[2:]
        assert sharded(sharded(command)) == sharded(command)


@pytest.mark.parametrize("script", scripts.ALL)
def test_every_script_of_a_job_publishes_within_the_shard_on_a_cluster_and_not_on_one_server(
    script: scripts.Script,
) -> None:
    other = script.sharded()
    assert other.source.count("'SPUBLISH', chan,") == script.source.count("'PUBLISH', chan,") == 2
    assert "'PUBLISH', chan" not in other.source
    assert "SPUBLISH" not in script.source
    assert sharded(("EVALSHA", script.sha, 0))[1] == other.sha.encode()
    assert sharded(("EVAL", script.source, 0))[1] == other.source.encode()
    assert sharded(("SCRIPT", "LOAD", script.source))[2] == other.source.encode()


def test_the_workers_own_channel_is_reached_from_any_slot() -> None:
    # Its message comes from the slot of the job, and the worker listens anywhere: only plain PUBLISH crosses slots.
    assert "'PUBLISH', ARGV[6] .. worker" in scripts.STOP.sharded().source


@given(texts)
def test_what_has_a_key_goes_to_it(key: str) -> None:
    (slot,) = slots(key)
    assert slot_of(("GET", key)) == slot_of((b"hget", key.encode(), b"f")) == slot
    assert slot_of(("PUBSUB", "SHARDNUMSUB", key)) == slot_of(("PUBLISH", key, "x")) == slot


def test_what_has_no_key_goes_where_it_makes_sense() -> None:
    (workers,) = slots(keys.WORKERS)
    assert slot_of(("TIME",)) == HOME == workers, "heartbeats are compared with that clock"
    assert everywhere(("PING",))
    assert everywhere((b"SCRIPT", b"LOAD", "x"))
    assert not everywhere(("TIME",))
    assert not everywhere(("EVALSHA", "x", 0))
