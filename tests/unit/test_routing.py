"""Every row of the table of routing, in the code and in the documentation, and what holds for every decision."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptmill.cli import exits
from promptmill.cli.app import run
from promptmill.cli.models_ask import explanation
from promptmill.contract import JobRequest
from promptmill.errors import BadRequest
from promptmill.registry import Registry
from promptmill.routing import OLD_NAMES, Decision, decide
from promptmill.settings import ModelConfig, Settings
from tests.support.docs import table

SONNET = ModelConfig(type="anthropic_api", model_name="m")
CLAUDE = ModelConfig(type="claude_cli")
GEMINI = ModelConfig(type="gemini_cli", model_name="m")
GEMINI_API = ModelConfig(type="gemini_api", model_name="m")
LOCAL = ModelConfig(type="local_openai", model_name="m", api_url="http://127.0.0.1:1/v1")
ECHO = ModelConfig(type="echo")

EVERYTHING: dict[str, ModelConfig] = {
    "sonnet": SONNET,
    "cc": CLAUDE,
    "ollama": LOCAL,
    "vllm": LOCAL,
    "gem": GEMINI,
    "flash": GEMINI_API,
}
ROLES = {"chat": {"primary": "sonnet", "backup_2": "ollama", "backup_1": "vllm"}, "bare": {"primary": "sonnet"}}
OWN = {"eva": {"chat": {"primary": "vllm", "backup_1": "cc"}, "mine": {"primary": "gem"}}}


def settings(*models: str, **more: Any) -> Settings:
    """``models`` of EVERYTHING, in this order; all of them, with roles and a user of their own, where none is named."""
    if models:
        return Settings(models={name: EVERYTHING[name] for name in models}, **more)
    users = {user: {"roles": roles} for user, roles in OWN.items()}
    return Settings.model_validate({"models": EVERYTHING, "roles": ROLES, "users": users, **more})


def asked(**fields: Any) -> JobRequest:
    return JobRequest.model_validate({"prompt": "x", **fields})


ROWS = {
    "`model`, an entry": [
        (settings(), {"model": "ollama"}, ["ollama"], False),
        (settings(), {"model": "echo"}, ["echo"], False),
        (Settings(models={"claude": LOCAL, "cc": CLAUDE}), {"model": "claude"}, ["claude"], False),
    ],
    "`model`, a backend type": [
        (settings(), {"model": "local_openai"}, ["ollama"], False),
        (settings("vllm", "ollama"), {"model": "local_openai"}, ["vllm"], False),
        (settings(), {"model": "gemini_api"}, ["flash"], False),
    ],
    "`model` `gemini_api`": [(settings("sonnet", "gem"), {"model": "gemini_api"}, ["gem"], False)],
    "`model` `claude`": [
        (settings(), {"model": "claude"}, ["cc"], False),
        (settings("ollama", "sonnet"), {"model": "claude"}, ["sonnet"], False),
    ],
    "`model` `gemini`": [
        (settings(), {"model": "gemini"}, ["gem"], False),
        (settings("sonnet", "flash"), {"model": "gemini"}, ["flash"], False),
    ],
    "`model` `local`": [
        (settings(), {"model": "local"}, ["ollama"], False),
        (settings(), {"model": "local", "role": "chat"}, ["vllm"], False),
        (settings(), {"model": "local", "role": "bare"}, ["ollama"], False),
        (settings(), {"model": "local", "role": "chat", "user": "eva"}, ["vllm"], False),
    ],
    "`role` and `slot`": [
        (settings(), {"role": "chat", "slot": "primary"}, ["sonnet"], False),
        (settings(), {"role": "chat", "slot": "backup_2"}, ["ollama"], False),
        (settings(), {"role": "chat", "slot": "backup_1", "user": "eva"}, ["cc"], False),
    ],
    "`role` and `slot`, the slot not configured": [
        (settings(), {"role": "bare", "slot": "backup_7"}, ["sonnet"], True),
        (settings(), {"role": "chat", "slot": "backup_7"}, ["sonnet", "vllm", "ollama"], True),
    ],
    "`role`": [
        (settings(), {"role": "chat"}, ["sonnet", "vllm", "ollama"], True),
        (settings(), {"role": "chat", "user": "eva"}, ["vllm", "cc", "ollama"], True),
        (settings(), {"role": "mine", "user": "eva"}, ["gem"], True),
        (settings(), {"role": "chat", "exclude": ["vllm"]}, ["sonnet", "ollama"], True),
        (settings(), {"role": "chat", "exclude": ["local_openai"]}, ["sonnet"], True),
    ],
    "nothing": [
        (settings(default_model="cc"), {}, ["cc", "gem"], True),
        (settings(default_model="gem"), {}, ["gem", "cc"], True),
        (settings(default_model="ollama"), {}, ["ollama", "cc"], True),
        (settings(), {}, ["sonnet", "cc"], True),
        (settings("sonnet"), {}, ["sonnet"], True),
        (settings("flash", "sonnet"), {}, ["flash", "sonnet"], True),
        (settings("sonnet", "cc"), {"exclude": ["sonnet"]}, ["cc"], True),
        (Settings(), {}, ["echo"], True),
        (settings(default_model="echo"), {}, ["echo"], True),
    ],
}
"""The first column of the table, and for each row what a registry answers to a request, in order; and whether it falls
back."""
CASES = [
    pytest.param(row, *case, id=f"{row}: {case[1] or 'nothing'} of {len(case[0].models)}")
    for row, cases in ROWS.items()
    for case in cases
]


def of_docstring() -> list[tuple[str, str, str]]:
    """The rows of the table in the docstring of ``decide``; a row begins where it says whether it falls back."""
    assert decide.__doc__
    lines = [line.strip("\n") for line in decide.__doc__.splitlines()]
    ruler = next(line for line in lines if line.strip().startswith("==="))
    starts = [i for i, char in enumerate(ruler) if char == "=" and ruler[i - 1] != "="]
    bounds = list(zip(starts, [*starts[1:], None], strict=True))
    marks = [i for i, line in enumerate(lines) if line == ruler]
    rows: list[list[str]] = []
    for line in lines[marks[1] + 1 : marks[2]]:
        cells = [line[a:b].strip().replace("``", "`") for a, b in bounds]
        if cells[2]:
            rows.append(cells)
        else:
            rows[-1] = [f"{old} {new}".strip() for old, new in zip(rows[-1], cells, strict=True)]
    return [(row[0], row[1], row[2]) for row in rows]


def test_the_documented_table_and_the_code_say_the_same_row_by_row() -> None:
    rows = [tuple(cell.replace("`", "") for cell in row) for row in of_docstring()]
    documented = table("docs/reference/models.md", "Which models answer")
    listed = [tuple(cell.replace("`", "") for cell in row.values()) for row in documented]
    assert listed == rows
    assert len(rows) == 10


def test_each_row_of_the_table_is_tested() -> None:
    assert [row[0] for row in of_docstring()] == list(ROWS)
    for names, _, falls_back in of_docstring():
        assert {case[3] for case in ROWS[names]} == {falls_back == "yes"}, names


@pytest.mark.parametrize(("row", "made", "fields", "models", "automatic"), CASES)
def test_a_row_of_the_table(
    row: str, made: Settings, fields: dict[str, Any], models: list[str], automatic: bool
) -> None:
    decision = decide(Registry.of(made), asked(**fields))
    assert [route.name for route in decision.routes] == models
    assert decision.automatic is automatic
    assert [route.config for route in decision.routes] == [made.registry[name] for name in models]
    assert decision.why
    assert (decision.note is not None) == (row == "`role` and `slot`, the slot not configured")


def test_the_note_about_a_slot_names_what_there_is() -> None:
    decision = decide(Registry.of(settings()), asked(role="chat", slot="backup_7"))
    assert decision.note == "role chat has no slot backup_7; it has primary, backup_1, backup_2: routed automatically"
    assert decision.note in decision.why
    assert [route.slot for route in decision.routes] == ["primary", "backup_1", "backup_2"]


@pytest.mark.parametrize(
    ("made", "fields", "code", "field", "said"),
    [
        (settings("sonnet"), {"model": "nope"}, "unknown_model", "model", "configured: echo, sonnet"),
        (settings("sonnet"), {"model": "gemini"}, "unknown_model", "model", "configured: echo, sonnet"),
        (settings("sonnet"), {"model": "local"}, "unknown_model", "model", "type local_openai"),
        (settings(), {"role": "nope"}, "unknown_role", "role", "configured: chat, bare"),
        (settings(), {"role": "mine"}, "unknown_role", "role", "configured: chat, bare"),
        (settings(), {"role": "nope", "user": "eva"}, "unknown_role", "role", "configured: chat, bare, mine"),
        (settings(), {"model": "sonnet", "exclude": ["sonnet"]}, "bad_request", "exclude", "chosen and excluded"),
        (settings(), {"model": "claude", "exclude": ["claude_cli"]}, "bad_request", "exclude", "chosen and excluded"),
        (
            settings(),
            {"role": "chat", "slot": "primary", "exclude": ["anthropic_api"]},
            "bad_request",
            "exclude",
            "chosen and excluded",
        ),
        (settings(), {"role": "bare", "exclude": ["sonnet"]}, "unknown_model", "exclude", "every model"),
        (Settings(), {"exclude": ["echo"]}, "unknown_model", "exclude", "every model"),
    ],
)
def test_what_nothing_answers_is_refused_with_what_there_is(
    made: Settings, fields: dict[str, Any], code: str, field: str, said: str
) -> None:
    with pytest.raises(BadRequest, match=said) as refused:
        decide(Registry.of(made), asked(**fields))
    assert (refused.value.code, refused.value.field) == (code, field)


def test_a_role_goes_without_a_model_that_is_gone_and_says_so_where_none_is_left() -> None:
    registry = Registry({"echo": ECHO, "ollama": LOCAL}, ROLES)
    assert [route.name for route in decide(registry, asked(role="chat")).routes] == ["ollama"]
    with pytest.raises(BadRequest, match="only models that are gone: sonnet") as refused:
        decide(registry, asked(role="bare"))
    assert refused.value.code == "unknown_model"
    with pytest.raises(BadRequest, match="'sonnet', which is gone"):
        decide(registry, asked(role="chat", slot="primary"))


@pytest.mark.parametrize(("row", "made", "fields", "models", "automatic"), CASES)
def test_explain_prints_the_decision(
    row: str,
    made: Settings,
    fields: dict[str, Any],
    models: list[str],
    automatic: bool,
    tmp_path: Any,
    redis_url: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "promptmill.toml"
    path.write_text(f'redis_url = "{redis_url}"\n{as_toml(made)}')
    arguments = [part for name, value in fields.items() for part in options(name, value)]
    assert run(["models", "explain", *arguments, "--json", "--config", str(path)]) == exits.OK
    printed = json.loads(capsys.readouterr().out)
    assert printed == explanation(Registry.of(made), asked(**fields))
    assert [route["model"] for route in printed["routes"]] == models
    assert printed["automatic"] is automatic
    assert run(["models", "explain", *arguments, "--config", str(path)]) == exits.OK
    shown = capsys.readouterr().out
    numbered = [line.split()[1] for line in shown.splitlines() if line[0].isdigit()]
    assert numbered == models
    assert f"falls back: {'yes' if automatic else 'no'}" in shown
    assert all(f"- {why}" in shown for why in printed["why"])


def options(name: str, value: str | list[str]) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [part for one in values for part in (f"--{name}", one)]


def as_toml(made: Settings) -> str:
    parts = [f"default_model = {json.dumps(made.default_model)}"] if made.default_model else []
    for name, config in made.models.items():
        fields = config.model_dump(mode="json", exclude_defaults=True)
        parts += [f"[models.{name}]", *(f"{key} = {json.dumps(value)}" for key, value in fields.items())]
    tables = [(f"roles.{role}", slots) for role, slots in made.roles.items()]
    tables += [(f"users.{u}.roles.{role}", slots) for u, c in made.users.items() for role, slots in c.roles.items()]
    for title, slots in tables:
        parts += [f"[{title}]", *(f"{slot} = {json.dumps(model)}" for slot, model in slots.items())]
    return "\n".join(parts)


NAMES = st.sampled_from([*EVERYTHING, "echo", *OLD_NAMES, "gone", "gemini_api", "local_openai", "anthropic_api"])
SLOTS = st.dictionaries(st.sampled_from(["primary", "backup_1", "backup_2", "backup_10"]), NAMES, max_size=4)
ROLE_TABLES = st.dictionaries(st.sampled_from(["chat", "bare"]), SLOTS, max_size=2)
CONFIGS = st.sampled_from([SONNET, CLAUDE, GEMINI, GEMINI_API, LOCAL, ECHO])


@st.composite
def registries(draw: st.DrawFn) -> Registry:
    models = {"echo": ECHO, **draw(st.dictionaries(NAMES, CONFIGS, max_size=6))}
    default = draw(st.none() | st.sampled_from(list(models)))
    users = draw(st.dictionaries(st.sampled_from(["eva", "default"]), ROLE_TABLES, max_size=2))
    return Registry(models, draw(ROLE_TABLES), users, default)


@st.composite
def requests(draw: st.DrawFn) -> JobRequest:
    fields: dict[str, Any] = {"user": draw(st.sampled_from(["eva", "default", "bob"]))}
    kind = draw(st.sampled_from(["model", "local", "role", "slot", "nothing"]))
    if kind == "model":
        fields["model"] = draw(NAMES)
    elif kind != "nothing":
        fields["role"] = draw(st.sampled_from(["chat", "bare", "nope"]))
    if kind == "local":
        fields["model"] = "local"
    if kind == "slot":
        fields["slot"] = draw(st.sampled_from(["primary", "backup_1", "backup_3"]))
    fields["exclude"] = draw(st.none() | st.lists(NAMES, max_size=4))
    return asked(**fields)


def outcome(registry: Registry, request: JobRequest) -> tuple[Decision | None, BadRequest | None]:
    try:
        return decide(registry, request), None
    except BadRequest as err:
        return None, err


@given(registries(), requests())
def test_no_decision_asks_what_was_excluded_and_no_choice_falls_back(registry: Registry, request: JobRequest) -> None:
    decision, refused = outcome(registry, request)
    if decision is None:
        assert refused is not None
        assert refused.code in {"unknown_model", "unknown_role", "bad_request"}
        assert refused.field
        return
    names = [route.name for route in decision.routes]
    excluded = set(request.exclude or ())
    assert names
    assert len(set(names)) == len(names) <= len(registry.models)
    for route in decision.routes:
        assert route.config is registry.models[route.name]
        assert route.name not in excluded
        assert route.config.type not in excluded
    if request.model is not None:
        assert not decision.automatic
    if not decision.automatic:
        assert len(names) == 1
    again = decide(registry.having(models=dict(registry.models)), request)
    assert (again.routes, again.automatic, again.why) == (decision.routes, decision.automatic, decision.why)
