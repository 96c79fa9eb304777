"""The alerts, by Prometheus's own tests of rules; their runbook; and the dashboards' form."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from ops.grafana import make, pages
from ops.prometheus import make as rules

from promptmill.cli.app import app
from tests.support.docs import ROOT, anchors, read
from tests.support.promql import (
    DASHBOARDS,
    RULE_TESTS,
    RULES,
    RUNBOOK,
    alerts,
    asked_by_the_runbook,
    panels,
    parse,
    program,
)

ALERTS = alerts()


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run([program("promtool"), *arguments], capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


def test_promtool_finds_nothing_wrong_with_the_rules() -> None:
    promtool("check", "rules", *RULES)


@pytest.mark.parametrize("path", RULE_TESTS, ids=lambda path: path.stem)
def test_alerts_fire_and_stay_quiet_as_their_tests_say(path: Path) -> None:
    promtool("test", "rules", path)


def test_promtool_sees_an_alert_that_no_longer_fires(tmp_path: Path) -> None:
    """Against a promtool that says yes to everything."""
    for part in ("rules", "tests"):
        (tmp_path / part).mkdir()
    for path in RULES:
        (tmp_path / "rules" / path.name).write_text(path.read_text().replace("dead_workers_total", "ded_workers_total"))
    (test,) = [path for path in RULE_TESTS if path.stem == "workers"]
    (tmp_path / "tests" / test.name).write_text(test.read_text())
    with pytest.raises(AssertionError, match="PromptmillWorkersDie"):
        promtool("test", "rules", tmp_path / "tests" / test.name)


def test_the_operators_rules_are_those_that_the_script_writes() -> None:
    assert rules.WRITTEN.read_text() == rules.text(), "run python -m ops.prometheus.make"
    made = [
        rule for one in yaml.safe_load_all(rules.text()) for group in one["spec"]["groups"] for rule in group["rules"]
    ]
    assert {rule["alert"]: rule for rule in made if "alert" in rule} == ALERTS


def test_each_alert_has_a_test_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    fires: Counter[str] = Counter()
    quiet: Counter[str] = Counter()
    for path in RULE_TESTS:
        for test in yaml.safe_load(path.read_text())["tests"]:
            for case in test.get("alert_rule_test", ()):
                (fires if case["exp_alerts"] else quiet)[case["alertname"]] += 1
    assert set(fires) == set(quiet) == set(ALERTS)


@pytest.mark.parametrize("name", ALERTS)
def test_each_alert_says_who_wakes_up_what_it_is_and_what_to_do(name: str) -> None:
    rule = ALERTS[name]
    assert name.startswith("Promptmill")
    assert rule["labels"] in ({"severity": "page"}, {"severity": "ticket"})
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    assert rule["annotations"]["runbook_url"] == f"{RUNBOOK}#{name.lower()}"


def test_a_comment_explains_each_threshold() -> None:
    silent: list[str] = []
    for path in RULES:
        if path.stem == "recording":
            continue
        lines = path.read_text().splitlines()
        for before, line in itertools.pairwise(lines):
            if re.match(r"\s+- (alert|record):", line) and not before.strip().startswith("#"):
                silent.append(f"{path.name}:{line.strip()}")
    silent = [line for line in silent if "cost_dollars_per_hour" not in line]
    assert silent == []


def section(name: str) -> str:
    match = re.search(rf"^### {name}\n(.*?)(?=^##|\Z)", read(RUNBOOK), re.MULTILINE | re.DOTALL)
    assert match is not None, f"{RUNBOOK} has no section {name}"
    return match[1]


@pytest.mark.parametrize("name", ALERTS)
def test_each_alert_has_a_section_in_the_runbook(name: str) -> None:
    text = section(name)
    assert name.lower() in anchors(RUNBOOK)
    for part in ("**Users:**", "**See:**", "**Causes:**", "**Do:**", "**Escalate:**"):
        assert text.count(part) == 1, f"{name} says {part} not once"
    assert f"*{ALERTS[name]['labels']['severity']}*" in text


def test_each_section_on_an_alert_has_its_alert() -> None:
    sections = re.findall(r"^### (Promptmill\w+)$", read(RUNBOOK), re.MULTILINE)
    assert sorted(sections) == sorted(ALERTS)


def test_the_runbook_searches_logs_for_what_is_logged() -> None:
    packages = ("producer", "workers", "relay", "gateway")
    source = "".join(path.read_text() for package in packages for path in (ROOT / package).rglob("*.py"))
    searched = re.findall(r"\b[Ll]og\s+`([^`]+)`", read(RUNBOOK))
    assert len(searched) > 20
    assert [text for text in searched if text not in source] == []


def test_the_runbook_names_commands_that_there_are() -> None:
    named = set(re.findall(r"`(promptmill [^`]+)`", read(RUNBOOK).replace("\n", " ")))
    assert len(named) > 25
    for span in sorted(named):
        command: Any = typer.main.get_command(app)
        words = shlex.split(span)[1:]
        while words and hasattr(command, "commands"):
            if words[0] not in command.commands:
                break
            command = command.commands[words.pop(0)]
        options = {option for one in command.params for option in (*one.opts, *one.secondary_opts)}
        unknown = [word for word in words if word.startswith("-") and word not in options]
        takes_words = any(one.param_type_name == "argument" for one in command.params)
        assert not unknown, f"{span}: no {unknown}"
        assert takes_words or not words or words[0].startswith("-"), f"{span}: no such command"


def test_each_alert_says_what_to_ask() -> None:
    assert len(asked_by_the_runbook()) > len(ALERTS)
    assert [name for name in ALERTS if "Ask" not in section(name)] == []


def test_the_committed_dashboards_are_those_that_the_script_writes() -> None:
    committed = {path.stem: path.read_text() for path in DASHBOARDS}
    assert committed == {page.name: make.text(page) for page in pages.PAGES}, "run python -m ops.grafana.make"


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_has_the_form_that_grafana_wants(path: Path) -> None:
    board: dict[str, Any] = json.loads(path.read_text())
    assert board["schemaVersion"] >= 39
    names = [variable["name"] for variable in board["templating"]["list"]]
    assert names[0] == "datasource"
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    taken: Counter[tuple[int, int]] = Counter()
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        taken.update(
            itertools.product(range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"]))
        )
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == panel["datasource"]["uid"] == "${datasource}"
            used = set(re.findall(r"\$(?!__)\{?(\w+)", target["expr"]))
            assert used <= set(names), f"{panel['title']} asks for {used}"
    assert max(taken.values()) == 1, "panels overlap"


def test_each_panel_has_a_unit_and_says_what_it_shows() -> None:
    mute = [
        f"{name}: {panel['title']}"
        for name, panel in panels()
        if not panel["fieldConfig"]["defaults"]["unit"] or len(panel["description"]) < 10
    ]
    assert mute == []


def test_uids_and_titles_of_dashboards_are_their_own() -> None:
    boards = [json.loads(path.read_text()) for path in DASHBOARDS]
    assert len({board["uid"] for board in boards}) == len({board["title"] for board in boards}) == len(boards) == 4


def test_expressions_are_taken_apart() -> None:
    found = parse(
        'sum by (a, b) (rate(x_total{c="1", d=~"2|3"}[5m])) / on (e) group_left (f) level:y:max > scalar(t) unless z'
    )
    assert [(one.metric, one.matchers) for one in found.selectors] == [
        ("x_total", [("c", "=", "1"), ("d", "=~", "2|3")]),
        ("level:y:max", []),
        ("t", []),
        ("z", []),
    ]
    assert found.grouping == {"a", "b", "e", "f"}
