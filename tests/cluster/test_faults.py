"""What happens to a cluster under jobs that run: slots move, nodes die, replicas take over."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from redis.crc import key_slot
from redis.exceptions import ConnectionError as RedisConnectionError

from promptmill import AsyncProducer, JobHandle, keys
from promptmill.contract import Event, Progress, Restart
from promptmill.doctor.stores import check_store
from promptmill.errors import StoreUnavailable
from promptmill.heartbeat import beat, read_beats
from promptmill.settings import Settings, load_settings
from promptmill.settings.parts import Durability
from promptmill.store import Store
from tests.support.cluster import FAILOVER_MS, ClusterNode, RedisCluster, keys_without_ttl, running_cluster, until
from tests.support.processes import wait_until
from tests.support.server import server_process
from tests.support.store import StoreServer, cut_subscribers
from tests.support.streams import check_whole, collect, follow_sse, text_of, wait_for_tokens
from tests.support.worker import pace, worker_process

MODELS = '[models.slow]\ntype = "echo"\noptions = { tokens_per_s = 30 }\n'
LONG = "word " * 100
ON_DISK = ("--appendonly", "yes")


class Mill:
    """A worker and a gateway on a cluster, and jobs that stream while something happens to it."""

    def __init__(self, cluster: RedisCluster, producer: AsyncProducer, worker: str, port: int) -> None:
        self.cluster = cluster
        self.producer = producer
        self.worker = worker
        self._port = port
        self.jobs: list[JobHandle] = []
        self._readings: list[asyncio.Task[list[Event]]] = []

    async def begin(self, count: int) -> None:
        """So many jobs, each read through the library and over HTTP, of which the last has told some tokens."""
        self.jobs = await self.producer.submit_many([{"prompt": LONG, "model": "slow"} for _ in range(count)])
        for job in self.jobs:
            self._readings.append(asyncio.create_task(collect(self.producer, job.id)))
            self._readings.append(asyncio.create_task(follow_sse(self._port, job.id)))
        await wait_for_tokens(self.producer, self.jobs[-1].id, 5)

    async def end(self) -> None:
        """Every reader got every token once, and the end; nothing was run twice, and nothing stays for ever."""
        for events in await asyncio.gather(*self._readings):
            check_whole(events)
            assert text_of(events) == LONG
            assert not any(isinstance(event, Restart) for event in events), "nobody was given up"
        for job in self.jobs:
            assert (await job.get()).text == LONG
        assert keys_without_ttl(self.cluster) == []


@asynccontextmanager
async def mill_on(
    cluster: RedisCluster, broker: str, directory: Path, *, dead_after_s: float = 20.0
) -> AsyncGenerator[Mill]:
    path = directory / "promptmill.toml"
    # Nobody is given up while a cluster makes up its mind.
    path.write_text(f'redis_url = "{cluster.url}"\nbroker_url = "{broker}"\n{pace(dead_after_s)}{MODELS}')
    async with AsyncProducer(load_settings(path)) as producer, AsyncExitStack() as stack:
        worker = stack.enter_context(worker_process(path))
        gateway = stack.enter_context(server_process("promptmill_gateway", path))
        worker_id = await worker.ready(cluster.url)
        await gateway.until_ready(200)
        yield Mill(cluster, producer, worker_id, gateway.port)


async def test_slots_that_move_while_their_jobs_stream_lose_no_token(tmp_path: Path, store_server: StoreServer) -> None:
    with running_cluster(tmp_path / "cluster") as cluster:
        async with mill_on(cluster, store_server.empty_database(), tmp_path) as mill:
            await mill.begin(4)
            for job in mill.jobs[:3]:
                source = cluster.owner(keys.record(job.id))
                to = cluster.primaries[(cluster.primaries.index(source) + 1) % 3]
                await asyncio.to_thread(cluster.move, keys.record(job.id), to)
                assert cluster.owner(keys.record(job.id)) is to
            # A new job in a slot that moved, by those who knew the old owner.
            await (await mill.producer.submit("again", model="echo")).result(30)
            await mill.end()


async def test_a_node_that_is_killed_and_comes_back_costs_time_and_no_token(
    tmp_path: Path, store_server: StoreServer
) -> None:
    # The others soon say that the cluster is down; where there is no replica, nobody takes over from one that is slow.
    with running_cluster(tmp_path / "cluster", options=ON_DISK, node_timeout_ms=1000) as cluster:
        async with mill_on(cluster, store_server.empty_database(), tmp_path) as mill:
            await mill.begin(9)
            node = cluster.owner(keys.record(mill.jobs[0].id))
            node.kill()
            with pytest.raises(StoreUnavailable):
                await mill.producer.get(mill.jobs[0].id)
            node.start()
            await mill.end()


async def test_a_primary_whose_replica_takes_over_costs_time_and_no_token(
    tmp_path: Path, store_server: StoreServer
) -> None:
    with running_cluster(tmp_path / "cluster", replicas=1, node_timeout_ms=FAILOVER_MS) as cluster:
        async with mill_on(cluster, store_server.empty_database(), tmp_path) as mill:
            await mill.begin(9)
            key = keys.record(mill.jobs[0].id)
            dead = cluster.owner(key)
            dead.kill()
            cluster.nodes.remove(dead)
            cluster.primaries.remove(dead)
            await asyncio.to_thread(until, lambda: _owner(cluster, key) not in (None, dead), "the replica took over")
            cluster.primaries.append(cluster.owner(key))
            await mill.end()


async def test_a_primary_that_falls_silent_costs_time_and_nobody_is_given_up(
    tmp_path: Path, store_server: StoreServer
) -> None:
    """As when its machine vanishes: nothing is refused, and for ten seconds whoever asks it waits."""
    with running_cluster(tmp_path / "cluster", replicas=1, node_timeout_ms=FAILOVER_MS) as cluster:
        async with mill_on(cluster, store_server.empty_database(), tmp_path, dead_after_s=5.0) as mill:
            key, beats = keys.claims(mill.worker), cluster.owner(keys.WORKERS)
            silent = next(node for node in cluster.primaries if node is not beats)
            if cluster.owner(key) is not silent:
                await asyncio.to_thread(cluster.move, key, silent)
            await mill.begin(9)
            with falling_silent(cluster, silent):
                await asyncio.to_thread(until, lambda: _owner(cluster, key) is not None, "the replica took over")
                cluster.primaries.append(cluster.owner(key))
                await mill.end()


@contextmanager
def falling_silent(cluster: RedisCluster, node: ClusterNode) -> Generator[None]:
    """A node of which nothing is heard any more. It is not one of the cluster's in the block and behind it."""
    assert node.process is not None
    cluster.nodes.remove(node)
    cluster.primaries.remove(node)
    node.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        node.kill()


