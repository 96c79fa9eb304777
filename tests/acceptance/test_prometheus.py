"""Rules and dashboards against a real deployment: each metric and label that they name exists, and a real Prometheus
scrapes the processes and evaluates all of it.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections import defaultdict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from promptmill.failures import CLASSES
from promptmill.up.embedded import free_port
from tests.support.metrics import Figures
from tests.support.processes import PATIENCE_S, block_until, wait_gone
from tests.support.promql import (
    RULES,
    Expression,
    Selector,
    asked_by_the_runbook,
    expressions,
    panels,
    parse,
    program,
    rules,
)
from tests.support.up import ENDED_S, PROMPTMILL, Up, environment

pytestmark = pytest.mark.xdist_group("prometheus")

CONFIG = """
metrics_port = 0
[models.priced]
type = "echo"
price = { input = 3, output = 15 }
[models.slow]
type = "echo"
options = { text = "one two three ", repeat = 2000, tokens_per_s = 20 }
[models.locked]
type = "echo"
options = { fault = "auth" }
[models.apart]
type = "echo"
isolation = "process"
"""
SCRAPED = re.compile(r"metrics at http://(127\.0\.0\.1:\d+)/metrics")
OF_EVERY_TARGET = {"job", "instance"}
MAY_BE_EMPTY = re.compile(r"ALERTS|> 0$")
"""What shows only what is not well, or not as usual."""
OTHER_CODES = {"poisoned", "unknown_model", "unknown_role", "budget_exceeded", "cancelled"}
NOT_OURS = {"ALERTS": {"alertname", "alertstate", "severity"}, "up": set[str]()}
"""Prometheus's own."""

Values = dict[str, dict[str, set[str]]]
"""The values of each label, by the names of series."""


class Deployment:
    """A `promptmill up` with two families, and a relay beside it; what they serve is scraped from ``targets``."""

    def __init__(self, up: Up, relay_log: Path) -> None:
        self.up = up
        self._relay_log = relay_log
        self.url: str = up.about["url"]

    @property
    def relay_url(self) -> str:
        listens = re.search(r"relay listens on (http://\S+)", self._relay_log.read_text())
        return listens[1] if listens else ""

    @property
    def targets(self) -> list[str]:
        return SCRAPED.findall(self.up.err + self._relay_log.read_text())

    def values(self) -> Values:
        """All series that the processes have now."""
        found: Values = defaultdict(lambda: defaultdict(set))
        for target in self.targets:
            answer = httpx.get(f"http://{target}/metrics", timeout=PATIENCE_S, trust_env=False)
            for name, labels, _ in Figures(answer.text):
                found[name]  # without labels too
                for label, value in labels.items():
                    found[name][label].add(value)
        return found

    def post(self, path: str, **request: object) -> dict[str, Any]:
        answer = httpx.post(f"{self.url}{path}", json=request, timeout=PATIENCE_S, trust_env=False)
        return answer.raise_for_status().json()

    def read(self, url: str) -> str:
        """A stream to its end."""
        return httpx.get(url, timeout=PATIENCE_S, trust_env=False).text

    def run_jobs(self) -> None:
        """One of everything that makes a series of its own."""
        assert self.up.ask("run", "-m", "priced", "hello").returncode == 0
        assert self.up.ask("run", "-m", "locked", "hello").returncode == 1
        assert self.up.ask("run", "-m", "apart", "hello").returncode == 0
        prompts = self.up.home / "prompts.txt"
        prompts.write_text("one\ntwo\n")
        done = self.up.ask("batch", "run", str(prompts), "-o", str(self.up.home / "out.jsonl"), "-m", "priced")
        assert done.returncode == 0, done.stderr
        job = self.post("/v1/jobs", model="priced", prompt="hello")
        for base in (self.url, self.relay_url):
            assert "event: done" in self.read(base + job["stream_url"])
        job = self.post("/v1/jobs", model="slow", prompt="hello")
        assert self.post(f"/v1/jobs/{job['id']}/cancel")["state"] == "cancelled"


@contextmanager
def process(command: list[str], log: Path, home: Path) -> Generator[None]:
    with log.open("wb") as out:
        started = subprocess.Popen(command, cwd=home, env=environment(home), stdout=out, stderr=out)
    try:
        yield
    finally:
        started.terminate()
        try:
            started.wait(ENDED_S)
        finally:
            started.kill()
            started.wait()
        wait_gone([started.pid])


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Generator[Deployment]:
    home = tmp_path_factory.mktemp("prometheus")
    (home / "promptmill.toml").write_text(CONFIG)
    up = Up(home)
    log = home / "relay.log"
    try:
        up.wait_ready()
        relay = [*PROMPTMILL, "relay", "--port", "0", "--data-dir", str(up.data_dir)]
        with process(relay, log, home):
            found = Deployment(up, log)
            block_until(lambda: found.relay_url, "the relay listens")
            found.run_jobs()
            yield found
    finally:
        up.close()


