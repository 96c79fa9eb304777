"""A primary, its replica and a Sentinel that watches them, for tests."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import redis

from promptmill.up.embedded import free_port
from tests.support.cluster import until
from tests.support.store import StoreServer, running_store, store_program

SERVICE: Final = "mymaster"
SENTINELS_PASSWORD: Final = "watch/this:one"


class Watched:
    """``servers`` are the first primary and its replica."""

    def __init__(self, servers: tuple[StoreServer, StoreServer], port: int) -> None:
        self.servers = servers
        self._port = port
        self.url = f"redis+sentinel://127.0.0.1:1,127.0.0.1:{port}/{SERVICE}/0?sentinel_password=watch%2Fthis%3Aone"

    def ask(self, *command: str) -> Any:
        """One of the Sentinel's replies."""
        with redis.Redis(port=self._port, password=SENTINELS_PASSWORD) as client:
            return client.execute_command(*command)

    @property
    def primary_port(self) -> int:
        """Where the primary is, by the Sentinel's word."""
        return int(self.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)[1])


@contextmanager
def watched_store(directory: Path) -> Generator[Watched]:
    """Servers whose primary is followed; all end with the block."""
    first, second, third = (directory / name for name in ("first", "second", "sentinel"))
    for place in (first, second, third):
        place.mkdir(parents=True)
    with running_store(first, append_only=False) as primary, running_store(second, append_only=False) as replica:
        with redis.Redis(port=replica.port) as client:
            client.replicaof("127.0.0.1", str(primary.port))
            until(lambda: client.info("replication").get("master_link_status") == "up", "the replica follows")
        watched = Watched((primary, replica), free_port())
        with _sentinel(third, watched, primary.port):
            yield watched


@contextmanager
def _sentinel(directory: Path, watched: Watched, primary_port: int) -> Generator[None]:
    lines = [
        f"port {watched._port}",
        "bind 127.0.0.1",
        f"dir {directory}",
        f'requirepass "{SENTINELS_PASSWORD}"',
        f"sentinel monitor {SERVICE} 127.0.0.1 {primary_port} 1",
        f"sentinel down-after-milliseconds {SERVICE} 500",
        f"sentinel failover-timeout {SERVICE} 5000",
    ]
    config = directory / "sentinel.conf"
    config.write_text("\n".join(lines) + "\n")
    process = subprocess.Popen(
        [store_program(), str(config), "--sentinel"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while True:
            assert process.poll() is None, "the Sentinel ended at its start"
            with contextlib.suppress(redis.ConnectionError):
                watched.ask("PING")
                break
            time.sleep(0.01)  # not in its way while it starts
        # By itself it looks for replicas every ten seconds.
        watched.ask("SENTINEL", "DEBUG", "INFO-PERIOD", "200")
        until(lambda: len(watched.ask("SENTINEL", "REPLICAS", SERVICE)) == 1, "the Sentinel knows the replica")
        yield
    finally:
        process.kill()
        process.wait()
