"""`promptmill up` as a user meets it: a process that becomes ready, keeps its parts alive and dies whole."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

import httpx
import psutil
import pytest
import redis

from tests.acceptance.conftest import StartUp
from tests.support.processes import PATIENCE_S, alive, block_until, tree, wait_gone
from tests.support.up import ENDED_S, PROMPTMILL, Up, environment, promptmill

ON_LINUX = sys.platform.startswith("linux")
SHARED = pytest.mark.xdist_group("up")
"""Of tests that leave the module's one as it is."""


def post(up: Up, **request: object) -> httpx.Response:
    return httpx.post(f"{up.about['url']}/v1/jobs", json=request, timeout=PATIENCE_S, trust_env=False)


def get(up: Up, job_id: str) -> httpx.Response:
    return httpx.get(f"{up.about['url']}/v1/jobs/{job_id}", timeout=PATIENCE_S, trust_env=False)


@pytest.fixture
def hangs_up() -> Generator[None]:
    """What is started ends by HUP, also where these tests run under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@SHARED
def test_ready_means_that_a_job_can_be_run(shared_up: Up) -> None:
    up = shared_up
    assert set(up.about) == {"url", "redis_url", "pids"}
    assert set(up.about["pids"]) == {"redis", "worker-1", "gateway"}
    assert all(alive(pid) for pid in up.about["pids"].values())
    assert "valkey" in psutil.Process(up.about["pids"]["redis"]).name()
    done = up.run("run", "-m", "echo", "hello from the other side")
    assert (done.returncode, done.stdout) == (0, "hello from the other side\n"), done.stderr


@SHARED
def test_what_it_keeps_is_for_its_owner_only_and_no_password_is_in_the_process_list(shared_up: Up) -> None:
    up = shared_up
    assert stat.S_IMODE(up.data_dir.stat().st_mode) == 0o700
    for name in ("up.json", "store.json", "lock"):
        assert stat.S_IMODE((up.data_dir / name).stat().st_mode) == 0o600
    password = redis.Redis.from_url(up.about["redis_url"]).connection_pool.connection_kwargs["password"]
    assert len(password) > 20
    for pid in tree(up.process.pid):
        assert password not in " ".join(psutil.Process(pid).cmdline())
    assert password not in up.err
    with redis.Redis.from_url(up.about["redis_url"]) as client:
        assert client.config_get("appendonly", "maxmemory-policy") == {
            "appendonly": "yes",
            "maxmemory-policy": "noeviction",
        }


@pytest.mark.usefixtures("hangs_up")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_in_order_and_leaves_nothing(start_up: StartUp, number: signal.Signals) -> None:
    up = start_up()
    assert up.stop(number) == 0, up.err
    wait_gone(up.seen)
    assert not (up.data_dir / "up.json").exists()


def test_kill_9_leaves_no_process(start_up: StartUp) -> None:
    up = start_up("--workers", "2")
    job = post(up, model="slow", prompt="x").json()
    assert get(up, job["id"]).json()["state"] in {"queued", "running"}
    up.look()
    assert len(up.seen) >= 6  # up, guard, store, two workers, gateway
    up.process.kill()
    wait_gone(up.seen)


@pytest.mark.skipif(not ON_LINUX, reason="without PR_SET_PDEATHSIG a store whose guard is killed too can stay")
@pytest.mark.skipif(not ON_LINUX, reason="elsewhere what leaves its process group is not found")
def test_kill_9_while_a_program_runs_leaves_nothing_of_the_program(start_up: StartUp, tmp_path: Path) -> None:
    mark = f"mark-{time.monotonic_ns()}"
    program = tmp_path / "claude"
    # A child in a session of its own, forked twice, deaf to TERM: what a tool that an agent starts can look like.
    program.write_text(
        f"""#!{sys.executable} -IS
import json, os, signal, sys, time
MARK = {mark!r}
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.execv(sys.executable, [sys.executable, "-ISc", "import time; time.sleep(300)", MARK])
    os._exit(0)
