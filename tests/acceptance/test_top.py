"""`promptmill top` against a running `promptmill up`, in a pseudo-terminal, into a pipe, and as JSON."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest

from tests.support.store import running_store
from tests.support.terminal import ALTERNATE, NORMAL, terminal
from tests.support.up import PROMPTMILL, Up, environment, promptmill

pytestmark = pytest.mark.xdist_group("top")


def fact(screen: str, name: str) -> str:
    """A number of the head."""
    found = re.search(rf"(?<!\w){name} (\S+)", screen)
    return found[1] if found else ""


def top(up: Up, *arguments: str) -> tuple[str, ...]:
    return (*PROMPTMILL, "top", "--data-dir", str(up.data_dir), *arguments)


def submit(up: Up, model: str) -> str:
    done = up.ask("run", "-m", model, "x", "--timeout", "0.5", "--json")
    return str(json.loads(done.stdout.splitlines()[0])["job_id"]) if done.stdout else ""


def test_what_runs_changes_the_picture_and_q_leaves(shared_up: Up) -> None:
    env = environment(shared_up.home)
    with terminal(top(shared_up, "--interval", "0.2"), shared_up.home, env) as seen:
        quiet = seen.until(lambda s: "worker-1" in s and "gateway@" in s, "worker and gateway are shown")
        assert fact(quiet, "running") == "0"
        job_id = submit(shared_up, "slow")
        seen.until(lambda s: fact(s, "running") == "1", "the job is seen to run")
        seen.until(lambda s: float(fact(s, "tokens/s") or 0) > 5, "its tokens are seen to flow")
        shared_up.ask("run", "-m", "broken", "x")
        seen.until(lambda s: re.search(r"^refused +1\b", s, re.MULTILINE) is not None, "the failure is shown by code")
        seen.until(lambda s: re.search(r"^broken +1 ", s, re.MULTILINE) is not None, "its attempt counts for today")
        assert seen.said.count(ALTERNATE) == 1
        assert seen.settings != seen.before
        shared_up.ask("job", "cancel", job_id)
        seen.until(lambda s: fact(s, "running") == "0", "the job is seen to have ended")
        seen.press(b"q")
        assert seen.ended() == 0
        assert seen.said.count(NORMAL) == 1
        assert seen.settings == seen.before
        assert b"Traceback" not in seen.said


@pytest.mark.parametrize("how", ["ctrl-c", "term"])
def test_a_signal_leaves_the_terminal_as_it_was(shared_up: Up, how: str) -> None:
    env = environment(shared_up.home)
    with terminal(top(shared_up), shared_up.home, env, columns=60, rows=12) as seen:
        seen.until(lambda s: "waiting 0" in s, "it is shown in a small terminal")
        if how == "ctrl-c":
            seen.press(b"\x03")
        else:
            seen.process.send_signal(signal.SIGTERM)
        assert seen.ended() == 0
        assert seen.said.count(NORMAL) == 1
        assert seen.settings == seen.before


def test_into_a_pipe_it_looks_once(shared_up: Up) -> None:
    for arguments in ((), ("--once",)):
        done = shared_up.run("top", *arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert "worker-1" in done.stdout
        assert "\x1b" not in done.stdout


def test_as_json_it_is_one_object(shared_up: Up) -> None:
    done = shared_up.ask("top", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    said = json.loads(line)
    (worker,) = said["workers"]
    assert (worker["name"], worker["state"], worker["alive"]) == ("worker-1", "ready", True)
    assert [server["kind"] for server in said["servers"]] == ["gateway"]
    assert {queue["name"]: queue["messages"] for queue in said["queues"]} == {
        "promptmill.api": 0,
        "promptmill.api.batch": 0,
    }
    assert said["today"]["by"] == ["model"]


def test_without_a_store_it_is_an_error_and_later_it_goes_on(tmp_path: Path) -> None:
    with running_store(tmp_path) as server:
        (tmp_path / "promptmill.toml").write_text(f'redis_url = "{server.url}"\n')
        env = environment(tmp_path)
        with terminal((*PROMPTMILL, "top", "--interval", "0.2"), tmp_path, env) as seen:
            seen.until(lambda s: "waiting 0" in s, "the empty deployment is shown")
            server.kill()
            seen.until(lambda s: "cannot be reached" in s and "waiting 0" in s, "it says that the store is away")
            server.start()
            seen.until(lambda s: "waiting 0" in s and "as it was then" not in s, "it goes on")
            seen.press(b"q")
            assert seen.ended() == 0
            assert b"Traceback" not in seen.said
        server.kill()
        done = promptmill("top", home=tmp_path)
        assert done.returncode == 5
        assert done.stderr.startswith("error [store_unavailable]: ")