def _owner(cluster: RedisCluster, key: str) -> ClusterNode | None:
    try:
        return cluster.owner(key)
    except StopIteration:
        return None


# -- one store's view -----------------------------------------------------------------------------------------------


async def test_a_command_follows_its_slot_and_its_key(tmp_path: Path) -> None:
    with running_cluster(tmp_path / "cluster") as cluster:
        store = await Store.connect(cluster.url)
        try:
            names = ["pm:{x}:one", "pm:{x}:two"]
            for name in names:
                await store.wire.call("SET", name, name, "PX", 60_000)
            to = next(node for node in cluster.primaries if node is not cluster.owner(names[0]))
            serial, seen = await store.wire.connected(), list[list[bytes]]()
            loop = asyncio.get_running_loop()

            def look() -> None:
                # None of the keys has moved, one, both: each is answered by the node that has it.
                commands = [("GET", name) for name in [*names, "pm:{x}:new"]]
                seen.append(asyncio.run_coroutine_threadsafe(store.ask(commands), loop).result())

            await asyncio.to_thread(cluster.move, names[0], to, between=look)
            assert len(seen) == 3
            assert all(row == [names[0].encode(), names[1].encode(), None] for row in seen), seen
            with pytest.raises(RedisConnectionError):
                await store.wire.many_on(serial, [("GET", names[0])])
            assert await store.wire.call("GET", names[1]) == names[1].encode()
            assert await store.wire.connected() != serial
        finally:
            await store.aclose()