delta = {{"type": "content_block_delta", "index": 0, "delta": {{"type": "text_delta", "text": "here"}}}}
print(json.dumps({{"type": "stream_event", "event": delta}}), flush=True)
time.sleep(300)
"""
    )
    program.chmod(0o755)
    options = f'credential = "api_key", program = "{program}"'
    config = f'[models.c]\ntype = "claude_cli"\napi_key_env = "SOME_KEY"\noptions = {{ {options} }}\n'
    up = start_up(config=config, SOME_KEY="k", TMPDIR=str(tmp_path))

    def running() -> set[int]:
        return {p.pid for p in psutil.process_iter(["cmdline"]) if {mark, str(program)} & set(p.info["cmdline"] or ())}

    post(up, model="c", prompt="x")
    block_until(lambda: len(running()) >= 2, "the program and its child run")
    up.look()
    up.process.kill()
    up.process.wait()
    wait_gone(up.seen)
    block_until(lambda: not running(), "what the program started is gone")
    jobs = tmp_path / f"promptmill-{os.getuid()}"
    block_until(lambda: not list(jobs.iterdir()), "its directories are gone")


def test_kill_9_of_it_and_of_the_guard_leaves_no_process(start_up: StartUp) -> None:
    up = start_up()
    guard = psutil.Process(up.about["pids"]["redis"]).parent()
    assert guard is not None
    guard.suspend()
    up.process.kill()
    guard.kill()
    wait_gone(up.seen)


def test_kill_9_while_it_starts_leaves_no_process(start_up: StartUp) -> None:
    up = start_up(ready=False)
    starting(up)
    up.process.kill()
    wait_gone(up.seen)


def starting(up: Up) -> None:
    """Until parts are being started: the moment at which one is most easily forgotten."""
    block_until(lambda: len(tree(up.process.pid)) >= 4, "parts are being started")
    up.seen |= tree(up.process.pid)


def test_a_stop_while_it_starts_leaves_no_process(start_up: StartUp) -> None:
    up = start_up(ready=False)
    starting(up)
    code = up.stop()
    assert up.process.stdout
    became_ready = up.process.stdout.read()  # where this test was held up in between
    assert code == (0 if became_ready else 130)
    wait_gone(up.seen)


def test_a_second_signal_does_not_wait_for_running_jobs(start_up: StartUp) -> None:
    # An hour for a job and for letting it end: only the second signal ends this within the test's time.
    endless = 'options = { text = "one ", repeat = 7200, tokens_per_s = 2 }'
    up = start_up(config=f'drain_s = 3600\n[models.slow]\ntype = "echo"\n{endless}\n')
    job = post(up, model="slow", prompt="x").json()
    block_until(lambda: get(up, job["id"]).json()["state"] == "running", "the job runs")
    up.process.terminate()
    block_until(lambda: "stopping" in up.err, "it says that it stops")
    with pytest.raises(subprocess.TimeoutExpired):
        up.process.wait(1)  # it lets the job run on
    assert up.stop() == 0
    wait_gone(up.seen)


@pytest.mark.usefixtures("hangs_up")
def test_a_closed_terminal_ends_it(tmp_path: Path) -> None:
    leader, terminal = pty.openpty()
    process = subprocess.Popen(
        [*PROMPTMILL, "up", "--json", "--port", "0", "--data-dir", str(tmp_path / "data")],
        cwd=tmp_path,
        env=environment(tmp_path),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # noqa: PLW1509 - takes the terminal
    )
    os.close(terminal)
    text = b""
    try:
        while b"pids" not in text:
            ready, _, _ = select.select([leader], [], [], ENDED_S)
            assert ready, text
            text += os.read(leader, 65536)
        seen = tree(process.pid)
    finally:
        os.close(leader)
    process.wait(ENDED_S)
    wait_gone(seen)


def test_a_part_that_dies_is_restarted_and_jobs_go_on(start_up: StartUp) -> None:
    up = start_up()
    before = post(up, model="echo", prompt="kept").json()
    for part in ("worker-1", "gateway", "redis"):
        first = up.about["pids"][part]
        os.kill(first, signal.SIGKILL)
        block_until(lambda part=part, first=first: up.pids().get(part, first) != first, "up.json names the new pid")
        told = f"{part} died (signal 9); restarted as pid {up.pids()[part]}"
        block_until(lambda told=told: told in up.err, "it is told")
        # The same address, the same data, and jobs run.
        done = up.ask("run", "-m", "echo", "--timeout", "80", "again")
        assert (done.returncode, done.stdout) == (0, "again\n"), done.stderr + up.err
        assert up.ask("job", "show", before["id"], "--json").returncode == 0


def test_its_address_and_data_survive_a_restart(start_up: StartUp) -> None:
    first = start_up()
    job = post(first, model="echo", prompt="remember").json()
    assert first.ask("job", "stream", job["id"]).stdout == "remember\n"
    assert first.stop() == 0
    second = start_up()
    assert second.about["redis_url"] == first.about["redis_url"]
    shown = json.loads(second.ask("job", "show", job["id"], "--json").stdout)
    assert (shown["state"], shown["text"]) == ("succeeded", "remember")


def test_it_starts_at_once_on_the_data_of_one_that_was_killed(start_up: StartUp) -> None:
    first = start_up()
    job = post(first, model="echo", prompt="remember").json()
    assert first.ask("job", "stream", job["id"]).returncode == 0
    first.process.kill()
    second = start_up()
    assert second.ask("job", "stream", job["id"]).stdout == "remember\n"
    assert not alive(first.about["pids"]["redis"])


@pytest.mark.skipif(not ON_LINUX, reason="elsewhere one that ended and was not asked about looks alive")
def test_it_waits_for_the_store_of_one_that_was_killed_and_that_nobody_has_asked_about_yet(start_up: StartUp) -> None:
    first = start_up()
    guard = psutil.Process(first.about["pids"]["redis"]).parent()
    assert guard is not None
    guard.suspend()
    first.process.kill()
    second = start_up(ready=False)
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            second.process.wait(3)  # the store holds the data still
    finally:
        guard.resume()
    second.wait_ready()


@SHARED
def test_a_second_one_on_the_same_data_is_refused_and_told_of_the_first(shared_up: Up) -> None:
    up = shared_up
    second = up.run("up", "--port", "0")
    assert second.returncode == 6
    assert "error [data_dir_in_use]" in second.stderr
    assert str(up.process.pid) in second.stderr
    assert up.about["url"] in second.stderr
    assert up.ask("run", "-m", "echo", "still here").stdout == "still here\n"


def test_a_port_in_use_is_an_error_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = promptmill("up", "--port", str(port), "--data-dir", str(tmp_path / "data"), home=tmp_path)
    assert (done.returncode, done.stdout) == (6, "")
    assert f"error [port_in_use]: port {port} on 127.0.0.1 is in use" in done.stderr
    assert "--port" in done.stderr
    assert not (tmp_path / "data" / "store").exists()


def test_another_address_without_a_key_is_refused_before_anything_starts(tmp_path: Path) -> None:
    done = promptmill("up", "--host", "0.0.0.0", "--port", "0", "--json", home=tmp_path)
    assert (done.returncode, done.stdout) == (6, "")
    error = json.loads(done.stderr)["error"]
    assert (error["code"], error["field"]) == ("bad_config", "host")
    assert not (tmp_path / "share").exists()


def test_another_address_with_a_key_is_served(start_up: StartUp) -> None:
    up = start_up("--host", "0.0.0.0", PROMPTMILL_API_KEY="k-123456789012345678901234567890")
    assert up.about["url"].startswith("http://127.0.0.1:")
    assert post(up, model="echo", prompt="x").status_code == 401


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("redis_ulr = 'x'", "redis_ulr: no such setting"),
        ("workers = -1", "workers: "),
        ("[models.x]\ntype = 'nope'", "unknown backend type 'nope'"),
        ("[roles.chat]\nprimary = 'gone'", "there is no model 'gone'"),
        ("= broken", "not TOML"),
    ],
)
def test_a_broken_configuration_is_one_line_with_file_key_and_reason(tmp_path: Path, config: str, said: str) -> None:
    (tmp_path / "promptmill.toml").write_text(config)
    done = promptmill("up", home=tmp_path)
    assert done.returncode == 6
    assert done.stderr.startswith("error [bad_config]: promptmill.toml: ")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unreachable_store_is_said_with_its_address(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    url = f"redis://127.0.0.1:{port}/0"
    done = promptmill("up", "--port", "0", "--data-dir", "data", home=tmp_path, PROMPTMILL_REDIS_URL=url)
    assert done.returncode == 5
    assert f"error [store_unavailable]: Redis at 127.0.0.1:{port} cannot be reached" in done.stderr


@SHARED
def test_a_wrong_password_is_said_and_not_repeated(shared_up: Up, tmp_path: Path) -> None:
    address = shared_up.about["redis_url"].rpartition("@")[2]
    done = promptmill(
        *("up", "--port", "0", "--data-dir", str(tmp_path / "other")),
        home=tmp_path,
        PROMPTMILL_REDIS_URL=f"redis://:wr0ng-passw0rd@{address}",
    )
    assert done.returncode == 5
    assert "error [store_unavailable]: Redis at 127.0.0.1:" in done.stderr
    assert "password" in done.stderr
    assert "wr0ng-passw0rd" not in done.stderr


def test_a_configured_store_is_used_and_none_is_started(start_up: StartUp, redis_url: str) -> None:
    up = start_up(PROMPTMILL_REDIS_URL=redis_url)
    assert set(up.about["pids"]) == {"worker-1", "gateway"}
    assert up.about["redis_url"] == redis_url
    assert up.ask("run", "-m", "echo", "elsewhere").stdout == "elsewhere\n"


@pytest.mark.skipif(not ON_LINUX, reason="needs a small file system of its own")
def test_a_full_disk_refuses_jobs_with_a_clear_error_and_loses_none(start_up: StartUp, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ("unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size=2m none {disk} && exec "$@"', "sh")
    if subprocess.run([*mount, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine permits no mount in a user namespace")
    up = start_up("--data-dir", str(disk / "data"), prefix=mount)
    accepted: list[str] = []
    for _ in range(60):
        answer = post(up, model="echo", prompt="x" * 100_000)
        if answer.status_code != 202:
            break
        accepted.append(answer.json()["id"])
    assert answer.status_code == 503, "the disk never filled"
    assert answer.json()["code"] == "store_unavailable"
    assert accepted
    block_until(lambda: "cannot write to" in up.err, "it says that its disk is full")
    # What was accepted is there.
    for job_id in accepted:
        assert get(up, job_id).status_code == 200
    refused = promptmill(
        *("run", "-m", "echo", "x" * 100_000), home=tmp_path, PROMPTMILL_REDIS_URL=up.about["redis_url"]
    )
    assert refused.returncode == 5
    assert refused.stderr.startswith("error [store_unavailable]: Redis at 127.0.0.1:")
    assert up.stop() == 0
    # A worker's log may show what its libraries met; nothing that speaks to a user does.
    assert "Traceback" not in "".join(line for line in up.err.splitlines() if not line.startswith("worker-1 | "))


@pytest.mark.skipif(not ON_LINUX, reason="needs a small file system of its own")
def test_a_disk_that_is_full_at_the_start_is_said(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f'mount -t tmpfs -o size=1m none {disk} && (cat /dev/zero >{disk}/filler 2>/dev/null; exec "$@")'
    mount = ("unshare", "-rm", "sh", "-c", script, "sh")
    if subprocess.run([*mount, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine permits no mount in a user namespace")
    done = subprocess.run(
        [*mount, *PROMPTMILL, "up", "--port", "0", "--data-dir", str(disk / "data")],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=ENDED_S,
        check=False,
    )
    assert done.returncode == 5
    assert "error [store_unavailable]: the disk under" in done.stderr
    assert "Traceback" not in done.stderr


def test_standard_error_that_nobody_reads_stops_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*PROMPTMILL, "up", "--json", "--port", "0", "--data-dir", str(tmp_path / "data")],
        cwd=tmp_path,
        env=environment(tmp_path, PROMPTMILL_LOG_LEVEL="debug"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout
    assert process.stderr
    try:
        about = json.loads(process.stdout.readline())
        seen = tree(process.pid)
        for n in range(200):
            request = {"model": "echo", "prompt": f"{n}"}
            answer = httpx.post(f"{about['url']}/v1/jobs", json=request, timeout=PATIENCE_S, trust_env=False)
            assert answer.status_code == 202
        process.terminate()
        process.wait(ENDED_S)
    finally:
        process.kill()
        process.wait(ENDED_S)
        process.stdout.close()
        process.stderr.close()
    wait_gone(seen)
