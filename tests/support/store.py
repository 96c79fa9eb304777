"""A real store for tests: one Valkey per run, and a look at what a test left in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from promptmill.store import Store
from promptmill.up.embedded import find_store_program, free_port

CELERY_OWN = ("_kombu", "promptmill.", "unacked", "celery")
"""Keys of Celery's broker, which have no time to live; everything else is ours and has one."""


_LAST_DATABASE = 15


def store_program() -> str:
    """The path of the server that tests start where they do not say otherwise."""
    program = find_store_program()
    assert program is not None, "no Valkey or Redis server is installed"
    return str(program.path)


def redis_program() -> str:
    """The path of a Redis (the embedded store is a Valkey); without it a skipped test, in CI a failure."""
    found = shutil.which("redis-server")
    if found is None:
        reason = "redis-server is not installed: apt-get install redis-server"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


class StoreServer:
    """A Valkey (or another ``program``) that a test may kill and start again on the same port and data."""

    def __init__(self, directory: Path, *, append_only: bool = True, program: str | None = None) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._directory = directory
        self._append_only = append_only
        self._program = program or store_program()
        self._databases = 0
        self.process: subprocess.Popen[bytes] | None = None

    def empty_database(self) -> str:
        """The address of one of its databases but the first, each in its turn, emptied."""
        self._databases = self._databases % _LAST_DATABASE + 1
        url = f"{self.url[:-1]}{self._databases}"
        with redis.Redis.from_url(url) as client:
            client.flushdb()
        return url

    def start(self, *options: str) -> None:
        """Start it, with further ``options``, and wait until it answers. It never syncs unless these say otherwise."""
        command = [self._program, "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        command += ["--dir", str(self._directory), "--appendonly", "yes" if self._append_only else "no"]
        # With everysec a server whose disk is busy puts its writes off for up to 2 s, and kill() would take along what
        # it had acknowledged.
        command += ["--appendfsync", "no", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with redis.Redis(port=self.port) as client:
            while True:
                assert self.process.poll() is None, "the store ended at its start"
                try:
                    client.ping()
                except redis.ConnectionError:
                    time.sleep(0.01)  # not in its way while it starts
                    continue
                return

    def kill(self) -> None:
        """As with kill -9: what it had acknowledged is in its file."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@contextmanager
def running_store(
    directory: Path, *, append_only: bool = True, program: str | None = None, options: Sequence[str] = ()
) -> Generator[StoreServer]:
    """A store that ends with the block."""
    server = StoreServer(directory, append_only=append_only, program=program)
    server.start(*options)
    try:
        yield server
    finally:
        server.kill()


def keys_without_ttl(url: str) -> list[str]:
    """Our keys that would stay for ever."""
    with redis.Redis.from_url(url) as client:
        ours = [key for key in client.scan_iter(count=1000) if not key.decode().startswith(CELERY_OWN)]
        return [key.decode() for key in ours if client.ttl(key) == -1]


async def listeners_of(store: Store, channel: str) -> int:
    """How many connections listen to a plain channel, on one server or on all primaries of a cluster."""
    servers = [store.redis] if store.cluster is None else [node.redis for node in await store.cluster.primaries()]
    return sum([int((await server.pubsub_numsub(channel))[0][1]) for server in servers])


async def cut_subscribers(store: Store) -> None:
    """Cut every pub/sub connection to the store's server, or to each of its cluster's primaries."""
    servers = [store.redis] if store.cluster is None else [node.redis for node in await store.cluster.primaries()]
    for server in servers:
        await server.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
