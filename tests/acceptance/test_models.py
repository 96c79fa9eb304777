"""`promptmill models`, against one running `promptmill up`, in the order in which an operator would."""

from __future__ import annotations

import getpass
import json
import re
import socket
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import redis

from promptmill import keys
from tests.support.processes import block_until
from tests.support.up import Up, promptmill_here

pytestmark = pytest.mark.xdist_group("models")


@pytest.fixture(autouse=True)
def as_in_the_file(shared_up: Up) -> Generator[None]:
    """Each test begins without a live part."""
    yield
    with redis.Redis.from_url(shared_up.about["redis_url"]) as client:
        client.delete(keys.REGISTRY, keys.REGISTRY_AUDIT)


def done(up: Up, *arguments: str) -> str:
    """What a command prints that ends well."""
    ended = up.ask("models", *arguments)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def listed(up: Up) -> dict[str, dict[str, Any]]:
    return {model["name"]: model for model in json.loads(done(up, "list", "--json"))["models"]}


def test_a_model_is_added_tested_used_changed_and_removed(shared_up: Up) -> None:
    up = shared_up
    done(up, "add", "quick", "--type", "echo", "--option", "text=one two", "--option", "repeat=1")
    tested = json.loads(done(up, "test", "quick", "--json"))
    assert (tested["ok"], tested["answered_by"], tested["backend"], tested["text"]) == (
        True,
        "quick",
        "echo",
        "one two",
    )
    assert 0 <= tested["first_token_s"] <= tested["total_s"]
    assert tested["usage"]["output_tokens"] == 2
    assert up.ask("run", "-m", "quick", "x").stdout == "one two\n"
    # What is tested is what was set, however short ago.
    done(up, "add", "quick", "--type", "echo", "--option", "text=three", "--replace")
    shown = done(up, "test", "quick")
    assert shown.startswith("quick answers: three\nfirst token ")
    assert re.search(r"\d+ tokens in, 1 out", shown)
    done(up, "remove", "quick")
    gone = up.ask("models", "test", "quick")
    assert gone.returncode == 2
    assert gone.stderr.startswith("error [unknown_model]: there is no model 'quick'; configured: echo, slow")


def test_the_list_says_where_each_model_comes_from_and_what_names_it(shared_up: Up) -> None:
    up = shared_up
    done(up, "add", "extra", "--type", "local_openai", "--model-name", "m", "--api-url", "http://127.0.0.1:9/v1")
    done(up, "add", "broken", "--type", "echo", "--replace")
    done(up, "set-role", "chat", "primary=extra", "backup_1=paced")
    done(up, "set-role", "chat", "primary=slow", "--user", "eva")
    done(up, "set-default", "extra")
    models = listed(up)
    assert {name: model["from"] for name, model in models.items()} == {
        "echo": "built in",
        "slow": "file",
        "paced": "file",
        "broken": "live, over the file",
        "extra": "live",
    }
    assert models["extra"]["named_by"] == ["role chat (primary)", "default_model"]
    assert models["slow"]["named_by"] == ["role chat of user eva (primary)"]
    shown = done(up, "list")
    assert re.search(r"^chat +everybody +primary = extra, backup_1 = paced$", shown, re.MULTILINE)
    assert re.search(r"^chat +eva +primary = slow$", shown, re.MULTILINE)
    report = json.loads(up.ask("doctor", "--json").stdout)
    found = {check["name"]: check["found"] for check in report["checks"]}
    assert found["model broken"].endswith("(live, over the file)")
    assert found["model extra"].endswith("(live)")
    assert not found["model slow"].endswith(")")


def test_explain_says_who_would_answer_and_changes_with_the_role(shared_up: Up) -> None:
    up = shared_up
    assert done(up, "explain", "--role", "chat").startswith("1. paced  (echo, file, api workers, slot primary)\n")
    done(up, "add", "quick", "--type", "echo")
    done(up, "set-role", "chat", "primary=quick", "backup_1=paced")
    decided = json.loads(done(up, "explain", "--role", "chat", "--exclude", "quick", "--json"))
    assert [route["model"] for route in decided["routes"]] == ["paced"]
    assert "quick is excluded by the request" in decided["why"]
    assert "falls back: no" in done(up, "explain", "--role", "chat", "--slot", "backup_1")

    def answers() -> str:
        return json.loads(up.ask("run", "--role", "chat", "x", "--json").stdout.splitlines()[-1])["model"]

    block_until(lambda: answers() == "quick", "the workers heard of the change")


