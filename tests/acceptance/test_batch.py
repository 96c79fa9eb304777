"""`promptmill batch` as people use it: real workers, a real store, and everything killed on the way."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import block_until
from tests.support.simulator import SimulatorHandle, running_simulator
from tests.support.store import StoreServer, running_store
from tests.support.up import ENDED_S, PROMPTMILL, Up, environment, promptmill
from tests.support.worker import WorkerProcess, worker_process

Lines = list[dict[str, Any]]


def prompts(count: int, **fields: Any) -> Lines:
    return [{"id": f"line-{n}", "prompt": f"What is {n}?", **fields} for n in range(count)]


def write(path: Path, lines: Lines) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(path: Path) -> Lines:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@contextmanager
def command(home: Path, *arguments: str) -> Generator[subprocess.Popen[bytes]]:
    """A command that goes on while the test does other things; it is gone after the block."""
    process = subprocess.Popen(
        [*PROMPTMILL, *arguments],
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


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path


# -- the whole way, in each format ---------------------------------------------------------------------------------


def test_simple_lines_are_answered_and_failures_are_apart(shared_up: Up, home: Path) -> None:
    source = write(home / "p.jsonl", [*prompts(120, model="echo"), {"id": "bad", "prompt": "x", "model": "broken"}])
    results = home / "r.jsonl"
    done = shared_up.run("batch", "run", str(source), "-o", str(results), "--ordered")
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert f"120 answers in {results}, 1 failures in {home / 'r.failed.jsonl'}" in done.stderr
    assert [(line["id"], line["text"]) for line in read(results)] == [
        (f"line-{n}", f"What is {n}?") for n in range(120)
    ]
    (failure,) = read(home / "r.failed.jsonl")
    assert (failure["id"], failure["line"], failure["code"]) == ("bad", 121, "refused")
    again = shared_up.run("batch", "run", str(source), "-o", str(results), "--ordered")
    assert again.returncode == 1
    assert again.stderr.startswith("complete already: 120 answers")


def chat_line(name: str, url: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": url, "body": {"model": "gpt-of-somebody", **body}}


def test_a_providers_batch_file_gets_that_providers_results(shared_up: Up, home: Path) -> None:
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}]
    files: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], str]]] = {
        "chat": (
            chat_line("a", "/v1/chat/completions", messages=messages),
            lambda line: line["response"]["body"]["choices"][0]["message"]["content"],
        ),
        "responses": (
            chat_line("a", "/v1/responses", input="Hello", instructions="Be short."),
            lambda line: line["response"]["body"]["output"][0]["content"][0]["text"],
        ),
        "anthropic": (
            {"custom_id": "a", "params": {"model": "claude-x", "max_tokens": 50, "messages": messages[1:]}},
            lambda line: line["result"]["message"]["content"][0]["text"],
        ),
    }
    for name, (line, text_of) in files.items():
        source, results = write(home / f"{name}.jsonl", [line]), home / f"{name}.out.jsonl"
        done = shared_up.run("batch", "run", str(source), "-o", str(results), "-m", "echo")
        assert done.returncode == 0, done.stderr
        (answer,) = read(results)
        assert (answer["custom_id"], text_of(answer)) == ("a", "Hello")


def test_a_picture_in_a_line_arrives(shared_up: Up, home: Path) -> None:
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image", "url": "https://example.com/a.png"}]
    source = write(home / "p.jsonl", [{"id": "a", "messages": [{"role": "user", "content": parts}]}])
    done = shared_up.run("batch", "run", str(source), "-o", str(home / "r.jsonl"), "-m", "echo")
    assert done.returncode == 0, done.stderr
    assert read(home / "r.jsonl")[0]["text"] == "What is this?"


def test_rows_of_a_csv_on_standard_input_fill_a_template(shared_up: Up, home: Path) -> None:
    rows = 'name,town\nAda,London\n"Gödel, Kurt",Wien\n'
    options = ("-o", str(home / "r.jsonl"), "-m", "echo", "--template", "{name} of {town}", "--ordered")
    for _ in range(2):
        done = shared_up.run("batch", "run", "-", *options, stdin=rows)
        assert done.returncode == 0, done.stderr
    assert [(line["id"], line["text"]) for line in read(home / "r.jsonl")] == [
        ("2", "Ada of London"),
        ("3", "Gödel, Kurt of Wien"),
    ]


# -- nothing is spent for a mistake --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "options", "code", "says"),
    [
        ('{"id": 1, "prompt": "x"}\n{"id": 2}\n', (), 2, "line 2: request: give prompt or messages"),
        ('{"id": 1, "prompt": "x"}\n{"id": 1, "prompt": "y"}\n', (), 2, "line 2: id: '1' is the id of line 1, too"),
        ("", (), 2, "p.jsonl is empty"),
        ('{"prompt": "x"}\n', ("-m", "gone"), 2, "error [unknown_model]: line 1: there is no model 'gone'"),
        ('{"prompt": "x"}\n', ("--role", "gone"), 2, "error [unknown_role]: line 1: "),
        ('{"prompt": "x"}\n', ("--slot", "primary"), 2, "--slot needs --role"),
        ('{"prompt": "x"}\n', ("--failures", "r.jsonl"), 2, "two files"),
        ('{"prompt": "x"}\n', ("--format", "xml"), 2, "--format: one of openai"),
        ('{"prompt": "x"}\n', ("-o", "no/such/r.jsonl"), 6, "error [cannot_write]: no/such/r.jsonl cannot be written"),
        ('{"prompt": "x"}\n', ("-o", "-"), 2, "--output needs a file"),
    ],
)
def test_a_mistake_is_one_line_and_sends_nothing(
    shared_up: Up, home: Path, lines: str, options: tuple[str, ...], code: int, says: str
) -> None:
    (shared_up.home / "p.jsonl").write_text(lines)
    before = shared_up.run("batch", "list", "--json").stdout
    done = shared_up.run("batch", "run", "p.jsonl", "-o", "r.jsonl", *options)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (shared_up.home / "r.jsonl").exists()
    assert shared_up.run("batch", "list", "--json").stdout == before


def test_a_dry_run_needs_no_store(home: Path) -> None:
    (home / "promptmill.toml").write_text('[models.m]\ntype = "echo"\nprice = { input = 1.0, output = 2.0 }\n')
    source = write(home / "p.jsonl", prompts(1000, model="m", max_tokens=10))
    done = promptmill("batch", "run", str(source), "--dry-run", home=home)
    assert done.returncode == 0, done.stderr
    assert "1,000" in done.stdout
    assert "at most 10,000" in done.stdout
    assert "nothing was sent" in done.stdout


def test_without_a_store_the_error_says_what_to_do(home: Path) -> None:
    source = write(home / "p.jsonl", prompts(1))
    done = promptmill("batch", "run", str(source), "-o", "r.jsonl", home=home)
    assert done.returncode == 5
    assert "Start `promptmill up`" in done.stderr
    assert not (home / "r.jsonl").exists()


# -- interrupted ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_says_how_to_go_on_and_the_same_command_does(
    shared_up: Up, home: Path, number: signal.Signals
) -> None:
    # All of the others are answered within three seconds: the last word of this one keeps the batch open.
    held = ("models", "add", "held", "--type", "echo", "--option", "text=on ", "--option", "repeat=20")
    assert shared_up.ask(*held, "--option", "tokens_per_s=2").returncode == 0
    lines = [{"id": "held", "prompt": "x", "model": "held"}, *prompts(1500, model="paced")]
    source, results = write(home / "p.jsonl", lines), home / "r.jsonl"
    arguments = ("batch", "run", str(source), "-o", str(results), "--data-dir", str(shared_up.data_dir))
    with command(shared_up.home, *arguments) as process:
        block_until(lambda: count(results) > 10, "results come")
        process.send_signal(number)
        _, err = process.communicate(timeout=ENDED_S)
    assert process.returncode == 130, err
    batch_id = json.loads((home / "r.jsonl.promptmill.json").read_text())["batch_id"]
    assert f"Batch {batch_id} " in err.decode()
    assert "the same command goes on here" in err.decode()
    assert 10 < count(results) < len(lines)
    watched = shared_up.run("batch", "watch", batch_id)
    assert watched.returncode in {0, 1}, watched.stderr
    done = shared_up.run(*arguments[:-2])
    assert done.returncode == 0, done.stderr
    assert sorted(line["id"] for line in read(results)) == sorted(line["id"] for line in lines)


def test_a_disk_that_is_full_is_told_and_the_same_command_goes_on(shared_up: Up, home: Path) -> None:
    source, results = write(home / "p.jsonl", prompts(400)), home / "r.jsonl"
    arguments = ("batch", "run", str(source), "-o", str(results), "-m", "echo", "--data-dir", str(shared_up.data_dir))
    limited = subprocess.run(
        ["bash", "-c", 'ulimit -f 16; exec "$@"', "bash", *PROMPTMILL, *arguments],
        cwd=shared_up.home,
        env=environment(shared_up.home),
        capture_output=True,
        timeout=ENDED_S,
        check=False,
    )
    assert limited.returncode == 6, limited.stderr
    assert b"error [cannot_write]: " in limited.stderr
    assert b"make room and run the same command again" in limited.stderr
    assert b"Traceback" not in limited.stderr
    assert results.read_bytes()[-1:] in {b"", b"\n"}
    done = shared_up.run(*arguments[:-2])
    assert done.returncode == 0, done.stderr
    assert sorted(line["id"] for line in read(results)) == sorted(line["id"] for line in prompts(400))


class Stage:
    """A store, workers and a provider that counts, of the test's own: to be killed."""

    def __init__(self, home: Path, server: StoreServer, simulator: SimulatorHandle, stack: ExitStack) -> None:
        self.home, self.server, self.simulator, self._stack = home, server, simulator, stack
        self.config = home / "promptmill.toml"
        self.config.write_text(
            # A live worker must not look dead here, however busy the machine: its lines would be asked again, too.
            f'redis_url = "{server.url}"\nheartbeat_s = 0.5\ndead_after_s = 15\nconcurrency = 50\n'
            f'[models.sim]\ntype = "local_openai"\napi_url = "{simulator.url}/v1"\n'
            'model_name = "sim:tokens=4,rate=20"\n'
        )
        self._workers = 0

    def worker(self) -> WorkerProcess:
        self._workers += 1
        worker = self._stack.enter_context(worker_process(self.config, f"w{self._workers}"))
        # One that meets a store which loads its data at its start ends, and nobody here starts it again.
        asyncio.run(worker.ready(self.server.url))
        return worker

    def asked(self) -> Counter[str]:
        return Counter(r.body["messages"][-1]["content"] for r in self.simulator.requests)


