"""The command line as a process, against one running `promptmill up`."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.processes import PATIENCE_S, alive, block_until, wait_gone
from tests.support.up import ENDED_S, PROMPTMILL, Up, environment, promptmill, promptmill_here

pytestmark = pytest.mark.xdist_group("cli")

PACED = "één twee drie " * 10
SLOW = "one two three " * 200


def lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def popen(up: Up, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*PROMPTMILL, *arguments, "--data-dir", str(up.data_dir)],
        cwd=up.home,
        env=environment(up.home),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    )


def read_some(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout
    ready, _, _ = select.select([process.stdout], [], [], PATIENCE_S)
    assert ready
    return os.read(process.stdout.fileno(), 65536)


def test_run_writes_the_answer_and_nothing_else_to_standard_output(shared_up: Up) -> None:
    done = shared_up.run("run", "-m", "paced", "x")
    assert (done.returncode, done.stdout, done.stderr) == (0, PACED + "\n", "")


def test_run_streams_while_the_job_runs(shared_up: Up) -> None:
    process = popen(shared_up, "run", "-m", "slow", "x")
    try:
        # However late this is read: of all that it will say.
        assert 0 < len(read_some(process)) < len(SLOW)
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=ENDED_S)
    assert process.returncode == 130
    assert b"cancelled job " in err
    job_id = err.decode().strip().rpartition(" ")[2]
    assert json.loads(shared_up.ask("job", "show", job_id, "--json").stdout)["state"] == "cancelled"


def unserved() -> socket.socket:
    """A port that accepts and never answers."""
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(PATIENCE_S)
    return server


@contextmanager
def submitting(home: Path, config: str) -> Generator[subprocess.Popen[bytes]]:
    """A `promptmill run` with ``config`` and no `promptmill up`."""
    (home / "promptmill.toml").write_text(config)
    process = subprocess.Popen(
        [*PROMPTMILL, "run", "-m", "echo", "x"],
        cwd=home,
        env=environment(home),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def test_an_interrupt_while_submitting_cancels_the_job_that_was_stored(tmp_path: Path, redis_url: str) -> None:
    with unserved() as broker:
        address = f"127.0.0.1:{broker.getsockname()[1]}"
        config = f'redis_url = "{redis_url}"\nbroker_url = "amqp://{address}//"\n'
        with submitting(tmp_path, config) as process, broker.accept()[0]:
            # The broker comes after the store: the job exists, and the submit has not returned.
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=ENDED_S)
    assert process.returncode == 130
    assert "cancelled job " in err.decode()
    job_id = err.decode().strip().rpartition(" ")[2]
    shown = promptmill_here("job", "show", job_id, "--json", home=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["state"] == "cancelled"


def test_a_second_interrupt_while_submitting_gives_up_and_says_that_a_job_may_exist(tmp_path: Path) -> None:
    with unserved() as store:
        config = f'redis_url = "redis://127.0.0.1:{store.getsockname()[1]}/0"\n'
        with submitting(tmp_path, config) as process, store.accept()[0]:
            process.send_signal(signal.SIGINT)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=ENDED_S)
    assert process.returncode == 130
    assert err.decode() == "interrupted while submitting, so a job may exist: `promptmill job list`\n"


@pytest.mark.parametrize("arguments", [("-",), ()])
def test_run_reads_the_prompt_from_standard_input(shared_up: Up, arguments: tuple[str, ...]) -> None:
    done = shared_up.run("run", "-m", "echo", *arguments, stdin="từ đầu vào\u2028日本\n")
    assert (done.returncode, done.stdout) == (0, "từ đầu vào\u2028日本\n")


def test_run_refuses_standard_input_that_is_not_utf_8(shared_up: Up) -> None:
    done = shared_up.ask("run", "-m", "echo", stdin=b"ab\xff")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error [bad_request]: standard input is not UTF-8 (byte 2)\n"


def test_run_as_json_is_the_jobs_events_one_a_line(shared_up: Up) -> None:
    done = shared_up.ask("run", "--role", "chat", "x", "--json")
    events = lines(done.stdout)
    assert done.returncode == 0
    assert len({event["job_id"] for event in events}) == 1
    assert [e["type"] for e in events if e["type"] != "token"] == ["progress", "progress", "done"]
    assert "".join(str(e["text"]) for e in events if e["type"] == "token") == events[-1]["text"] == PACED


def test_a_job_that_fails_is_told_with_its_code(shared_up: Up) -> None:
    done = shared_up.ask("run", "-m", "broken", "x")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error [refused]: ")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("run", "-m", "nope", "x"), "unknown_model"),
        (("run", "--role", "nope", "x"), "unknown_role"),
        (("run", "-m", "echo", "--slot", "primary", "x"), "bad_request"),
        (("run", "-m", "echo", ""), "bad_request"),
        (("job", "show", "../../etc"), "bad_request"),
    ],
)
def test_a_request_that_is_wrong_is_one_line_and_exit_code_2(
    shared_up: Up, arguments: tuple[str, ...], code: str
) -> None:
    done = shared_up.ask(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error [{code}]: ")
    as_json = shared_up.ask(*arguments, "--json")
    assert as_json.returncode == 2
    assert json.loads(as_json.stderr)["error"]["code"] == code


@pytest.mark.parametrize("command", ["show", "stream", "cancel"])
def test_a_job_that_does_not_exist_is_exit_code_3(shared_up: Up, command: str) -> None:
    done = shared_up.ask("job", command, "nosuchjob")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("error [not_found]: ")


def test_a_job_is_read_again_late_and_from_the_middle(shared_up: Up) -> None:
    events = lines(shared_up.ask("run", "-m", "paced", "x", "--json").stdout)
    job_id = str(events[0]["job_id"])
    again = shared_up.ask("job", "stream", job_id)
    assert (again.returncode, again.stdout) == (0, PACED + "\n"), again.stderr
    assert lines(shared_up.ask("job", "stream", job_id, "--json").stdout) == events
    middle = events[len(events) // 2]
    rest = shared_up.ask("job", "stream", job_id, "--json", "--after", str(middle["id"]))
    assert lines(rest.stdout) == events[len(events) // 2 + 1 :]
    shown = shared_up.ask("job", "show", job_id)
    assert "state    succeeded" in shown.stdout
    assert shown.stdout.endswith(f"\n\n{PACED}\n")


def test_a_job_is_cancelled_from_elsewhere(shared_up: Up) -> None:
    process = popen(shared_up, "run", "-m", "slow", "x", "--json")
    try:
        job_id = str(json.loads(read_some(process).splitlines()[0])["job_id"])
        done = shared_up.run("job", "cancel", job_id, "--reason", "enough", "--json")
        assert (done.returncode, json.loads(done.stdout)["state"]) == (0, "cancelled")
        out, _ = process.communicate(timeout=ENDED_S)
    finally:
        process.kill()
    assert process.returncode == 4
    last = json.loads(out.splitlines()[-1])
    assert (last["type"], last["reason"]) == ("cancelled", "enough")


def test_a_wait_that_runs_out_leaves_the_job_running_and_names_it(shared_up: Up) -> None:
    done = shared_up.ask("run", "-m", "slow", "x", "--timeout", "1.5")
    assert done.returncode == 8
    assert "error [wait_timeout]: no end within 1.5 s; the job goes on: `promptmill job stream " in done.stderr
    job_id = done.stderr.rstrip().rstrip("`").rpartition(" ")[2]
    assert json.loads(shared_up.ask("job", "cancel", job_id, "--json").stdout)["state"] == "cancelled"


def test_jobs_are_listed_newest_first_in_pages(shared_up: Up) -> None:
    ids = [str(lines(shared_up.ask("run", "-m", "echo", "x", "--json").stdout)[0]["job_id"]) for _ in range(3)]
    page = json.loads(shared_up.ask("job", "list", "--limit", "2", "--json").stdout)
    assert [job["id"] for job in page["jobs"]] == [ids[2], ids[1]]
    following = shared_up.ask("job", "list", "--limit", "1", "--json", "--cursor", page["next_cursor"])
    assert json.loads(following.stdout)["jobs"][0]["id"] == ids[0]
    assert ids[2] in shared_up.ask("job", "list").stdout
    wrong = shared_up.ask("job", "list", "--state", "sleeping")
    assert wrong.returncode == 2


def test_doctor_finds_what_runs_and_what_does_not(shared_up: Up, tmp_path: Path) -> None:
    done = shared_up.run("doctor", "--json")
    report = json.loads(done.stdout)
    found = {check["name"]: check for check in report["checks"]}
    assert done.returncode == 0
    assert report["ok"] is True
    assert found["redis"]["status"] == "ok"
    assert found["redis appendonly"]["status"] == "ok"
    assert found["workers api"]["found"] == "1 can claim jobs"
    assert shared_up.about["url"] in found["promptmill up"]["found"]
    assert shared_up.about["redis_url"] not in done.stdout


def test_doctor_says_what_is_wrong_and_what_to_do(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    (tmp_path / "promptmill.toml").write_text(
        f'redis_url = "redis://127.0.0.1:{port}/0"\n'
        '[models.a]\ntype = "anthropic_api"\nmodel_name = "m"\napi_key_env = "NO_SUCH_KEY_HERE"\n'
        f'[models.b]\ntype = "local_openai"\nmodel_name = "m"\napi_url = "http://127.0.0.1:{port}/v1"\n'
    )
    done = promptmill("doctor", home=tmp_path)
    assert done.returncode == 1
    assert f"FAIL redis: Redis at 127.0.0.1:{port} cannot be reached" in done.stdout
    assert "FAIL model a: the environment variable NO_SUCH_KEY_HERE is not set" in done.stdout
    assert "FAIL model b: http://127.0.0.1" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_doctor_takes_a_broken_configuration_as_a_finding(tmp_path: Path) -> None:
    (tmp_path / "promptmill.toml").write_text("workers = 'many'")
    done = promptmill_here("doctor", home=tmp_path)
    assert done.returncode == 1
    assert "FAIL configuration: promptmill.toml: workers: " in done.stdout


def test_without_a_store_the_error_says_what_to_start(tmp_path: Path) -> None:
    done = promptmill("run", "-m", "echo", "x", home=tmp_path)
    if done.returncode == 0:
        pytest.skip("a Redis of this machine's own listens on the default port")
    assert done.returncode == 5
    assert "Start `promptmill up`, or set redis_url" in done.stderr


def test_a_worker_alone_finds_the_store_of_a_running_up(shared_up: Up) -> None:
    process = popen(shared_up, "worker", "--name", "extra")
    try:

        def counted() -> bool:
            assert process.poll() is None
            return "2 can claim jobs" in shared_up.ask("doctor").stdout

        block_until(counted, "doctor counts it")
    finally:
        process.terminate()
        process.communicate(timeout=ENDED_S)
    assert process.returncode == 0
    wait_gone([process.pid])


def test_a_reader_that_leaves_early_gets_no_traceback(shared_up: Up) -> None:
    command = " ".join([*PROMPTMILL, "run", "-m", "paced", "x", "--data-dir", str(shared_up.data_dir)])
    done = subprocess.run(
        ["/bin/sh", "-c", f"{command} | head -c 3"],
        cwd=shared_up.home,
        env=environment(shared_up.home),
        capture_output=True,
        timeout=ENDED_S,
        check=False,
    )
    assert b"Traceback" not in done.stderr


def test_the_version_is_told(tmp_path: Path) -> None:
    done = promptmill("--version", home=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("promptmill ")


def test_a_wrong_option_is_exit_code_2(tmp_path: Path) -> None:
    assert promptmill_here("run", "--no-such", home=tmp_path).returncode == 2


def test_without_its_extra_the_command_line_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import importlib.util as u, sys\n"
        "real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'typer' else real(name, *a)\n"
        "from promptmill.cli import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=ENDED_S, check=False
    )
    assert done.returncode == 6
    assert done.stderr == 'error [missing_extra]: typer not installed: pip install "promptmill[cli]"\n'


def test_nothing_of_the_shared_up_died_meanwhile(shared_up: Up) -> None:
    assert " died (" not in shared_up.err
    assert all(alive(pid) for pid in shared_up.about["pids"].values())