class Known:
    """What there is to ask for: the processes' series, and those that rules record."""

    def __init__(self, values: Values) -> None:
        self.labels = {name: {*labels} - {"quantile"} | OF_EVERY_TARGET for name, labels in values.items()}
        self.labels |= {name: labels | OF_EVERY_TARGET for name, labels in NOT_OURS.items()}
        self.values: dict[str, set[str]] = defaultdict(set)
        for labels in values.values():
            for label, seen in labels.items():
                self.values[label] |= seen
        for label in ("code", "outcome"):
            self.values[label] |= {*CLASSES, *OTHER_CODES}
        for rule in rules():
            if "record" in rule:
                level = set(rule["record"].split(":")[0].split("_")) - {"deployment"}
                self.labels[rule["record"]] = level | ({"job"} if "instance" in level else set())

    def missing(self, place: str, found: Expression, text: str) -> list[str]:
        """What an expression, or the text that is made of its labels, names and is not there."""
        wrong: list[str] = []
        offered: set[str] = set()
        for one in found.selectors:
            if one.metric not in self.labels:
                wrong.append(f"{place}: there is no {one.metric}")
                continue
            offered |= self.labels[one.metric]
            wrong += [f"{place}: {one.metric} {problem}" for problem in self._wrong_matchers(one)]
        used = found.grouping | set(re.findall(r"\$labels\.(\w+)", text)) | set(re.findall(r"{{(\w+)}}", text))
        wrong += [f"{place}: nothing has the label {label}" for label in sorted(used - offered)]
        return wrong

    def _wrong_matchers(self, one: Selector) -> Generator[str]:
        for label, _, value in one.matchers:
            if label not in self.labels[one.metric]:
                yield f"has no label {label}"
            elif not value.startswith("$") and label in {"state", "kind", "priority", "outcome", "code", "phase"}:
                for word in value.split("|"):
                    if word and word not in self.values[label]:
                        yield f"has no {label} {word}"


def test_rules_and_dashboards_name_nothing_that_does_not_exist(deployment: Deployment) -> None:
    named = {one.metric for _, expr, _ in expressions() for one in parse(expr).selectors if ":" not in one.metric}
    assert len(named) > 40
    # The deployment is looked at every five seconds, and the ledger's sums less often.
    seen: Values = defaultdict(lambda: defaultdict(set))

    def all_there() -> bool:
        # All that was seen at some time: what a look at a busy store misses is missing from that look alone.
        for name, labels in deployment.values().items():
            for label, values in labels.items():
                seen[name][label] |= values
            seen[name]  # without labels too
        return named <= {*seen, *NOT_OURS}

    with contextlib.suppress(AssertionError):  # what is missing is named below, with its place
        block_until(all_there, "every metric is there")
    known = Known(seen)
    wrong = [problem for place, expr, text in expressions() for problem in known.missing(place, parse(expr), text)]
    assert wrong == []


def test_the_check_sees_names_that_do_not_exist(deployment: Deployment) -> None:
    known = Known(deployment.values())
    expr = 'sum by (nothing) (promptmill_jobs_total{stat="failed"}) / promptmill_joobs_total{state="faild"}'
    assert known.missing("here", parse(expr), "{{ $labels.family }}") == [
        "here: promptmill_jobs_total has no label stat",
        "here: there is no promptmill_joobs_total",
        "here: nothing has the label family",
        "here: nothing has the label nothing",
    ]
    assert known.missing("here", parse('promptmill_jobs_total{state="faild"}'), "") == [
        "here: promptmill_jobs_total has no state faild"
    ]


def test_every_metric_of_ours_is_on_a_dashboard(deployment: Deployment) -> None:
    asked = [target["expr"] for _, panel in panels() for target in panel["targets"]]
    shown = {one.metric for expr in asked for one in parse(expr).selectors}
    for rule in rules():
        if rule.get("record") in shown:
            shown |= {one.metric for one in parse(rule["expr"]).selectors}
    parts = re.compile(r"_(bucket|sum|count)$")
    ours = {parts.sub("", name) for name in deployment.values() if name.startswith("promptmill_")}
    assert ours - {parts.sub("", name) for name in shown} == set()


# -- a real Prometheus --------------------------------------------------------------------------------------------