async def test_a_script_whose_keys_are_on_two_nodes_waits_until_they_are_on_one(tmp_path: Path) -> None:
    with running_cluster(tmp_path / "cluster") as cluster:
        settings = Settings(redis_url=cluster.url, broker_url="redis://127.0.0.1:1/0")
        async with AsyncProducer(settings) as producer:
            job, store = await producer.submit("x", model="echo"), await producer.store()
            to = next(node for node in cluster.primaries if node is not cluster.owner(keys.record(job.id)))
            claims: list[asyncio.Future[object]] = []
            loop = asyncio.get_running_loop()

            async def claim() -> object:
                return await store.claim(job.id, "token", "worker", Progress(phase="started"))

            def begin() -> None:
                claims.append(asyncio.wrap_future(asyncio.run_coroutine_threadsafe(claim(), loop), loop=loop))

            await asyncio.to_thread(cluster.move, keys.record(job.id), to, between=begin)
            epochs = {getattr(claimed, "epoch", claimed) for claimed in await asyncio.gather(*claims)}
            assert len(epochs) == 1, "the same token has the same claim"


async def test_who_connects_to_a_node_that_leaves_the_cluster_is_not_cancelled(tmp_path: Path) -> None:
    with running_cluster(tmp_path / "cluster", replicas=1, node_timeout_ms=FAILOVER_MS) as cluster:
        store = await Store.connect(cluster.url)
        try:
            slot, key = key_slot(b"x"), "x"
            node = await store.cluster.node_of(slot)  # type: ignore[union-attr]
            with falling_silent(cluster, cluster.owner(key)):
                await node.wire.aclose()
                connecting = asyncio.create_task(store.wire.call("GET", key))
                await asyncio.to_thread(until, lambda: _owner(cluster, key) is not None, "the replica took over")

                def known() -> bool:
                    store.cluster.suspect()  # type: ignore[union-attr]
                    return store.cluster.owner(slot) is not node  # type: ignore[union-attr]

                await wait_until(known, "the store knows it")
                with pytest.raises((RedisConnectionError, OSError)):
                    await connecting
                assert await store.wire.call("GET", key) is None
        finally:
            await store.aclose()


async def test_a_heartbeat_waits_for_no_other_node_than_its_own(tmp_path: Path) -> None:
    with running_cluster(tmp_path / "cluster") as cluster:
        store = await Store.connect(cluster.url)
        try:
            beats = cluster.owner(keys.WORKERS)
            workers = (f"worker-{n}" for n in range(1000))
            worker = next(name for name in workers if cluster.owner(keys.claims(name)) is not beats)
            await beat(store, worker, 1, "ready", 1.0)
            with falling_silent(cluster, cluster.owner(keys.claims(worker))):
                await beat(store, worker, 2, "ready", 1.0)
                assert [b.count for b in (await read_beats(store))[0]] == [2]
        finally:
            await store.aclose()


async def test_what_a_moving_slot_holds_up_is_not_sent_on_another_connection(tmp_path: Path) -> None:
    with running_cluster(tmp_path / "cluster") as cluster:
        store = await Store.connect(cluster.url)
        try:
            one, two = "pm:{x}:one", "pm:{x}:two"
            for name in (one, two):
                await store.wire.call("SET", name, "old", "PX", 60_000)
            slot, source = key_slot(b"x"), cluster.owner(one)
            to = next(node for node in cluster.primaries if node is not source)
            to.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", source.id)
            source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", to.id)
            source.ask("MIGRATE", "127.0.0.1", to.port, "", 0, 5000, "KEYS", one)
            serial = await store.wire.connected()
            both = ("EVAL", "return redis.call('MSET', KEYS[1], 'new', KEYS[2], 'new')", 2, one, two)
            asked = asyncio.create_task(store.wire.many_on(serial, [both]))
            await wait_until(lambda: "errorstat_TRYAGAIN" in source.ask("INFO", "ERRORSTATS"), "it has to try again")
            source.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            await wait_until(lambda: store.wire.serial == 0, "the connection is lost")
            source.ask("MIGRATE", "127.0.0.1", to.port, "", 0, 5000, "KEYS", two)
            with pytest.raises(RedisConnectionError, match="lost"):
                await asked
            to.ask("CLUSTER", "SETSLOT", slot, "NODE", to.id)
            assert await store.wire.call("GET", one) == b"old", "the server may have lost what stood before it"
        finally:
            await store.aclose()