@pytest.fixture
def stage(tmp_path: Path) -> Generator[Stage]:
    (tmp_path / "store").mkdir()
    with ExitStack() as stack:
        server = stack.enter_context(running_store(tmp_path / "store"))
        simulator = stack.enter_context(running_simulator())
        yield Stage(tmp_path, server, simulator, stack)


@pytest.mark.timeout(300)
def test_client_workers_and_store_are_killed_and_every_line_has_one_result(stage: Stage) -> None:
    lines = prompts(5000)
    source, results = write(stage.home / "p.jsonl", lines), stage.home / "r.jsonl"
    arguments = ("batch", "run", str(source), "-o", str(results), "-m", "sim")

    def until(done: int, process: subprocess.Popen[bytes]) -> None:
        def there() -> bool:
            assert process.poll() is None, process.stderr and process.stderr.read()
            return count(results) >= done

        block_until(there, f"{done} results", timeout_s=120)

    first, second = stage.worker(), stage.worker()
    with command(stage.home, *arguments) as client:
        until(300, client)
        client.kill()
    with command(stage.home, *arguments) as client:
        until(800, client)
        first.signal(signal.SIGKILL)
        stage.worker()
        until(1500, client)
        stage.server.kill()
        stage.server.start()
        until(2300, client)
        client.kill()
    with command(stage.home, *arguments) as client:
        until(2800, client)
        second.signal(signal.SIGKILL)
        _, err = client.communicate(timeout=200)
    assert client.returncode == 0, err
    assert b"5,000 answers in" in err
    found = read(results)
    assert len(found) == 5000
    assert {line["id"] for line in found} == {line["id"] for line in lines}
    often = stage.asked()
    assert set(often) == {line["prompt"] for line in lines}
    # Only what ran when its worker was killed was asked again: at most all slots of both.
    assert sum(times - 1 for times in often.values()) <= 2 * 40


