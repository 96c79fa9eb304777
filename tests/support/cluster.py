"""A real Redis Cluster of processes on loopback, for tests."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import redis
from redis.crc import key_slot

from promptmill.up.embedded import free_port
from tests.support.processes import PATIENCE_S
from tests.support.store import redis_program, store_program
from tests.support.tls import Certificate

SLOTS: Final = 16384
_BUS: Final = 10_000
PATIENT_MS: Final = 60_000
"""After how long a silent node counts as dead where no test waits for it. A busy machine stops one for seconds: with
less, the others then answer CLUSTERDOWN to whoever asks, or a replica takes over, in the midst of a test of something
else."""
FAILOVER_MS: Final = 3000
"""The same where a test waits until a replica took over."""


class ClusterNode:
    """One server of it, which a test may kill and start again.

    With a certificate it speaks TLS to the others and to clients; ``port`` without is then for the test alone.
    """

    def __init__(
        self, directory: Path, program: str, options: tuple[str, ...], certificate: Certificate | None = None
    ) -> None:
        self.port = _free_ports()
        self.client_port = self.port if certificate is None else _free_ports()
        self._tls = [] if certificate is None else [*certificate.options(self.client_port), "--tls-cluster", "yes"]
        self.directory = directory
        self._program = program
        self._options = options
        self.process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True)

    @property
    def name(self) -> str:
        return f"127.0.0.1:{self.client_port}"

    def client(self) -> Any:
        return redis.Redis(port=self.port, socket_timeout=10)

    def ask(self, *command: str | int) -> Any:
        """One command's reply, on a connection of its own."""
        with self.client() as client:
            return client.execute_command(*command)

    @property
    def id(self) -> str:
        return self.ask("CLUSTER", "MYID").decode()

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [self._program, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.directory)]
        command += ["--save", "", "--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf"]
        self.process = subprocess.Popen(
            [*command, *self._options, *self._tls], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while True:
            assert self.process.poll() is None, "a node ended at its start"
            with contextlib.suppress(redis.ConnectionError):
                self.ask("PING")
                return
            time.sleep(0.01)  # not in its way while it starts

    def kill(self) -> None:
        """As with kill -9."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


class RedisCluster:
    """Primaries first, then as many replicas of each in turn as asked for."""

    def __init__(
        self,
        directory: Path,
        *,
        primaries: int = 3,
        replicas: int = 0,
        options: tuple[str, ...] = ("--appendonly", "no"),
        certificate: Certificate | None = None,
        node_timeout_ms: int = PATIENT_MS,
    ) -> None:
        # The embedded store is built without TLS.
        program = store_program() if certificate is None else redis_program()
        given = (program, ("--cluster-node-timeout", str(node_timeout_ms), *options), certificate)
        self.nodes = [ClusterNode(directory / f"node-{n}", *given) for n in range(primaries * (1 + replicas))]
        self._certificate = certificate
        self.primaries = self.nodes[:primaries]
        self.replicas = self.nodes[primaries:]

    @property
    def url(self) -> str:
        names = ",".join(node.name for node in self.nodes)
        if self._certificate is None:
            return f"redis+cluster://{names}"
        return f"rediss+cluster://{names}?{self._certificate.query}"

    def start(self) -> None:
        """Start all, form the cluster and wait until every node serves every slot."""
        for node in self.nodes:
            node.start()
        for n, node in enumerate(self.primaries):
            first, behind = (SLOTS * i // len(self.primaries) for i in (n, n + 1))
            node.ask("CLUSTER", "ADDSLOTSRANGE", first, behind - 1)
            # Else all begin with the same epoch, and settle that among themselves for seconds.
            node.ask("CLUSTER", "SET-CONFIG-EPOCH", n + 1)
        for node in self.nodes[1:]:
            node.ask("CLUSTER", "MEET", "127.0.0.1", self.nodes[0].client_port)
        until(lambda: all(len(_lines(node)) == len(self.nodes) for node in self.nodes), "all nodes know each other")
        for n, node in enumerate(self.replicas):
            node.ask("CLUSTER", "REPLICATE", self.primaries[n % len(self.primaries)].id)
        until(self.serves, "the cluster serves all slots")
        until(lambda: all(_replicates(node) for node in self.replicas), "the replicas follow")

    def serves(self) -> bool:
        """Whether every node says that all is well."""
        return all(b"cluster_state:ok" in node.ask("CLUSTER", "INFO") for node in self.nodes)

    def flush(self) -> None:
        """Empty it."""
        for node in self.primaries:
            node.ask("FLUSHALL")

    def owner(self, key: str) -> ClusterNode:
        """Who has a key's slot, by the nodes' own word."""
        slot = key_slot(key.encode())
        for node in self.nodes:
            if node.process is None:
                continue
            for first, last, (_, port, *_), *_ in node.ask("CLUSTER", "SLOTS"):
                if first <= slot <= last:
                    return next(n for n in self.nodes if n.port == port)
        raise AssertionError(f"nobody has slot {slot}")

    def move(self, key: str, to: ClusterNode, *, between: Callable[[], None] = lambda: None) -> None:
        """Move a key's slot, key by key. ``between`` is called when both nodes know of it and no key has moved."""
        slot, source = key_slot(key.encode()), self.owner(key)
        to.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", source.id)
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", to.id)
        between()
        with source.client() as client:
            while names := client.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 1):
                client.execute_command("MIGRATE", "127.0.0.1", to.client_port, "", 0, 5000, "KEYS", *names)
                between()
        for node in (to, source, *(n for n in self.primaries if n not in (to, source))):
            node.ask("CLUSTER", "SETSLOT", slot, "NODE", to.id)

    def stop(self) -> None:
        """End all of it."""
        for node in self.nodes:
            node.kill()
            shutil.rmtree(node.directory, ignore_errors=True)


@contextmanager
def running_cluster(directory: Path, **options: Any) -> Generator[RedisCluster]:
    """A cluster that ends with the block."""
    cluster = RedisCluster(directory, **options)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def keys_without_ttl(cluster: RedisCluster) -> list[str]:
    """Our keys that would stay for ever."""
    found: list[str] = []
    for node in cluster.primaries:
        with node.client() as client:
            found += [key.decode() for key in client.scan_iter(count=1000) if client.ttl(key) == -1]
    return found


def until(holds: Callable[[], bool], what: str) -> None:
    """Wait for a condition outside of any event loop."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, f"not within {PATIENCE_S} s: {what}"
        time.sleep(0.02)


def _free_ports() -> int:
    """A free port whose cluster bus port is free, too, and is none that an outgoing connection may take before it."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = free_port()
        if port + _BUS >= first:
            continue
        with socket.socket() as bus, contextlib.suppress(OSError):
            bus.bind(("127.0.0.1", port + _BUS))
            return port


def _lines(node: ClusterNode) -> list[bytes]:
    """The nodes that this one has shaken hands with, as it says."""
    told: bytes = node.ask("CLUSTER", "NODES")
    return [line for line in told.splitlines() if b"handshake" not in line]


def _replicates(node: ClusterNode) -> bool:
    with node.client() as client:
        return client.info("replication").get("master_link_status") == "up"
