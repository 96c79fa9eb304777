"""`batch run` against a server that is none: interrupted anywhere it goes on, and each line is answered once."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promptmill.batch.files.sidecar import Sidecar
from promptmill.batch.files.writing import LineFile
from promptmill.cli import batch_dry, batch_run, batch_sync, exits
from promptmill.cli.batch_options import BatchOptions
from promptmill.cli.batch_outputs import Outputs
from promptmill.cli.batch_progress import Pace, View, duration
from promptmill.errors import BadRequest, NotFound, PromptmillError, StoreUnavailable
from promptmill.live import LiveRegistry
from promptmill.settings import Settings
from tests.support.batches import COST_USD, FakeBatch, FakeBatches

SETTINGS = Settings.model_validate(
    {
        "models": {
            "m": {"type": "echo", "price": {"input": 1.0, "output": 2.0}},
            "sonnet": {"type": "anthropic_api", "model_name": "claude-x-1"},
        }
    }
)


class FakeProducer:
    def __init__(self, batches: FakeBatches) -> None:
        self.batches = batches
        self.live = LiveRegistry(SETTINGS.model_copy(update={"live_registry": False}))

    async def store(self) -> Any:
        return None


class NoTraffic:
    def __init__(self, store: Any, name: str) -> None:
        pass

    async def cooldowns(self) -> list[Any]:
        return []


class Bench:
    """A directory, a server, and the command."""

    def __init__(self, home: Path, patch: pytest.MonkeyPatch) -> None:
        self.home = home
        self.server = FakeBatches()
        self.input = home / "prompts.jsonl"
        self.results = home / "results.jsonl"
        self.failures = home / "results.failed.jsonl"

        @asynccontextmanager
        async def open_producer(settings: Settings) -> AsyncGenerator[FakeProducer]:
            yield FakeProducer(self.server)

        patch.setattr(batch_run, "open_producer", open_producer)
        patch.setattr(batch_run, "Traffic", NoTraffic)
        for name in ("_LOOK_S", "_AGAIN_MIN_S", "_AGAIN_MAX_S", "SAVE_S"):
            patch.setattr(batch_sync, name, 0.0)

    def write(self, lines: list[Any]) -> None:
        self.input.write_bytes(b"".join(x if isinstance(x, bytes) else json.dumps(x).encode() + b"\n" for x in lines))

    def run(self, *, overwrite: bool = False, ordered: bool = False, collect: bool = True, **options: Any) -> int:
        chosen = BatchOptions(input=str(self.input), **options)
        outputs = Outputs.of(self.results, None, chosen.sample, overwrite=overwrite, ordered=ordered)
        return batch_run.run_batch(SETTINGS, chosen, outputs, as_json=False, collect=collect)

    def read(self, path: Path | None = None) -> list[dict[str, Any]]:
        text = (path or self.results).read_text() if (path or self.results).exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    @property
    def sidecar(self) -> Sidecar:
        found = Sidecar.load(self.home / "results.jsonl.promptmill.json")
        assert found is not None
        return found


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def prompts(count: int, **fields: Any) -> list[dict[str, Any]]:
    return [{"id": f"line-{n}", "prompt": f"What is {n}?", "model": "m", **fields} for n in range(count)]


def ids(lines: list[dict[str, Any]]) -> list[str]:
    return sorted(line["id"] for line in lines)


def test_every_line_is_answered_once(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.write(prompts(250))
    assert bench.run() == exits.OK
    assert ids(bench.read()) == ids(prompts(250))
    assert {line["text"] for line in bench.read()} == {f"re: What is {n}?" for n in range(250)}
    assert not bench.failures.exists()
    assert (bench.sidecar.stage, bench.sidecar.total) == ("complete", 250)
    told = capsys.readouterr()
    assert told.out == ""
    assert f"completed: 250 answers in {bench.results}" in told.err
    assert "cost $0.2500" in told.err


def test_the_same_command_after_the_end_asks_nobody(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.write(prompts(3))
    bench.run()
    bench.server.calls.clear()
    assert bench.run() == exits.OK
    assert not bench.server.calls
    assert "complete already: 3 answers" in capsys.readouterr().err


def test_results_that_somebody_took_out_come_again(bench: Bench) -> None:
    bench.write(prompts(9))
    bench.run()
    bench.results.write_bytes(b"".join(bench.results.read_bytes().splitlines(keepends=True)[:4]))
    assert bench.run() == exits.OK
    assert ids(bench.read()) == ids(prompts(9))
    assert set(bench.server.only.runs.values()) == {1}


def test_failures_go_to_a_file_of_their_own_with_class_and_line(bench: Bench) -> None:
    bench.write([*prompts(3), {"id": "bad", "prompt": "refuse this", "model": "m"}])
    assert bench.run() == exits.FAILED
    assert ids(bench.read()) == ids(prompts(3))
    (failure,) = bench.read(bench.failures)
    assert failure == {
        "id": "bad",
        "line": 4,
        "code": "refused",
        "message": "no",
        "retryable": False,
        "job_id": "job-3",
        "attempts": 0,
        "input": {"id": "bad", "prompt": "refuse this", "model": "m"},
    }


class Killed(BaseException):
    """The process is gone: nothing of it runs any more, no clean-up either."""


class Fate:
    """What happens at which step: ``kill``, ``away`` (the store, for one call) or ``lose`` (its last writes)."""

    def __init__(self, server: FakeBatches, plan: dict[int, str]) -> None:
        self.server, self.plan, self.at, self.dead = server, plan, 0, False

    def step(self) -> None:
        if self.dead:
            raise Killed
        self.at += 1
        what = self.plan.get(self.at)
        if what == "kill":
            self.dead = True
            raise Killed
        if what == "lose":
            self.server.lose(ended=4, lines=3)
            raise StoreUnavailable("it restarts")
        if what == "away":
            raise StoreUnavailable("it is away")


def with_steps(original: Callable[..., Any], fate: Fate) -> Callable[..., Any]:
    def act(*args: Any) -> Any:
        local_step(fate)
        answer = original(*args)
        local_step(fate)
        return answer

    return act


def local_step(fate: Fate) -> None:
    """A step on this machine, where the store's absence is not felt."""
    with suppress(StoreUnavailable):
        fate.step()


