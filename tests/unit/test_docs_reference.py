"""The reference pages list exactly what there is: no more, no less, and with the same defaults."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel

import promptmill
from promptmill import AsyncProducer, Producer, keys
from promptmill.cli import exits
from promptmill.cli.app import app
from promptmill.contract import (
    Cancelled,
    Confirm,
    Done,
    Error,
    Job,
    JobRequest,
    Limits,
    Progress,
    Restart,
    Timeouts,
    Token,
)
from promptmill.contract.job import Attempt
from promptmill.errors import CODES
from promptmill.settings import DEFAULT_TIMEOUTS, ApiKey, ModelConfig, ModelLimits, Settings
from promptmill_gateway.app import build_gateway
from promptmill_relay.auth import Access, FixedSecret, KeyRing, StreamUrls
from promptmill_relay.stream import StreamEndpoint
from promptmill_workers.backends import gemini_cli
from promptmill_workers.backends.anthropic_api import AnthropicOptions
from promptmill_workers.backends.claude_cli import ClaudeOptions
from promptmill_workers.backends.echo import EchoOptions
from promptmill_workers.backends.gemini_api import GeminiOptions
from promptmill_workers.backends.local_openai import LocalOpenAIOptions
from tests.support.docs import PAGES, ROOT, anchors, read, table, tables
from tests.support.web import FakeHub, call_asgi

CONFIGURATION = "docs/reference/configuration.md"
COMMANDS = "docs/reference/command-line.md"
SPECIAL_DEFAULTS = {"timeouts": "none set", "limits": "see there", "type": "needed"}


def shown(default: object) -> str:
    if default is None:
        return "none"
    if isinstance(default, float):
        return f"{default:g}"
    return str(default)


def defaults(model: type[BaseModel]) -> dict[str, str]:
    fields = model.model_fields.items()
    return {
        name: SPECIAL_DEFAULTS.get(name) or shown(field.get_default(call_default_factory=True))
        for name, field in fields
    }


def commands() -> dict[str, Any]:
    """Every command of the command line by its full name."""
    found: dict[str, Any] = {}

    def add(command: Any, name: str) -> None:
        if hasattr(command, "commands"):
            if command.invoke_without_command and name != "promptmill":
                found[name] = command
            for child, inner in command.commands.items():
                add(inner, f"{name} {child}")
        else:
            found[name] = command

    add(typer.main.get_command(app), "promptmill")
    return found


@pytest.mark.parametrize(
    ("page", "heading", "first", "model"),
    [
        (CONFIGURATION, "Settings", "setting", Settings),
        (CONFIGURATION, "Models", "setting", ModelConfig),
        (CONFIGURATION, "Limits", "setting", Limits),
        ("docs/reference/limits.md", "Configuration", "setting", ModelLimits),
        (CONFIGURATION, "API keys", "setting", ApiKey),
        ("docs/backends/anthropic_api.md", "Configuration", "option", AnthropicOptions),
        ("docs/backends/claude_cli.md", "Configuration", "option", ClaudeOptions),
        ("docs/backends/gemini_cli.md", "Configuration", "option", gemini_cli.GeminiOptions),
        ("docs/backends/gemini_api.md", "Configuration", "option", GeminiOptions),
        ("docs/backends/local_openai.md", "Configuration", "option", LocalOpenAIOptions),
        ("docs/backends/echo.md", "Configuration", "option", EchoOptions),
    ],
)
def test_a_table_of_settings_has_every_field_with_its_default(
    page: str, heading: str, first: str, model: type[BaseModel]
) -> None:
    listed = {row[first]: row["default"] for row in table(page, heading)}
    assert listed == defaults(model)


def test_the_timeouts_are_listed_with_the_defaults_that_hold() -> None:
    listed = {row["setting"]: row["default"] for row in table(CONFIGURATION, "Timeouts")}
    assert listed == {name: shown(getattr(DEFAULT_TIMEOUTS, name)) for name in Timeouts.model_fields}


def test_each_setting_has_its_variable() -> None:
    for row in table(CONFIGURATION, "Settings"):
        expected = "-" if row["setting"] == "config_file" else f"PROMPTMILL_{row['setting'].upper()}"
        assert row["variable"] == expected


def test_the_page_of_errors_lists_every_code_with_what_it_means_to_programs() -> None:
    headings = ("Refused at the door", "How an attempt or a job ends", "Local to a process")
    rows = [row for heading in headings for row in table("docs/reference/errors.md", heading)]
    listed = {row["code"]: (row["retryable"] == "yes", int(row["HTTP"])) for row in rows}
    assert listed == {code: (spec.retryable, spec.http_status) for code, spec in CODES.items()}
    assert len(rows) == len(CODES)


def test_the_page_of_keys_says_what_the_module_says() -> None:
    assert keys.__doc__
    lines = [line for line in keys.__doc__.splitlines() if line.startswith("``pm:")]
    documented = [[cell.strip("`") for cell in re.split(r"\s{2,}", line.strip())] for line in lines]
    listed = [[cell.strip("`") for cell in row.values()] for row in table("docs/reference/redis-keys.md", "Redis keys")]
    assert listed == documented
    assert len(listed) > 10


def test_the_events_are_listed_with_their_fields() -> None:
    listed = {row["type"]: row["fields"] for row in table("docs/reference/events.md", "Events")}
    for model in (Progress, Token, Restart, Confirm, Done, Error, Cancelled):
        kind = model.model_fields["type"].default
        fields = [name for name in model.model_fields if name not in {"type", "id"}]
        assert re.findall(r"\w+", listed.pop(kind)) == fields
    assert listed == {}


def test_the_command_line_is_listed_with_every_option() -> None:
    page = read(COMMANDS)
    described = re.findall(r"^## `(promptmill [\w -]+)`$", page, re.MULTILINE)
    assert sorted(described) == sorted(commands())
    for name, command in commands().items():
        listed = {option for row in table(COMMANDS, f"`{name}`") for option in re.findall(r"-[\w-]+", row["option"])}
        actual = {option for p in command.params for option in p.opts if option.startswith("-")}
        assert listed == actual, name


def test_the_exit_codes_are_listed_with_their_names() -> None:
    listed = {row["name"]: int(row["code"]) for row in table(COMMANDS, "Exit codes")}
    assert listed == {name: value for name, value in vars(exits).items() if name.isupper() and isinstance(value, int)}


async def test_the_http_api_is_listed_with_every_path_and_field() -> None:
    access = Access(KeyRing({}), StreamUrls(FixedSecret("x"), 60))
    streams = StreamEndpoint(Settings(), FakeHub(), access)
    gateway = build_gateway(Settings(), AsyncProducer(Settings()), access, streams)
    status, _, body = await call_asgi(gateway, "GET", "/openapi.json", {"host": "127.0.0.1"})
    assert status == 200
    paths = json.loads(body)["paths"]
    actual = {f"{method.upper()} {path}" for path, operations in paths.items() for method in operations}
    assert {row["method and path"] for row in table("docs/reference/http.md", "HTTP API")} == actual
    rows = table("docs/reference/http.md", "Submit: `POST /v1/jobs`")
    assert {row["field"] for row in rows} == {*JobRequest.model_fields, "prompt"}
    job = read("docs/reference/http.md").split("## A job\n")[1].split("\n## ")[0]
    assert {*Job.model_fields, *Attempt.model_fields} <= set(re.findall(r"`(\w+)`", job))


def test_the_python_page_lists_every_public_name_and_method() -> None:
    (rows,) = tables("docs/reference/python.md", "Python API")
    assert sorted(row["name"] for row in rows) == sorted(promptmill.__all__)
    methods = {row["method"] for row in table("docs/reference/python.md", "Producers")}
    assert methods == {n for n, v in vars(Producer).items() if callable(v) and not n.startswith("_")} - {"close"}
    asynchronous = {n for n, v in vars(AsyncProducer).items() if callable(v) and not n.startswith("_")}
    # What the gateway shares with its own producer, and the other name of close.
    assert methods == asynchronous - {"aclose", "store", "hub"}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_within_the_documentation_leads_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        found = (ROOT / page).parent / path if path else ROOT / page
        assert found.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(Path(found).resolve().relative_to(ROOT).as_posix()), f"{page}: {target}"


def test_the_readme_stays_short() -> None:
    assert len(read("README.md").splitlines()) <= 150


def test_the_pages_on_the_side_of_users_name_no_ticket_and_no_absolute_path() -> None:
    for page in PAGES:
        assert not re.search(r"(?<![\w.}])/(?:home|root|Users|tmp)/", read(page)), page