# -- batches without their files -----------------------------------------------------------------------------------


def test_submit_names_the_batch_and_others_look_at_it(shared_up: Up, home: Path) -> None:
    source = write(home / "p.jsonl", [*prompts(30, model="echo"), {"id": "bad", "prompt": "x", "model": "broken"}])
    sent = shared_up.run("batch", "submit", str(source), "-o", str(home / "r.jsonl"), "--name", "nightly")
    assert sent.returncode == 0, sent.stderr
    batch_id = sent.stdout.strip()
    assert (
        shared_up.run("batch", "submit", str(source), "-o", str(home / "r.jsonl"), "--name", "nightly").stdout.strip()
        == batch_id
    )
    watched = shared_up.run("batch", "watch", batch_id, "--json")
    assert watched.returncode == 1
    end = json.loads(watched.stdout.splitlines()[-1])
    assert (end["event"], end["state"], end["succeeded"], end["failed"]) == ("end", "completed", 30, 1)
    shown = shared_up.run("batch", "status", batch_id)
    assert "nightly" in shown.stdout
    assert "refused 1" in shown.stdout
    assert batch_id in shared_up.run("batch", "list").stdout
    listed = json.loads(shared_up.run("batch", "list", "--json").stdout)["batches"]
    assert batch_id in {one["id"] for one in listed}
    answers = [json.loads(line) for line in shared_up.run("batch", "results", batch_id).stdout.splitlines()]
    assert sorted(line["id"] for line in answers) == sorted([*(f"line-{n}" for n in range(30)), "bad"])
    assert [line["error"]["code"] for line in answers if "error" in line] == ["refused"]
    retried = shared_up.run("batch", "retry-failed", batch_id)
    new_id = retried.stdout.strip()
    followed = shared_up.run("batch", "results", new_id, "--follow", "-o", str(home / "again.jsonl"))
    assert followed.returncode == 0, followed.stderr
    assert [line["id"] for line in read(home / "again.jsonl")] == ["bad"]
    assert shared_up.run("batch", "retry-failed", batch_id).stdout.strip() == new_id