@given(
    count=st.integers(1, 60),
    seed=st.integers(0, 1000),
    plan=st.dictionaries(st.integers(1, 90), st.sampled_from(["kill", "kill", "away", "lose"]), max_size=8),
    torn=st.integers(0, 40),
)
@settings(deadline=None, max_examples=60)
def test_killed_anywhere_the_same_command_ends_with_each_line_once(
    tmp_path_factory: pytest.TempPathFactory, count: int, seed: int, plan: dict[int, str], torn: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        bench = Bench(tmp_path_factory.mktemp("x"), patch)
        bench.server = FakeBatches(seed, at_once=4)
        patch.setattr(BatchOptions, "head", lambda self, size, form: small_head(self, form))
        fate = Fate(bench.server, plan)
        bench.server.step = fate.step
        patch.setattr(LineFile, "flush", with_steps(LineFile.flush, fate))
        patch.setattr(Sidecar, "save", with_steps(Sidecar.save, fate))
        lines = [
            {**line, "prompt": f"{line['prompt']}{' refuse' * (n % 5 == 0)}"} for n, line in enumerate(prompts(count))
        ]
        bench.write(lines)
        for _ in range(len(plan) + 1):
            fate.dead = False
            try:
                code = bench.run()
                break
            except (Killed, BaseExceptionGroup):
                tear(bench.results, torn)
            except StoreUnavailable:
                continue  # away at the very first question: said so, and run again
        else:
            pytest.fail("it did not end")
        refused = [line["id"] for n, line in enumerate(lines) if n % 5 == 0]
        answered = [line["id"] for n, line in enumerate(lines) if n % 5]
        assert ids(bench.read()) == sorted(answered)
        assert ids(bench.read(bench.failures)) == sorted(refused)
        assert code == exits.FAILED
        batch = bench.server.only
        assert set(batch.runs.values()) == {1}


def small_head(options: BatchOptions, form: str) -> Any:
    """A head whose chunks are small enough to have several in a test."""
    from promptmill.batch.models import BatchHead

    return BatchHead(user=options.user, chunk_lines=7, options={"format": form})


def tear(path: Path, count: int) -> None:
    """Cut bytes off: what a machine that loses its power may do to what was not yet on its disk."""
    if path.exists():
        data = path.read_bytes()
        path.write_bytes(data[: max(0, len(data) - count)])


# -- refusals ------------------------------------------------------------------------------------------------------


def test_another_input_is_refused_and_the_results_stay(bench: Bench) -> None:
    bench.write(prompts(3))
    bench.run()
    before = bench.results.read_bytes()
    bench.write(prompts(4))
    with pytest.raises(BadRequest, match="holds results of another input"):
        bench.run()
    assert bench.results.read_bytes() == before


def test_other_options_are_refused(bench: Bench) -> None:
    bench.write(prompts(3))
    bench.run()
    with pytest.raises(BadRequest, match="with another --max-tokens"):
        bench.run(request={"max_tokens": 5})


def test_results_of_somebody_else_are_not_touched(bench: Bench) -> None:
    bench.write(prompts(3))
    bench.results.write_text("mine\n")
    with pytest.raises(BadRequest, match="exists; choose another file, or --overwrite"):
        bench.run()
    assert bench.results.read_text() == "mine\n"
    assert not bench.server.calls
    assert bench.run(overwrite=True) == exits.OK
    assert ids(bench.read()) == ids(prompts(3))


def test_overwrite_begins_anew_after_the_end_and_goes_on_before_it(bench: Bench) -> None:
    bench.write(prompts(20))
    fate = Fate(bench.server, {12: "kill"})
    bench.server.step = fate.step
    with pytest.raises((Killed, BaseExceptionGroup)):
        bench.run(overwrite=True)
    fate.dead, fate.plan = False, {}
    assert bench.run(overwrite=True) == exits.OK
    assert len(bench.server.batches) == 1
    assert bench.run(overwrite=True) == exits.OK
    assert len(bench.server.batches) == 2
    assert ids(bench.read()) == ids(prompts(20))


def test_nothing_is_sent_where_a_line_is_wrong(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.write([*prompts(2), {"id": "x"}, b"{\n"])
    with pytest.raises(BadRequest, match="2 of 4 lines are wrong; nothing was sent"):
        bench.run()
    assert not bench.server.calls
    assert not bench.results.exists()
    assert capsys.readouterr().err.startswith("line 3: request: give prompt or messages\nline 4: not JSON")


def test_a_model_that_nobody_has_names_the_lines(bench: Bench) -> None:
    bench.server.known_models = {"m"}
    bench.write([*prompts(2), {"id": "x", "prompt": "x", "model": "gone"}, {"id": "y", "prompt": "y", "model": "gone"}])
    with pytest.raises(BadRequest, match="2 lines, from line 3 on: there is no model 'gone'") as caught:
        bench.run()
    assert caught.value.code == "unknown_model"
    assert not bench.server.batches
    assert not bench.results.exists()


def test_a_results_file_that_cannot_be_is_told_before_anything_is_read(bench: Bench) -> None:
    bench.write(prompts(1))
    bench.results = bench.home / "not" / "there.jsonl"
    with pytest.raises(PromptmillError, match="there is no directory") as caught:
        bench.run()
    assert (caught.value.code, exits.exit_code(caught.value)) == ("cannot_write", exits.CONFIGURATION)


@pytest.mark.parametrize(("output", "failures"), [("-", None), ("a", "a")])
def test_outputs_that_cannot_be_gone_on_with_are_refused(output: str, failures: str | None) -> None:
    with pytest.raises(BadRequest):
        Outputs.of(Path(output), Path(failures) if failures else None, None, overwrite=False, ordered=False)


def test_a_batch_that_the_store_forgot_is_not_paid_for_again(bench: Bench) -> None:
    bench.write(prompts(20))
    fate = Fate(bench.server, {12: "kill"})
    bench.server.step = fate.step
    with pytest.raises((Killed, BaseExceptionGroup)):
        bench.run()
    fate.dead, fate.plan = False, {}
    bench.server.batches.clear()
    with pytest.raises(NotFound, match=r"is no longer in the store; .* To begin anew, and pay again, delete"):
        bench.run()
    assert not bench.server.batches


# -- options -------------------------------------------------------------------------------------------------------


def test_lines_that_are_left_out_are_reported_once(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.write([prompts(1)[0], b'{"id": \n', *prompts(3)[1:]])
    assert bench.run(skip_bad=True) == exits.FAILED
    assert "left out: line 2: not JSON" in capsys.readouterr().err
    assert bench.run(skip_bad=True) == exits.FAILED
    (failure,) = bench.read(bench.failures)
    assert (failure["id"], failure["line"], failure["code"], failure["input"]) == (None, 2, "bad_request", '{"id": ')
    assert ids(bench.read()) == ids(prompts(3))


def test_results_are_in_order_where_that_was_asked_for(bench: Bench) -> None:
    bench.write(prompts(40))
    bench.run(ordered=True)
    assert [line["id"] for line in bench.read()] == [line["id"] for line in prompts(40)]


def test_results_are_put_in_order_after_the_end_too(bench: Bench) -> None:
    bench.write(prompts(40))
    bench.run()
    assert [line["id"] for line in bench.read()] != [line["id"] for line in prompts(40)]
    bench.server.calls.clear()
    bench.run(ordered=True)
    assert not bench.server.calls
    assert [line["id"] for line in bench.read()] == [line["id"] for line in prompts(40)]


def test_equal_lines_run_once_and_all_have_an_answer(bench: Bench) -> None:
    bench.write([{**line, "prompt": f"What is {n % 3}?"} for n, line in enumerate(prompts(9))])
    assert bench.run(dedupe=True) == exits.OK
    assert sum(bench.server.only.runs.values()) == 3
    assert ids(bench.read()) == ids(prompts(9))
    assert sum(line["cost_usd"] for line in bench.read()) == pytest.approx(3 * COST_USD)


def test_a_sample_has_files_of_its_own_and_says_what_all_would_cost(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.write(prompts(1000))
    assert bench.run(sample=4) == exits.OK
    sampled = bench.read(bench.home / "results.sample.jsonl")
    assert ids(sampled) == ["line-0", "line-250", "line-500", "line-750"]
    assert "all 1,000 lines would cost about $1.00" in capsys.readouterr().err
    assert not bench.results.exists()
    assert bench.run() == exits.OK
    assert len(bench.read()) == 1000


def test_what_must_cost_more_is_refused_before_anything_is_sent(bench: Bench) -> None:
    bench.write([{"id": "a", "prompt": "x" * 400_000, "model": "m"}])
    with pytest.raises(BadRequest, match=r"the prompts alone cost about \$0.10, over --max-cost 0.05") as caught:
        bench.run(max_cost_usd=0.05)
    assert caught.value.code == "budget_exceeded"
    assert not bench.server.batches


def test_what_costs_more_is_cancelled(bench: Bench) -> None:
    bench.write(prompts(200))
    with pytest.raises(PromptmillError, match=r"over --max-cost 0\.02") as caught:
        bench.run(max_cost_usd=0.02)
    assert (caught.value.code, exits.exit_code(caught.value)) == ("budget_exceeded", exits.USAGE)
    assert bench.server.calls["cancel"] == 1
    answered, failed = bench.read(), bench.read(bench.failures)
    assert {line["code"] for line in failed} == {"cancelled"}
    assert sorted(ids(answered) + ids(failed)) == ids(prompts(200))


def test_lines_of_a_cancelled_batch_that_never_ran_are_failures(bench: Bench) -> None:
    bench.write(prompts(60))
    seen: list[FakeBatch] = []

    def cancel_it() -> None:
        for batch in bench.server.batches.values():
            if batch.state == "running" and len(batch.ended) > 20 and not seen:
                seen.append(batch)
                batch.state = "cancelled"

    bench.server.step = cancel_it
    assert bench.run() == exits.CANCELLED
    answered, failed = bench.read(), bench.read(bench.failures)
    assert len(answered) > 20
    assert {line["code"] for line in failed} == {"cancelled"}
    assert sorted(ids(answered) + ids(failed)) == ids(prompts(60))


def test_submit_sends_all_and_run_brings_the_answers(bench: Bench) -> None:
    bench.write(prompts(150))
    assert bench.run(collect=False) == exits.OK
    assert bench.server.only.total == 150
    assert bench.read() == []
    assert bench.sidecar.stage == "sealed"
    assert bench.run() == exits.OK
    assert ids(bench.read()) == ids(prompts(150))
    assert bench.server.calls["add"] == 2


def test_the_providers_name_of_a_model_is_found(bench: Bench) -> None:
    params = {"model": "claude-x-1", "max_tokens": 5, "messages": [{"role": "user", "content": "x"}]}
    bench.write([{"custom_id": "a", "params": params}])
    assert bench.run() == exits.OK
    assert bench.server.only.lines[0].request["model"] == "sonnet"
    assert bench.read()[0]["result"]["message"]["content"][0]["text"] == "re: x"


def test_a_dry_run_sends_nothing(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def look(settings: Settings) -> LiveRegistry:
        return LiveRegistry(settings)

    monkeypatch.setattr(batch_dry, "look", look)
    bench.write([*prompts(3, max_tokens=10), {"id": "s", "prompt": "x", "model": "sonnet"}])
    options = BatchOptions(input=str(bench.input))
    assert batch_dry.dry_run(SETTINGS, options, as_json=True) == exits.OK
    told = json.loads(capsys.readouterr().out)
    assert (told["lines"], told["format"]) == (4, "simple")
    assert told["models"][0] == {
        "model": "m",
        "lines": 3,
        "input_tokens": 9,
        "output_tokens_max": 30,
        "min_usd": 9e-6,
        "max_usd": 6.9e-5,
    }
    assert told["models"][1]["output_tokens_max"] is None
    assert batch_dry.dry_run(SETTINGS, options, as_json=False) == exits.OK
    assert "at most 30" in capsys.readouterr().out
    with pytest.raises(BadRequest, match="there is no model 'x'"):
        batch_dry.dry_run(SETTINGS, replace(options, request={"model": "x"}), as_json=False)
    assert not bench.server.calls


# -- what is shown -------------------------------------------------------------------------------------------------


def test_the_pace_is_that_of_the_last_half_minute() -> None:
    pace = Pace()
    for second in range(100):
        pace.take(min(second, 50) * 10 + max(0, second - 50), float(second))
    assert pace.rate == pytest.approx(1.0)
    assert pace.left_s(649) == pytest.approx(100.0)
    pace.take(3, 100.0)
    assert (pace.rate, pace.left_s(649)) == (None, None)


async def test_a_view_says_all_in_one_line() -> None:
    server = FakeBatches(at_once=20)
    server.batches["B"] = batch = FakeBatch(head=small_head(BatchOptions(input="x"), "simple"))
    from promptmill.batch.models import BatchLine

    batch.lines = [
        BatchLine(str(n), {"messages": [{"role": "user", "content": "refuse" if n == 0 else "x"}]}) for n in range(40)
    ]
    batch.state, batch.total = "running", 40
    view = View()
    view.take(await server.status("B"))
    line = view.line()
    assert line.startswith("20 of 40 (50 %); ")
    assert "models m 20; tokens 60 in, 40 out; cost $0.0" in line


@pytest.mark.parametrize(("seconds", "text"), [(None, "?"), (45.2, "45 s"), (720, "12 min"), (12_240, "3.4 h")])
def test_durations_are_for_people(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text
