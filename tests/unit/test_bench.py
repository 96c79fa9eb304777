"""The benchmark: parsing, figures, tables, readers. A wrong figure would be believed, so they are tested too."""

from __future__ import annotations

import itertools
import math
import threading
import time
import tomllib
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ops.bench import report
from ops.bench.load import JobOutcome, Plan, run_load, stored_texts
from ops.bench.measure import Result, Scenario, Summary, summarise
from ops.bench.proc_stats import owners, parse_stat
from ops.bench.profiling import hot_spots
from ops.bench.run import PAGE, SCENARIOS, parse_arguments, quick
from ops.bench.sse import Event, Piece, SSEParser, event_dialect, openai_dialect
from ops.bench.stats import median, percentile, spread_percent
from ops.bench.systems import PromptmillTarget, config_text

STREAM = (
    b": keepalive\n\n"
    b"retry: 1000\r\nid: 7-1\r\nevent: token\r\ndata: one\r\n\r\n"
    b"data:two\ndata: three\n\n"
    b"id: 7-2\n\n"
    b"event: done\ndata: {}\n\n"
    b"data: cut"
)
EVENTS = [Event(b"token", b"one"), Event(b"message", b"two\nthree"), Event(b"done", b"{}")]


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_sse_events_do_not_depend_on_where_the_bytes_are_split(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    parser = SSEParser()
    events = [event for start, end in itertools.pairwise(edges) for event in parser.feed(STREAM[start:end])]
    assert events == EVENTS


def test_an_openai_stream_gives_its_text_and_ends_at_done() -> None:
    chunk = Event(b"message", b'{"choices":[{"index":0,"delta":{"content":"12 "}}]}')
    assert openai_dialect(chunk) == Piece("12 ", "")
    assert openai_dialect(Event(b"message", b'{"choices":[{"index":0,"delta":{}}]}')) == Piece("", "")
    assert openai_dialect(Event(b"message", b'{"choices":[],"usage":{}}')) == Piece("", "")
    assert openai_dialect(Event(b"message", b'{"error":{"message":"overloaded"}}')) == Piece("", "error")
    assert openai_dialect(Event(b"message", b"[DONE]")) == Piece("", "done")


def test_job_events_give_text_ends_and_restarts_and_unknown_ones_are_ignored() -> None:
    assert event_dialect(Event(b"token", b'{"type":"token","text":"1 2 "}')) == Piece("1 2 ", "")
    for name in (b"done", b"error", b"cancelled", b"restart"):
        assert event_dialect(Event(name, b"{}")) == Piece("", name.decode())
    assert event_dialect(Event(b"progress", b"{}")) == Piece("", "")


def test_percentiles_are_the_nearest_rank() -> None:
    ordered = list(range(1, 101))
    assert [percentile(ordered, percent) for percent in (0, 1, 50, 99, 100)] == [1, 1, 50, 99, 100]
    assert percentile([5.0], 99) == 5.0
    assert math.isnan(percentile([], 50))
    with pytest.raises(ValueError, match="between 0 and 100"):
        percentile([1.0], 101)


def test_medians_and_spreads_leave_out_what_is_missing() -> None:
    assert median([3.0, math.nan, 1.0]) == 2.0
    assert median([9.0, 1.0, 2.0]) == 2.0
    assert math.isnan(median([math.nan]))
    assert spread_percent([90.0, 100.0, 110.0]) == pytest.approx(20.0)
    assert math.isnan(spread_percent([1.0]))


def test_cpu_is_read_past_a_command_name_with_spaces_and_parentheses() -> None:
    fields = "S 41 1 1 0 -1 4194560 1 1 0 0 100 50 25 25 20 0 1 0 1"
    parent, seconds = parse_stat(f"42 (a) b (c)) {fields}")
    assert parent == 41
    assert seconds == pytest.approx(2.0)


def test_a_process_belongs_to_its_nearest_root() -> None:
    parents = {1: 0, 10: 1, 11: 10, 12: 11, 20: 10, 21: 20, 30: 1}
    found = owners(parents, {"supervisor": [10], "worker": [20], "reader": [20]})
    assert found == {10: "supervisor", 11: "supervisor", 12: "supervisor", 20: "worker", 21: "worker"}


def test_hot_spots_count_a_recursive_function_once_a_sample() -> None:
    text = hot_spots("main;walk;walk 3\nmain;read 1\n")
    own, inclusive = text.split("with callees")
    assert " 75.0 %  walk" in own
    assert " 25.0 %  read" in own
    assert " 75.0 %  walk" in inclusive
    assert "100.0 %  main" in inclusive


def test_the_configuration_names_every_simulator_specification() -> None:
    scenario = SCENARIOS["stream"]
    models = tomllib.loads(config_text("http://127.0.0.1:9", scenario.model_names()))["models"]
    assert models["sim"]["model_name"] == "sim:tokens=100,rate=50,first=0.2,stamp=1"
    assert models["one"]["model_name"] == "sim:tokens=1,rate=50,first=0.2,stamp=1"
    assert {model["api_url"] for model in models.values()} == {"http://127.0.0.1:9/v1"}


def test_a_signed_stream_url_keeps_its_query_whether_relative_or_whole() -> None:
    target = PromptmillTarget(url="http://127.0.0.1:9", models={})
    paths = ("/v1/jobs/a/stream?sig=b%2F", "/v1/jobs/a")
    assert target.job_paths(b'{"id":"a","stream_url":"/v1/jobs/a/stream?sig=b%2F"}') == paths
    assert target.job_paths(b'{"id":"a","stream_url":"http://host:1/v1/jobs/a/stream?sig=b%2F"}') == paths


def result(system: str, *, p50_ms: float, p99_ms: float, cpu_us: float, lost: float = 0) -> Result:
    return Result(
        scenario="stream",
        system=system,
        tokens_expected=20000,
        tokens_lost=lost,
        no_end=0,
        failed=0,
        disorder=0,
        text_differs=0,
        p50_ms=p50_ms,
        p99_ms=p99_ms,
        max_ms=p99_ms,
        tokens_per_s=6000,
        submitting_s=1,
        cpu_us={"worker": cpu_us, "relay": 0, "redis": 0, "supervisor": 1000} if cpu_us else {},
        foreign_percent=1,
    )


def stream_summaries(*, promptmill_cpu_us: float, p99_ms: float = 30, lost: float = 0) -> dict[str, Summary]:
    return {
        "direct": summarise([result("direct", p50_ms=1, p99_ms=2, cpu_us=0)]),
        "baseline": summarise([result("baseline", p50_ms=50, p99_ms=400, cpu_us=450)]),
        "promptmill": summarise([result("promptmill", p50_ms=5, p99_ms=p99_ms, cpu_us=promptmill_cpu_us, lost=lost)]),
    }


def test_a_summary_takes_medians_but_the_worst_round_for_losses() -> None:
    rounds = [result("baseline", p50_ms=p50, p99_ms=9, cpu_us=p50, lost=lost) for p50, lost in ((1, 0), (3, 7), (2, 1))]
    summary = summarise(rounds)
    assert summary.result.tokens_lost == 7
    assert summary.result.p50_ms == 2
    assert summary.result.cpu_us["worker"] == 2
    assert summary.result.cpu_sum_us == 2, "the supervisor is not in the sum"
    assert summary.cpu_spread_percent == pytest.approx(100)
    assert rounds[0].tokens_lost == 0, "the rounds stay as they were measured"


def test_bars_hold_only_below_their_limits() -> None:
    good = report.bars({"stream": stream_summaries(promptmill_cpu_us=150, p99_ms=61.9)})
    assert [bar.held for bar in good] == [True, True, True, True]
    bad = report.bars({"stream": stream_summaries(promptmill_cpu_us=151, p99_ms=62, lost=1)})
    assert [bar.held for bar in bad] == [False, True, False, False]


def test_a_bar_that_could_not_be_measured_is_not_held() -> None:
    only = {"promptmill": stream_summaries(promptmill_cpu_us=10)["promptmill"]}
    assert [bar.held for bar in report.bars({"stream": only})] == [True, True, False, False]
    assert report.bars({"stream": {}}) == []


def test_tables_are_markdown_with_one_row_a_system() -> None:
    text = report.scenario_table(stream_summaries(promptmill_cpu_us=150))
    seen, cost = text.split("\n\n")
    assert [line.split("|")[1].strip() for line in seen.splitlines()[2:]] == ["direct", "baseline", "promptmill"]
    assert [line.split("|")[1].strip() for line in cost.splitlines()[2:]] == ["baseline", "promptmill"]
    assert "0.33" in cost
    for part in (seen, cost):
        assert len({line.count("|") for line in part.splitlines()}) == 1


def test_only_the_generated_block_of_the_page_is_replaced() -> None:
    page = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    once = report.replace_block(page, "new\n")
    assert once == f"before\n{report.BEGIN}\n\nnew\n\n{report.END}\nafter\n"
    assert report.replace_block(once, "new\n") == once
    with pytest.raises(ValueError, match="once each"):
        report.replace_block("no markers", "new")


def test_the_documentation_has_the_markers_that_the_command_needs() -> None:
    assert "new figures" in report.replace_block(PAGE.read_text(), "new figures")


def test_quick_runs_are_smaller_in_every_scenario() -> None:
    for scenario in SCENARIOS.values():
        small = quick(scenario)
        assert small.plan.jobs * small.plan.tokens < scenario.plan.jobs * scenario.plan.tokens
        assert small.name == scenario.name


def test_rounds_below_one_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--rounds", "0"])
    assert "--rounds must be at least 1" in capsys.readouterr().err


def token_event(*stamps: int) -> bytes:
    text = "".join(f"{stamp} " for stamp in stamps)
    return f'event: token\ndata: {{"type":"token","text":"{text}"}}\n\n'.encode()


DONE = b"event: done\ndata: {}\n\n"


class ScriptedRelay(BaseHTTPRequestHandler):
    """Jobs are numbered from 0; job n's stream is ``scripts[n]``, sent byte by byte, then held open unless ``cut``."""

    protocol_version = "HTTP/1.1"
    scripts: list[bytes]
    cut: bool
    submitted: list[int]
    released: threading.Event

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        job = len(self.submitted)
        self.submitted.append(job)
        self.answer(202, f'{{"id":"{job}","stream_url":"/v1/jobs/{job}/stream"}}'.encode())

    def do_GET(self) -> None:
        job = int(self.path.split("/")[3])
        if not self.path.endswith("/stream"):
            self.answer(200 if job == 0 else 404, b'{"text":"stored"}')
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for byte in self.scripts[job]:
            self.wfile.write(b"1\r\n%c\r\n" % byte)
        if self.cut:
            self.close_connection = True
        else:
            self.released.wait()


@contextmanager
def relay(*scripts: bytes, cut: bool = False) -> Generator[PromptmillTarget]:
    state = {"scripts": list(scripts), "cut": cut, "submitted": [], "released": threading.Event()}
    handler = type("Handler", (ScriptedRelay,), state)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield PromptmillTarget(url=f"http://127.0.0.1:{server.server_port}", models={one_token(1).model: "sim"})
        finally:
            handler.released.set()
            server.shutdown()
            thread.join()


def one_token(jobs: int, *, stall_s: float = 30) -> Plan:
    return Plan(jobs=jobs, tokens=1, rate=1, first_s=0, sequential=True, stall_s=stall_s)


def test_a_reader_counts_each_token_of_merged_events_and_stops_at_the_end() -> None:
    now = time.monotonic_ns()
    with relay(token_event(now - 2_000_000, now - 1_000_000) + token_event(now) + DONE) as target:
        loaded = run_load(target, one_token(1))
    (outcome,) = loaded.outcomes
    assert (outcome.tokens, outcome.end, outcome.ended, outcome.disorder) == (3, "done", True, 0)
    assert "".join(outcome.parts) == f"{now - 2_000_000} {now - 1_000_000} {now} "
    first, second, third = loaded.latencies_ns
    assert first >= 2_000_000
    assert second >= 1_000_000
    assert third > 0


def test_a_token_that_comes_twice_is_counted_as_disorder() -> None:
    with relay(token_event(5) + token_event(6) + token_event(6) + DONE) as target:
        (outcome,) = run_load(target, one_token(1)).outcomes
    assert (outcome.tokens, outcome.disorder) == (3, 1)


def test_a_reader_without_an_end_is_given_up_and_the_next_job_still_runs() -> None:
    with relay(token_event(5), token_event(6) + DONE) as target:
        lost, good = run_load(target, one_token(2, stall_s=2)).outcomes
    assert (lost.tokens, lost.end, lost.ended) == (1, "", False)
    assert good.ended


def test_a_connection_that_closes_before_the_end_is_no_end() -> None:
    with relay(token_event(5), cut=True) as target:
        (outcome,) = run_load(target, one_token(1)).outcomes
    assert outcome.tokens == 1
    assert not outcome.ended
    assert outcome.end.startswith("ConnectionResetError")


def test_a_restart_makes_the_reader_count_anew() -> None:
    with relay(token_event(5) + b"event: restart\ndata: {}\n\n" + token_event(6) + DONE) as target:
        (outcome,) = run_load(target, one_token(1)).outcomes
    assert (outcome.tokens, outcome.parts) == (1, ["6 "])


def test_a_job_without_a_stored_text_has_none() -> None:
    paths = ["/v1/jobs/0", "", "/v1/jobs/1"]
    with relay() as target:
        assert stored_texts(target, [JobOutcome(stored_path=path) for path in paths]) == ["stored", None, None]


def test_jobs_of_one_token_cost_apart() -> None:
    scenario = Scenario(name="a", title="a", plan=Plan(jobs=9, tokens=7, rate=50, first_s=0.1), cost_jobs=3)
    assert (scenario.cost_plan.jobs, scenario.cost_plan.tokens, scenario.cost_plan.rate) == (3, 1, 50)
    assert len(scenario.model_names()) == 3