class Prometheus:
    """One that runs, and its HTTP API."""

    def __init__(self, url: str) -> None:
        self._url = url

    def ready(self) -> bool:
        try:
            return httpx.get(f"{self._url}/-/ready", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def ask(self, path: str, **query: str) -> Any:
        answer = httpx.get(f"{self._url}/api/v1/{path}", params=query, timeout=PATIENCE_S, trust_env=False).json()
        assert answer["status"] == "success", f"{query}: {answer}"
        return answer["data"]

    def rules(self) -> list[dict[str, Any]]:
        return [rule for group in self.ask("rules")["groups"] for rule in group["rules"]]


@pytest.fixture(scope="module")
def prometheus(deployment: Deployment, tmp_path_factory: pytest.TempPathFactory) -> Generator[Prometheus]:
    home = tmp_path_factory.mktemp("scraping")
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(path) for path in RULES],
        "scrape_configs": [{"job_name": "promptmill", "static_configs": [{"targets": deployment.targets}]}],
    }
    (home / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = [
        program("prometheus"),
        f"--config.file={home / 'prometheus.yml'}",
        f"--storage.tsdb.path={home / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    log = home / "prometheus.log"
    with process(command, log, home):
        running = Prometheus(f"http://127.0.0.1:{port}")
        block_until(running.ready, f"Prometheus is ready: {log}")
        yield running


def test_prometheus_scrapes_every_process(deployment: Deployment, prometheus: Prometheus) -> None:
    assert len(deployment.targets) == 4  # a gateway, two families of workers, a relay

    def up() -> bool:
        return [target["health"] for target in prometheus.ask("targets")["activeTargets"]] == ["up"] * 4

    block_until(up, "all targets are up")


def test_prometheus_evaluates_every_rule(prometheus: Prometheus) -> None:
    def evaluated() -> bool:
        return all(rule["health"] != "unknown" for rule in prometheus.rules())

    block_until(evaluated, "all rules were evaluated")
    found = prometheus.rules()
    assert len(found) == len(rules())
    assert [(rule["name"], rule.get("lastError")) for rule in found if rule["health"] != "ok"] == []


def test_every_panel_shows_something(deployment: Deployment, prometheus: Prometheus) -> None:
    asked = [
        (f"{name}: {panel['title']}", re.sub(r"\$(family|model|instance)", ".*", target["expr"]))
        for name, panel in panels()
        for target in panel["targets"]
    ]

    left = [(place, expr) for place, expr in asked if not MAY_BE_EMPTY.search(expr)]

    def all_shown() -> bool:
        # Each by itself: a scrape that takes longer than its second leaves all of a process out for a moment.
        shown = [
            (place, expr)
            for place, expr in left
            if prometheus.ask("query", query=expr.replace("$__rate_interval", "1m"))["result"]
        ]
        left[:] = [one for one in left if one not in shown]
        return not left

    with contextlib.suppress(AssertionError):  # what is empty is named below
        block_until(all_shown, "every panel shows something")
    assert left == []
    # Those that may be empty are asked all the same: what they say must be PromQL.
    for _, expr in asked:
        prometheus.ask("query", query=expr.replace("$__rate_interval", "1m"))


def test_prometheus_understands_what_the_runbook_asks(prometheus: Prometheus) -> None:
    for expr in asked_by_the_runbook():
        prometheus.ask("query", query=expr)


def test_what_prometheus_knows_is_what_happened(deployment: Deployment, prometheus: Prometheus) -> None:
    def value(expr: str) -> float:
        result = prometheus.ask("query", query=expr)["result"]
        return float(result[0]["value"][1]) if result else -1.0

    def wait_for(expr: str, holds: Callable[[float], bool], what: str) -> None:
        # Awaited, each: the next scrape may be to come, and one that takes longer than its second tells nothing.
        block_until(lambda: holds(value(expr)), what)

    # One by hand, one apart, two of the batch, one over HTTP.
    wait_for('sum(promptmill_jobs_total{state="succeeded"})', lambda jobs: jobs == 5, "five jobs have succeeded")
    wait_for('sum(promptmill_jobs_total{state="failed"})', lambda jobs: jobs == 1, "one has failed")
    wait_for('sum(promptmill_jobs_total{state="cancelled"})', lambda jobs: jobs == 1, "one was cancelled")
    wait_for("sum(promptmill_programs_started_total)", lambda programs: programs >= 1, "a program was started")
    wait_for("sum(promptmill_programs)", lambda programs: programs == 0, "no program is left")
    slots = "family:promptmill_fleet_slots:max{family='isolated'}"
    wait_for(slots, lambda found: found == 8, "the slots of a family")
    wait_for("sum(promptmill_cost_dollars_total)", lambda dollars: dollars > 0, "it has cost something")
    absent = 'ALERTS{alertname=~"PromptmillGatewaysAbsent|PromptmillWorkersAbsent|PromptmillStoreSilent"}'
    wait_for(absent, lambda found: found == -1, "nobody is missed")
