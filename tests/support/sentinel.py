"""A primary, its replica and a Sentinel that watches them, for tests."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import redis

from promptmill.up.embedded import free_port
from tests.support.cluster import until
from tests.support.store import StoreServer, redis_program, running_store, store_program
from tests.support.tls import Certificate

SERVICE: Final = "mymaster"
SENTINELS_PASSWORD: Final = "watch/this:one"
_DOWN_AFTER_MS: Final = 4000
"""Shorter, a primary that a busy machine stops for a moment is replaced in the midst of a test: what it is told from
then on is lost."""


class Watched:
    """``servers`` are the first primary and its replica. With a certificate ``url`` uses TLS, and tests do not."""

    def __init__(
        self, servers: tuple[StoreServer, StoreServer], port: int, certificate: Certificate | None = None
    ) -> None:
        self.servers = servers
        self.certificate = certificate
        self.client_port = port if certificate is None else free_port()
        self._port = port
        scheme, query = ("redis", "") if certificate is None else ("rediss", f"&{certificate.query}")
        nodes = f"127.0.0.1:1,127.0.0.1:{self.client_port}"
        self.url = f"{scheme}+sentinel://{nodes}/{SERVICE}/0?sentinel_password=watch%2Fthis%3Aone{query}"

    def ask(self, *command: str) -> Any:
        """One of the Sentinel's replies."""
        with redis.Redis(port=self._port, password=SENTINELS_PASSWORD) as client:
            return client.execute_command(*command)

    @property
    def primary_port(self) -> int:
        """Where the primary is, by the Sentinel's word."""
        return int(self.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)[1])


@contextmanager
def watched_store(directory: Path, certificate: Certificate | None = None) -> Generator[Watched]:
    """Servers whose primary is followed; all end with the block."""
    first, second, third = (directory / name for name in ("first", "second", "sentinel"))
    for place in (first, second, third):
        place.mkdir(parents=True)
    # The embedded store is built without TLS.
    program = None if certificate is None else redis_program()
    ports = [0 if certificate is None else free_port() for _ in range(2)]
    options = [[] if certificate is None else certificate.options(port) for port in ports]
    with ExitStack() as stack:
        primary, replica = (
            stack.enter_context(running_store(place, append_only=False, program=program, options=own))
            for place, own in zip((first, second), options, strict=True)
        )
        with redis.Redis(port=replica.port) as client:
            client.replicaof("127.0.0.1", str(ports[0] or primary.port))
            until(lambda: client.info("replication").get("master_link_status") == "up", "the replica follows")
        watched = Watched((primary, replica), free_port(), certificate)
        with _sentinel(third, watched, ports[0] or primary.port):
            yield watched


@contextmanager
def _sentinel(directory: Path, watched: Watched, primary_port: int) -> Generator[None]:
    lines = [
        f"port {watched._port}",
        "bind 127.0.0.1",
        f"dir {directory}",
        f'requirepass "{SENTINELS_PASSWORD}"',
        f"sentinel monitor {SERVICE} 127.0.0.1 {primary_port} 1",
        f"sentinel down-after-milliseconds {SERVICE} {_DOWN_AFTER_MS}",
        f"sentinel failover-timeout {SERVICE} 5000",
    ]
    if watched.certificate is not None:
        lines += [f"tls-port {watched.client_port}"]
        lines += [f"{name} {value}" for name, value in watched.certificate.directives.items()]
    config = directory / "sentinel.conf"
    config.write_text("\n".join(lines) + "\n")
    program = store_program() if watched.certificate is None else redis_program()
    process = subprocess.Popen(
        [program, str(config), "--sentinel"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while True:
            assert process.poll() is None, "the Sentinel ended at its start"
            with contextlib.suppress(redis.ConnectionError):
                watched.ask("PING")
                break
            time.sleep(0.01)  # not in its way while it starts
        # By itself it looks for replicas every ten seconds; Redis before 7.2 lets nobody change that.
        with contextlib.suppress(redis.ResponseError):
            watched.ask("SENTINEL", "DEBUG", "INFO-PERIOD", "200")
        until(lambda: len(watched.ask("SENTINEL", "REPLICAS", SERVICE)) == 1, "the Sentinel knows the replica")
        yield
    finally:
        process.kill()
        process.wait()