async def test_an_append_on_connections_that_were_lost_is_refused(store: Store) -> None:
    serial = await store.wire.connected()
    assert store.cluster is not None
    node = (await store.cluster.primaries())[1]
    await node.redis.client_kill_filter(_id=await node.wire.call("CLIENT", "ID"))
    await wait_until(lambda: store.wire.serial == 0, "one of the connections is lost")
    with pytest.raises(RedisConnectionError):
        await store.wire.many_on(serial, [("PING",)])
    assert await store.wire.connected() > serial


@pytest.mark.parametrize("level", ["local", "replica"])
async def test_a_submission_is_on_the_disks_of_every_node_that_has_a_part_of_it(
    tmp_path: Path, level: Durability
) -> None:
    replicas = 1 if level == "replica" else 0
    with running_cluster(tmp_path / "cluster", replicas=replicas, options=ON_DISK) as cluster:
        settings = Settings(redis_url=cluster.url, broker_url="redis://127.0.0.1:1/0", durability=level)
        async with AsyncProducer(settings) as producer:
            await producer.submit("x", model="echo")
            store = await producer.store()
            marks = [key for node in cluster.primaries for key in node.ask("KEYS", f"{keys.MARK}:*")]
            assert len(marks) == len(cluster.primaries)
            cluster.primaries[2].ask("CONFIG", "SET", "appendonly", "no")
            with pytest.raises(StoreUnavailable, match="not known to be durable"):
                await producer.submit("y", model="echo")
            await store.wire.call("PING")


async def test_what_is_wrong_with_the_address_is_said(redis_cluster: RedisCluster, store_server: StoreServer) -> None:
    node = redis_cluster.primaries[0].name
    with pytest.raises(StoreUnavailable, match=r"is a node of a cluster: write redis\+cluster://") as node_error:
        await Store.connect(f"redis://{node}/0")
    assert not node_error.value.retryable
    with pytest.raises(StoreUnavailable, match="is no cluster: write redis://"):
        await Store.connect(f"redis+cluster://127.0.0.1:{store_server.port}")
    with pytest.raises(StoreUnavailable, match="cannot be reached"):
        await Store.connect("redis+cluster://127.0.0.1:1,127.0.0.1:2")
    one_of_them = await Store.connect(f"redis+cluster://127.0.0.1:1,{node}")
    await one_of_them.aclose()


async def test_doctor_looks_at_every_node(redis_cluster: RedisCluster, redis_url: str) -> None:
    checks = {check.name: check for check in await check_store(Settings(redis_url=redis_url))}
    assert "a cluster of 3 nodes" in checks["redis"].found
    assert checks["redis appendonly"].status == "off"
    redis_cluster.primaries[1].ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru", "maxmemory", "1gb")
    try:
        checks = {check.name: check for check in await check_store(Settings(redis_url=redis_url))}
        assert checks["redis maxmemory-policy"].status == "fail"
        assert checks["redis maxmemory-policy"].found.startswith(redis_cluster.primaries[1].name)
    finally:
        redis_cluster.primaries[1].ask("CONFIG", "SET", "maxmemory-policy", "noeviction", "maxmemory", "0")


async def test_a_fresh_cluster_knows_no_script_and_each_node_learns_it(
    redis_cluster: RedisCluster, settings: Settings
) -> None:
    async with AsyncProducer(settings) as producer:
        for node in redis_cluster.primaries:
            node.ask("SCRIPT", "FLUSH")
        jobs: Sequence[JobHandle] = await producer.submit_many([{"prompt": "x", "model": "echo"} for _ in range(12)])
        owners = {redis_cluster.owner(keys.record(job.id)).name for job in jobs}
        assert len(owners) == 3
        assert all([(await job.get()).state == "queued" for job in jobs])
        await cut_subscribers(await producer.store())
