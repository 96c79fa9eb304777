"""What rules and dashboards ask Prometheus for: the metrics and labels that their expressions name."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import pytest
import yaml

from tests.support.docs import ROOT, read

RULES: Final = sorted((ROOT / "ops" / "prometheus" / "rules").glob("*.yml"))
RULE_TESTS: Final = sorted((ROOT / "ops" / "prometheus" / "tests").glob("*.yml"))
DASHBOARDS: Final = sorted((ROOT / "ops" / "grafana" / "dashboards").glob("*.json"))
RUNBOOK: Final = "docs/runbook.md"

_TOKEN: Final = re.compile(
    r"""(?P<space>\s+)|(?P<text>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|(?P<range>\[[^\]]*\])"""
    r"""|(?P<number>\d[\w.]*)|(?P<name>[A-Za-z_:][\w:]*)|(?P<sign>=~|!~|!=|==|>=|<=|[-+*/%^=<>(){},])"""
)
_GROUPING: Final = {"by", "without", "on", "ignoring", "group_left", "group_right"}
_WORDS: Final = {"and", "or", "unless", "bool", "offset"}


@dataclass
class Selector:
    """A metric, and what is asked of its labels: name, operator, value."""

    metric: str
    matchers: list[tuple[str, str, str]] = field(default_factory=list[tuple[str, str, str]])


@dataclass
class Expression:
    """What an expression names."""

    selectors: list[Selector] = field(default_factory=list[Selector])
    grouping: set[str] = field(default_factory=set[str])


def parse(expr: str) -> Expression:
    """The selectors of a PromQL expression, and the labels that it groups or joins by."""
    tokens = _tokens(expr)
    found = Expression()
    position = 0
    while position < len(tokens):
        kind, text = tokens[position]
        after = tokens[position + 1][1] if position + 1 < len(tokens) else ""
        position += 1
        if kind != "name" or text in _WORDS:
            continue
        if text in _GROUPING:
            if after == "(":
                end = tokens.index(("sign", ")"), position)
                found.grouping.update(label for kind, label in tokens[position:end] if kind == "name")
                position = end
        elif after not in {"(", "by", "without"}:
            selector = Selector(text)
            if after == "{":
                end = tokens.index(("sign", "}"), position)
                inner = [text for _, text in tokens[position + 1 : end] if text != ","]
                triples = zip(inner[::3], inner[1::3], inner[2::3], strict=True)
                selector.matchers = [(label, operator, value[1:-1]) for label, operator, value in triples]
                position = end
            found.selectors.append(selector)
    return found


def _tokens(expr: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    position = 0
    while position < len(expr):
        match = _TOKEN.match(expr, position)
        assert match is not None, f"no PromQL at {expr[position:]!r}"
        position = match.end()
        kind = match.lastgroup or ""
        if kind != "space":
            found.append((kind, match[0]))
    return found


def rules() -> list[dict[str, Any]]:
    """All rules, recorded and alerting."""
    return [rule for path in RULES for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]


def alerts() -> dict[str, dict[str, Any]]:
    """The alerting rules, by name."""
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def panels() -> Iterator[tuple[str, dict[str, Any]]]:
    """All panels, each with the name of its dashboard."""
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            yield path.stem, panel


def asked_by_the_runbook() -> list[str]:
    """The expressions that the runbook says to ask."""
    asks = re.findall(r"\bAsk\s+((?:`[^`]+`(?:\s+(?:and|beside)\s+)?)+)", read(RUNBOOK))
    return [expr for ask in asks for expr in re.findall(r"`([^`]+)`", ask)]


def expressions() -> Iterator[tuple[str, str, str]]:
    """Where each expression stands, the expression, and the text that is made of its labels."""
    for expr in asked_by_the_runbook():
        yield RUNBOOK, expr, ""
    for rule in rules():
        yield rule.get("alert") or rule["record"], rule["expr"], " ".join(rule.get("annotations", {}).values())
    for name, panel in panels():
        for target in panel["targets"]:
            yield f"{name}: {panel['title']}", target["expr"], target["legendFormat"]


def program(*names: str, package: str = "prometheus") -> str:
    """The path of the first that is installed; without any a skipped test, in CI a failure."""
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        reason = f"{names[0]} is not installed: apt-get install --no-install-recommends {package}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found