def test_a_cancelled_batch_ends_and_its_lines_say_so(shared_up: Up, home: Path) -> None:
    source, results = write(home / "p.jsonl", prompts(300)), home / "r.jsonl"
    arguments = ("batch", "run", str(source), "-o", str(results), "-m", "slow", "--data-dir", str(shared_up.data_dir))
    with command(shared_up.home, *arguments) as process:
        sidecar = home / "r.jsonl.promptmill.json"
        block_until(lambda: sidecar.exists() and json.loads(sidecar.read_text())["stage"] == "sealed", "all is sent")
        batch_id = json.loads(sidecar.read_text())["batch_id"]
        assert shared_up.run("batch", "cancel", batch_id).returncode == 0
        _, err = process.communicate(timeout=ENDED_S)
    assert process.returncode == 4, err
    failed = read(home / "r.failed.jsonl")
    assert {line["code"] for line in failed} == {"cancelled"}
    assert sorted(line["id"] for line in [*failed, *read(results)]) == sorted(line["id"] for line in prompts(300))


def test_a_reader_of_results_that_leaves_is_no_error(shared_up: Up, home: Path) -> None:
    source = write(home / "p.jsonl", prompts(1000, system="x" * 200))
    done = shared_up.run("batch", "run", str(source), "-o", str(home / "r.jsonl"), "-m", "echo")
    assert done.returncode == 0, done.stderr
    batch_id = json.loads((home / "r.jsonl.promptmill.json").read_text())["batch_id"]
    with command(shared_up.home, "batch", "results", batch_id, "--data-dir", str(shared_up.data_dir)) as process:
        assert process.stdout
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr
        err = process.stderr.read()
        assert process.wait(ENDED_S) == 0
    assert err == b""


def test_a_batch_that_is_not_there_is_told(shared_up: Up) -> None:
    for name in ("status", "watch", "results", "cancel", "retry-failed"):
        done = shared_up.run("batch", name, "nothing")
        assert (done.returncode, done.stdout) == (3, "")
        assert done.stderr == "error [not_found]: there is no batch nothing\n"
