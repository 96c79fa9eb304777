"""Backup and restore as docs/upgrade.md has them: its own command takes the backup, and the script puts it back."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from promptmill import AsyncProducer
from promptmill.settings import Settings
from promptmill.up.embedded import find_store_program
from tests.support.docs import ROOT, blocks
from tests.support.store import StoreServer, running_store
from tests.support.worker import worker_process

RESTORE = ROOT / "ops" / "restore-redis"
PASSWORD = "letters0and1digits"


@pytest.fixture
def tools(tmp_path: Path) -> dict[str, str]:
    """The environment in which the names of the image lead to the programs of this machine."""
    program = find_store_program()
    cli = shutil.which("valkey-cli") or shutil.which("redis-cli")
    assert program is not None
    if cli is None:
        reason = "neither valkey-cli nor redis-cli is installed: apt-get install redis-tools"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "valkey-server").symlink_to(program.path)
    (tmp_path / "bin" / "valkey-cli").symlink_to(cli)
    return {"PATH": f"{tmp_path}/bin:/usr/bin:/bin"}


def backup_command() -> str:
    """What docs/upgrade.md runs in the container, without the parts of compose."""
    (text,) = [b.text for b in blocks("docs/upgrade.md") if "--rdb" in b.text]
    match = re.search(r"docker compose exec -T redis sh -c '([^']+)' > (\S+)", text)
    assert match is not None
    return f"{match[1]} > {match[2]}"


def take_backup(server: StoreServer, home: Path, env: dict[str, str]) -> Path:
    with redis.Redis(port=server.port) as client:
        client.config_set("requirepass", PASSWORD)
    (home / "redis_password").write_text(f"{PASSWORD}\n")
    command = backup_command().replace("/run/secrets/redis_password", f"{home}/redis_password")
    command = command.replace("valkey-cli", f"valkey-cli -p {server.port}")
    subprocess.run(["sh", "-euc", command], cwd=home, env=env, check=True, timeout=60)
    with redis.Redis(port=server.port, password=PASSWORD) as client:
        client.config_set("requirepass", "")
    (found,) = home.glob("*.rdb")
    return found


def restore(*arguments: object, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = ["sh", str(RESTORE), *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)


async def test_jobs_of_a_backup_are_there_again_and_those_that_waited_run(
    tmp_path: Path, tools: dict[str, str], write_config: Callable[..., tuple[Path, Settings]]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    with running_store(data) as server:
        config, settings = write_config("", url=server.url)
        async with AsyncProducer(settings) as producer:
            with worker_process(config):
                ended = await producer.submit("ended", model="echo")
                await ended.result(timeout_s=60)
            waits = await producer.submit("waits", model="echo")
            backup = take_backup(server, tmp_path, tools)
            later = await producer.submit("after the backup", model="echo")
        server.kill()

        done = restore(backup, data, env=tools)
        assert done.returncode == 0, done.stderr
        assert re.fullmatch(rf"restored \d+ keys; what was there before is in {data}/before-restore-\w+\n", done.stdout)

        server.start()
        async with AsyncProducer(settings) as producer:
            assert (await producer.get(ended.id)).text == "ended"
            with worker_process(config):
                assert (await producer.result(waits.id, timeout_s=60)).text == "waits"
            listed = [job.id for job in (await producer.list()).jobs]
            assert later.id not in listed
        # And it survives the next restart: it is in the append-only file now.
        server.kill()
        server.start()
        async with AsyncProducer(settings) as producer:
            assert (await producer.get(waits.id)).state == "succeeded"
    (kept,) = data.glob("before-restore-*")
    assert (kept / "appendonlydir").is_dir()
    assert not (data / "dump.rdb").exists()


def test_what_is_no_backup_is_refused_and_the_old_data_is_kept(tmp_path: Path, tools: dict[str, str]) -> None:
    data, broken = tmp_path / "data", tmp_path / "broken.rdb"
    (data / "appendonlydir").mkdir(parents=True)
    broken.write_bytes(b"not an RDB file")
    done = restore(broken, data, env=tools)
    assert done.returncode == 1
    assert "the old data is in" in done.stderr
    (kept,) = data.glob("before-restore-*")
    assert (kept / "appendonlydir").is_dir()


@pytest.mark.parametrize("arguments", [(), ("missing.rdb", "/tmp"), (__file__, "/no/such/place")])
def test_a_call_that_cannot_work_changes_nothing(arguments: tuple[Any, ...], tools: dict[str, str]) -> None:
    done = restore(*arguments, env=tools)
    assert done.returncode == 2
    assert done.stderr