def test_every_change_is_audited_with_who_made_it(shared_up: Up) -> None:
    up = shared_up
    done(up, "add", "a", "--type", "echo")
    done(up, "add", "a", "--type", "echo")  # so already: no change
    done(up, "remove", "slow")
    entries = [json.loads(line) for line in done(up, "audit", "--json").splitlines()]
    assert [(e["action"], e["name"]) for e in entries] == [("hide", "slow"), ("add", "a")]
    assert {e["who"] for e in entries} == {f"{getpass.getuser()}@{socket.gethostname()}"}
    assert "add a\n  before: -\n  after:  {" in done(up, "audit", "--limit", "5")
    assert "slow" not in listed(up)
    done(up, "restore", "slow")
    assert listed(up)["slow"]["from"] == "file"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("add", "m"), "bad_request", "give --type or --from-file"),
        (("add", "m", "--type", "nope"), "bad_request", "unknown backend type 'nope'"),
        (("add", "m", "--type", "local_openai"), "bad_request", "local_openai needs api_url"),
        (("add", "m", "--type", "echo", "--option", "x"), "bad_request", "has not the form NAME=VALUE"),
        (("add", "m", "--type", "echo", "--limit", "speed=9"), "bad_request", "limits.speed: no such setting"),
        (("add", "m", "--type", "echo", "--option", "token=abcdef"), "bad_request", "looks like a key"),
        (("add", "-x-", "--type", "echo"), "", ""),
        (("add", "slow", "--type", "echo"), "bad_request", "--replace"),
        (("add", "m", "--from-file", "missing.toml"), "bad_request", "missing.toml"),
        (("remove", "nope"), "unknown_model", "there are: echo, slow, paced, broken"),
        (("remove", "paced"), "bad_request", "paced is named by role chat (primary)"),
        (("remove", "echo"), "bad_request", "always there"),
        (("restore", "nope"), "unknown_model", "no model 'nope'"),
        (("set-role", "chat", "backup_1=slow"), "bad_request", "primary is missing"),
        (("set-role", "chat", "primary=nope"), "unknown_model", "there are: echo, slow, paced, broken"),
        (("set-role", "chat", "first=slow"), "bad_request", "a slot is named primary"),
        (("unset-role", "chat"), "bad_request", "stands in the configuration file"),
        (("unset-role", "nope"), "unknown_role", "there are: chat"),
        (("set-default", "nope"), "unknown_model", "there are: echo, slow, paced, broken"),
        (("explain", "--slot", "primary"), "bad_request", "slot needs role"),
        (("explain", "--role", "nope"), "unknown_role", "configured: chat"),
    ],
)
def test_what_is_refused_is_one_line_with_a_code_and_nothing_changes(
    shared_up: Up, arguments: tuple[str, ...], code: str, said: str
) -> None:
    ended = shared_up.ask("models", *arguments)
    assert (ended.returncode, ended.stdout) == (2, "")
    if code:
        assert ended.stderr.startswith(f"error [{code}]: ")
        assert ended.stderr.count("\n") == 1
    assert said in ended.stderr
    with redis.Redis.from_url(shared_up.about["redis_url"]) as client:
        assert client.exists(keys.REGISTRY, keys.REGISTRY_AUDIT) == 0


def test_a_model_is_read_from_a_file_and_options_win_over_it(shared_up: Up, tmp_path: Path) -> None:
    path = tmp_path / "more.toml"
    path.write_text('[models.filed]\ntype = "echo"\noptions = { text = "of the file", repeat = 2 }\n')
    done(shared_up, "add", "filed", "--from-file", str(path), "--option", "repeat=1")
    assert shared_up.ask("run", "-m", "filed", "x").stdout == "of the file\n"
    bare = tmp_path / "bare.toml"
    bare.write_text('type = "echo"\n[timeouts]\nidle_s = 5\n')
    done(shared_up, "add", "bare", "--from-file", str(bare))
    assert listed(shared_up)["bare"]["type"] == "echo"


def test_a_test_that_fails_says_why_and_what_to_do_with_the_exit_code_of_run(shared_up: Up) -> None:
    up = shared_up
    failed = up.ask("models", "test", "broken")
    assert failed.returncode == 1
    assert failed.stderr.startswith("error [refused]: ")
    assert "-> promptmill job show " in failed.stderr
    done(up, "add", "wrong", "--type", "echo", "--option", "colour=green")
    wrong = up.ask("models", "test", "wrong", "--json")
    report = json.loads(wrong.stdout)
    assert (wrong.returncode, report["ok"], report["error"]["code"]) == (1, False, "bad_request")
    assert "options" in report["error"]["advice"]
    slow = up.ask("models", "test", "slow", "--timeout", "0.5")
    assert slow.returncode == 8
    job_id = re.search(r"job (\S+) was cancelled", slow.stderr)
    assert job_id
    assert json.loads(up.ask("job", "show", job_id[1], "--json").stdout)["state"] == "cancelled"
    done(up, "add", "lonely", "--type", "echo", "--family", "lab")
    lonely = up.ask("models", "test", "lonely")
    assert lonely.returncode == 7
    assert "error [not_ready]: no worker of the family lab" in lonely.stderr


def test_without_a_store_looking_goes_by_the_file_and_changing_fails(tmp_path: Path) -> None:
    (tmp_path / "promptmill.toml").write_text('redis_url = "redis://127.0.0.1:1/0"\n[models.m]\ntype = "echo"\n')
    changed = promptmill_here("models", "add", "x", "--type", "echo", home=tmp_path)
    assert changed.returncode == 5
    assert changed.stderr.startswith("error [store_unavailable]: ")
    # A configured store that is away may hold other models: the file alone would be a guess.
    assert promptmill_here("models", "list", home=tmp_path).returncode == 5
