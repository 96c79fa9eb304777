"""Directories of jobs: which are left over, and removing what a program left. And what of /proc can be known alone."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from promptmill.errors import ConfigError
from promptmill.up.part import guard_interpreter
from promptmill_workers.programs import configure
from promptmill_workers.programs.environment import allowed, jobs_root
from promptmill_workers.programs.guarding import places, procfs
from promptmill_workers.programs.guarding.spec import LENGTH_BYTES, Spec
from promptmill_workers.programs.guarding.warden import RECORD_BYTES, TOKEN_LETTERS, parse, record
from tests.support.processes import block_until


def test_a_directory_is_left_over_once_nobody_locks_it(tmp_path: Path) -> None:
    first, second = places.make(str(tmp_path), "first"), places.make(str(tmp_path), "second")
    guard = os.dup(first)
    assert places.stale(str(tmp_path)) == []
    os.close(first)
    assert places.stale(str(tmp_path)) == [], "its guard still has it"
    os.close(guard)
    assert places.stale(str(tmp_path)) == ["first"]
    (tmp_path / "second").chmod(0)
    assert places.stale(str(tmp_path)) == ["first"], "a program that locks itself out is no leftover"
    os.close(second)
    assert sorted(places.stale(str(tmp_path))) == ["first", "second"]


def test_a_directory_that_is_being_made_is_none_until_it_is_old(tmp_path: Path) -> None:
    (tmp_path / ".making").mkdir()
    assert places.stale(str(tmp_path)) == []
    os.utime(tmp_path / ".making", (0, time.time() - 3600))
    assert places.stale(str(tmp_path)) == [".making"]


def test_files_and_links_among_the_directories_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("/")
    assert places.stale(str(tmp_path)) == []
    assert places.stale(str(tmp_path / "nowhere")) == []


def test_removing_follows_no_link_and_takes_closed_and_deep_directories(tmp_path: Path) -> None:
    kept, top = tmp_path / "kept", tmp_path / "top"
    kept.mkdir()
    (kept / "file").write_text("kept")
    top.mkdir()
    (top / "link").symlink_to(kept)
    (top / "dangling").symlink_to("/does/not/exist")
    os.mkfifo(top / "fifo")
    (top / "closed").mkdir()
    (top / "closed" / "inner").mkdir()
    (top / "closed" / "inner" / "file").write_text("x")
    (top / "closed" / "inner").chmod(0)
    (top / "closed").chmod(0o500)
    fd = os.open(top, os.O_RDONLY)
    for _ in range(200):
        os.mkdir("d" * 200, dir_fd=fd)
        parent, fd = fd, os.open("d" * 200, os.O_RDONLY, dir_fd=fd)
        os.close(parent)
    os.close(fd)
    top.chmod(0)
    assert places.remove(str(top)) == ""
    assert not top.exists()
    assert (kept / "file").read_text() == "kept"
    assert places.remove(str(top)) == "", "what is gone is no failure"


def test_a_link_in_the_place_of_the_directory_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    assert "link" in places.remove(str(tmp_path / "link"))
    assert (tmp_path / "target").exists()


def test_the_jobs_directory_must_be_ours_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    root = Path(jobs_root())
    assert root.stat().st_mode & 0o777 == 0o700
    root.chmod(0o755)
    with pytest.raises(ConfigError, match="0700"):
        jobs_root()
    root.rmdir()
    root.symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="0700"):
        jobs_root()


def test_the_environment_keeps_what_is_allowed_in_either_case(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {"PATH": "/bin", "LC_TIME": "C", "TZ": "UTC", "NO_PROXY": "a", "no_proxy": "b", "NODE_EXTRA_CA_CERTS": "c"}
    for name in os.environ:
        monkeypatch.delenv(name)
    for name, value in {**kept, "AWS_SECRET": "x", "PYTHONPATH": "/", "LD_PRELOAD": "x", "HOME": "/root"}.items():
        monkeypatch.setenv(name, value)
    assert allowed() == kept


def test_an_unknown_level_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'chroot' is none of auto, pidns, cgroup, subreaper, group"):
        configure("chroot")


def test_a_spec_survives_its_way_to_the_guard() -> None:
    spec = Spec(
        run="r" * TOKEN_LETTERS,
        level="group",
        command=["/bin/true", "ä"],
        environment={"A": "b\udcff"},
        directory="/d",
        work="/d/work",
        targets=[0, 1, 2, 5],
        grace_s=0.5,
        run_s=3.0,
        memory_bytes=None,
        open_files=3,
    )
    text = spec.pack()
    assert int.from_bytes(text[:LENGTH_BYTES], "big") == len(text) - LENGTH_BYTES
    assert Spec.unpack(text[LENGTH_BYTES:]).__dict__ == spec.__dict__


def test_records_have_one_length_and_come_back_as_they_were() -> None:
    token = os.urandom(TOKEN_LETTERS // 2).hex()
    message = record("S", token, 86_400_000)
    assert len(message) == RECORD_BYTES
    assert parse(message) == ("S", token, 86_400_000)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("quick", [True, False])
def test_descendants_are_found_with_and_without_the_kernels_list_of_children(
    quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not quick:
        monkeypatch.setattr(procfs, "_children", lambda _pid: None)
        monkeypatch.setattr(procfs.os.path, "exists", lambda _path: False)
    process = subprocess.Popen(["/bin/sh", "-c", "sh -c 'sleep 60; :' & wait"], start_new_session=True)
    try:
        wanted = psutil.Process(process.pid)
        block_until(lambda: len(wanted.children(recursive=True)) == 2, "the inner shell sleeps")
        found = procfs.descendants(process.pid)
        assert [pid for pid, _ in found] == [child.pid for child in wanted.children(recursive=True)]
        assert all(procfs.start_time(pid) == started for pid, started in found)
        assert procfs.children(process.pid) == found[:1]
    finally:
        os.killpg(process.pid, 9)
        process.wait()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("pidfd", [True, False])
def test_a_signal_reaches_no_later_process_of_the_same_pid(pidfd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(procfs, "_PIDFD", pidfd)
    started = procfs.start_time(os.getpid())
    assert started is not None
    assert not procfs.send((os.getpid(), started + 1), 9)
    assert procfs.send((os.getpid(), started), 0)


def test_a_warden_loads_nothing_that_is_large_or_ours() -> None:
    directory = Path(places.__file__).parent.parent
    code = f"import sys; sys.path.insert(0, {str(directory)!r}); import guarding.warden; print(*sys.modules)"
    loaded = subprocess.run(
        [guard_interpreter(), "-I", "-S", "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "guarding.warden" in loaded
    large = {"typing", "re", "json", "subprocess", "threading", "asyncio", "pathlib", "logging", "tempfile", "shutil"}
    assert not large & set(loaded)
    assert not [name for name in loaded if name.startswith("promptmill")]
