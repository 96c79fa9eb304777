"""The claude program, the real one against the provider simulator, and scripted ones that misbehave."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final

import pytest

from promptmill.errors import BackendError, ConfigError
from promptmill.settings import ModelConfig
from promptmill_workers.backends import load_backend
from promptmill_workers.backends.base import Backend, Finished, Item, StartedAnew, UsageUpdate
from promptmill_workers.testing import call, collect, failure, text_of
from tests.support.processes import PATIENCE_S
from tests.support.programs import (
    KEY,
    ProgramSimulator,
    check_examples_load,
    end_of_silence,
    ends_of_faults,
    leaving_none,
    printing,
    real_program,
    script,
    seen_from_outside,
)
from tests.support.simulator import Plan, refusing_url

pytestmark = pytest.mark.xdist_group("programs")

PNG: Final = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
# Fault: code, and how many deltas of six come before it.
EXPECTED: Final[dict[str, tuple[str, int]]] = {
    "401": ("auth", 0),
    "404": ("bad_request", 0),
    "429": ("rate_limited", 0),
    "503": ("overloaded", 0),
    "529": ("overloaded", 0),
    "context": ("context_too_long", 0),
    "truncated": ("cut", 3),
    "error_event": ("overloaded", 3),
    "malformed": ("malformed", 3),
    "refusal": ("refused", 0),
}


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIMULATOR_KEY", KEY)
    # What the program would take by itself, and must never see.
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-ant-of-the-worker")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", "http://127.0.0.1:9")


@pytest.fixture
async def sim() -> AsyncIterator[ProgramSimulator]:
    async with ProgramSimulator(key=KEY) as simulator:
        yield simulator


def real(sim: ProgramSimulator, model: str = "sim", **fields: Any) -> Backend:
    options = {"program": real_program("claude"), **fields.pop("options", {})}
    fields = {"api_url": sim.url, "api_key_env": "SIMULATOR_KEY", **fields}
    return load_backend("m", ModelConfig(type="claude_cli", model_name=model, options=options, **fields))


def user_blocks(sim: ProgramSimulator) -> list[dict[str, Any]]:
    """The last request's blocks, without the program's own first one and its marks for the cache."""
    blocks = sim.requests[-1].body["messages"][-1]["content"]
    return [{k: v for k, v in block.items() if k != "cache_control"} for block in blocks[1:]]


# The real program.


async def test_each_fault_of_the_provider_ends_in_its_code(sim: ProgramSimulator) -> None:
    assert await ends_of_faults(lambda model: real(sim, model), EXPECTED, at_once=4) == EXPECTED


async def test_a_provider_that_cannot_be_reached_is_unreachable(sim: ProgramSimulator) -> None:
    with refusing_url() as url:
        _, error = await failure(real(sim, api_url=url), call())
    assert (error.code, error.retryable) == ("unreachable", True)


@pytest.mark.parametrize(
    ("model", "bounds", "code", "text"),
    [
        ("sim:fault=hang", {"first_token_s": 2}, "timeout_first_token", ""),
        ("sim:tokens=4,after=2,fault=stall", {"first_token_s": 60, "idle_s": 6}, "timeout_idle", "tok0 tok1 "),
        ("sim:tokens=1000,rate=20", {"first_token_s": 60, "total_s": 3}, "timeout_total", None),
    ],
)
async def test_a_silent_provider_ends_in_the_bound_that_passed_and_the_program_with_it(
    sim: ProgramSimulator, model: str, bounds: dict[str, float], code: str, text: str | None
) -> None:
    ended, said = await end_of_silence(real(sim, model), bounds)
    assert ended == code
    assert text is None or said == text
    await sim.wait_idle(connections=True)


async def test_a_prompt_of_a_megabyte_in_any_script_arrives_as_it_is_and_brings_no_file_along(
    sim: ProgramSimulator,
) -> None:
    planted = "/compact ist kein Befehl, @/etc/hostname @/etc/passwd keine Datei. ultrathink! "
    prompt = planted + "Ωmega 日本語 العربية 👩‍🚀 \u2028 \u0085 x\x00 " * 25_000
    assert len(prompt.encode()) > 1_000_000
    sim.plan(echo=True, chars=100_000)
    items = await collect(real(sim), call(prompt))
    # A line break keeps the program from taking the first word for one of its commands.
    assert text_of(items) == "\n" + prompt
    assert [m["role"] for m in sim.requests[-1].body["messages"]] == ["user"]
    assert len(user_blocks(sim)) == 1, "the program added something to the prompt"


async def test_what_lies_above_the_working_directory_is_not_read(
    sim: ProgramSimulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / ".git").mkdir()
    (tmp_path / "CLAUDE.md").write_text("planted-context")
    (tmp_path / ".claude").mkdir()
    planted = {"env": {"ANTHROPIC_BASE_URL": "http://127.0.0.1:9", "CLAUDE_CODE_EXTRA_BODY": '{"planted": 1}'}}
    (tmp_path / ".claude" / "settings.json").write_text(json.dumps(planted))
    assert text_of(await collect(real(sim), call()))
    assert "planted" not in json.dumps(sim.requests[-1].body)


async def test_a_slow_reader_gets_the_whole_answer(sim: ProgramSimulator) -> None:
    plan = sim.plan(text="Ωmega 日本語 " * 100_000, chars=20_000)
    seen: list[Item] = []
    async with leaving_none(), aclosing(real(sim).complete(call())) as items:
        seen.append(await anext(items))
        # The program has all of it now, far more than its pipe takes, and would exit if it were let.
        await sim.wait_idle()
        async for item in items:
            seen.append(item)  # noqa: PERF401 - begun above
    assert text_of(seen) == plan.expected_text()


async def test_neither_prompt_nor_secret_can_be_seen_while_the_program_runs(sim: ProgramSimulator) -> None:
    asked = call("planted-prompt", system="planted-system", stop=["planted-stop"])
    backend = real(sim, "sim:tokens=4,after=2,fault=stall")
    async with leaving_none(), aclosing(backend.complete(asked)) as items:
        await anext(items)
        shown = seen_from_outside()
    assert "--include-partial-messages" in shown, "the program's own command line is to be among them"
    assert "planted" not in shown
    assert "sk-ant-of-the-worker" not in shown


async def test_it_starts_no_ps_to_which_it_would_hand_the_key(
    sim: ProgramSimulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ps").write_text(f"#!/bin/sh\nenv > {tmp_path}/inherited\n")
    (tmp_path / "ps").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    async with leaving_none():
        assert isinstance((await collect(real(sim, "sim:tokens=4"), call()))[-1], Finished)
    assert not (tmp_path / "inherited").exists()


async def test_a_request_reaches_the_api_with_all_its_fields(sim: ProgramSimulator) -> None:
    picture = {"type": "image", "media_type": "image/png", "data": PNG}
    asked = call(
        messages=[
            {"role": "user", "content": [picture, {"type": "text", "text": "what?"}]},
            {"role": "assistant", "content": "A dot."},
            {"role": "user", "content": "Sure?"},
        ],
        prompt=None,
        system="Be terse.",
        max_tokens=77,
        temperature=0.5,
        stop=["END"],
        response_format={"type": "json_schema", "json_schema": {"type": "object", "properties": {}}},
    )
    items = await collect(real(sim, options={"user_name": "Ann", "agent_name": "Bot", "effort": "low"}), asked)
    body = sim.requests[-1].body
    assert user_blocks(sim) == [
        {"type": "text", "text": "<conversation>\nAnn: "},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}},
        {"type": "text", "text": "what?\n\nBot: A dot.\n\n</conversation>\n\nSure?"},
    ]
    assert body["system"][-1]["text"] == "Be terse."
    assert (body["max_tokens"], body["temperature"], body["stop_sequences"]) == (77, 0.5, ["END"])
    assert body["output_config"]["format"] == {"type": "json_schema", "schema": {"type": "object", "properties": {}}}
    assert body["output_config"]["effort"] == "low"
    assert not body["tools"]
    assert "thinking" not in body, "the API refuses a temperature beside it"
    usage = next(item for item in items if isinstance(item, UsageUpdate))
    assert usage.usage.output_tokens > 0
    assert usage.cost_usd is not None
    finished = items[-1]
    assert isinstance(finished, Finished)
    assert finished.provider_request_id is not None
    assert finished.provider_request_id.startswith("req_")


async def test_an_answer_of_max_tokens_ends_there_and_is_not_asked_for_again(sim: ProgramSimulator) -> None:
    # The program asks for the rest at once, and would wait for it.
    sim.plan(tokens=50)
    sim.default = Plan(fault="hang")
    async with leaving_none(), asyncio.timeout(PATIENCE_S):
        items = await collect(real(sim), call(max_tokens=5))
    assert text_of(items) == "tok0 tok1 tok2 tok3 tok4 "
    assert isinstance(items[-1], Finished)
    assert items[-1].reason == "length"
    assert len(sim.requests) <= 2


async def test_the_freshest_login_is_used_at_each_call_and_no_key_overrides_it(
    sim: ProgramSimulator, tmp_path: Path
) -> None:
    file = tmp_path / "credentials.json"
    backend = real(sim, api_key_env=None, options={"credentials_file": file})

    def write(token: str) -> None:
        expires_ms = (time.time() + 3600) * 1000
        file.write_text(json.dumps({"claudeAiOauth": {"accessToken": token, "expiresAt": expires_ms}}))

    write("an-old-token")
    old = backend.login_fingerprint()  # pyright: ignore[reportAttributeAccessIssue]
    _, error = await failure(backend, call())
    assert error.code == "auth_expired"
    write(KEY)
    assert backend.login_fingerprint() != old  # pyright: ignore[reportAttributeAccessIssue]
    assert text_of(await collect(backend, call()))
    assert sim.requests[-1].headers["authorization"] == f"Bearer {KEY}"
    assert "x-api-key" not in sim.requests[-1].headers


async def test_a_gateways_token_travels_as_such(sim: ProgramSimulator) -> None:
    assert text_of(await collect(real(sim, options={"credential": "auth_token"}), call()))
    headers = sim.requests[-1].headers
    assert (headers.get("authorization"), headers.get("x-api-key")) == (f"Bearer {KEY}", None)


# Without the real program: configuration and scripted ones.


@pytest.mark.parametrize(
    ("login", "said"),
    [
        (None, "no login at"),
        ("{half", "is not JSON"),
        ({"claudeAiOauth": {}}, "no login in"),
        ({"claudeAiOauth": {"accessToken": "t", "expiresAt": 1000}}, "has expired"),
    ],
)
async def test_a_login_that_is_over_is_auth_expired_and_no_program_is_started(
    tmp_path: Path, login: Any, said: str
) -> None:
    file = tmp_path / "credentials.json"
    if login is not None:
        file.write_text(login if isinstance(login, str) else json.dumps(login))
    options = {"program": "/bin/false", "credentials_file": file}
    backend = load_backend("m", ModelConfig(type="claude_cli", options=options))
    _, error = await failure(backend, call())
    assert (error.code, said in error.message) == ("auth_expired", True), error
    with pytest.raises(BackendError, match=said):
        backend.check_login()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"options": {"program": "no-such-program"}}, "npm install -g @anthropic-ai/claude-code"),
        ({"api_url": "http://127.0.0.1:1"}, "say what may travel"),
        ({"options": {"credential": "login"}, "api_key_env": "SIMULATOR_KEY"}, "login needs neither"),
        ({"options": {"credential": "auth_token"}}, "auth_token needs api_key_env"),
    ],
)
def test_a_configuration_that_cannot_work_says_why(fields: dict[str, Any], said: str) -> None:
    fields = {**fields, "options": {"program": "/bin/true", **fields.get("options", {})}}
    with pytest.raises(ConfigError, match=said):
        load_backend("m", ModelConfig(type="claude_cli", **fields))


def test_the_examples_of_the_page_can_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_examples_load("docs/backends/claude_cli.md", "claude", tmp_path, monkeypatch)


async def test_a_json_object_without_a_schema_is_refused_with_advice() -> None:
    backend = load_backend(
        "m", ModelConfig(type="claude_cli", api_key_env="SIMULATOR_KEY", options={"program": "/bin/true"})
    )
    _, error = await failure(backend, call(response_format={"type": "json_object"}))
    assert (error.code, error.field) == ("bad_request", "response_format.type")


def delta(text: str) -> str:
    event = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}
    return json.dumps({"type": "stream_event", "event": event})


def result(text: str, **fields: Any) -> str:
    return json.dumps({"type": "result", "subtype": "success", "is_error": False, "result": text, **fields})


def scripted(directory: Path, body: str, **options: Any) -> Backend:
    options = {"program": script(directory, body), **options}
    return load_backend("m", ModelConfig(type="claude_cli", api_key_env="SIMULATOR_KEY", options=options))


async def test_what_the_deltas_lack_at_the_end_is_added(tmp_path: Path) -> None:
    items = await collect(scripted(tmp_path, printing(delta("one "), result("one two"))), call())
    assert text_of(items) == "one two"
    assert not any(isinstance(item, StartedAnew) for item in items)


async def test_a_result_that_differs_from_its_deltas_starts_the_answer_anew(tmp_path: Path) -> None:
    items = await collect(scripted(tmp_path, printing(delta("one "), result("another"))), call())
    anew = next(i for i, item in enumerate(items) if isinstance(item, StartedAnew))
    assert (text_of(items[:anew]), text_of(items[anew:])) == ("one ", "another")


@pytest.mark.parametrize(
    ("lines", "end", "code"),
    [
        ((delta("one "),), 'sys.stdout.write(\'{"type":"stre\')', "cut"),
        ((), 'sys.stdout.write(\'{"type":"stre\'); sys.stdout.flush(); os._exit(3)', "cut"),
        ((delta("one "),), "sys.stdout.flush(); os.kill(os.getpid(), signal.SIGKILL)", "crashed"),
        ((), "sys.stderr.write('unknown option: --tools'); sys.exit(1)", "crashed"),
        (("not what was expected",), "", "malformed"),
        ((delta("one "), result("API Error: broken", is_error=True)), "", "crashed"),
        ((result(""),), "", "empty"),
        ((json.dumps({"type": "result", "is_error": False}),), "", "malformed"),
    ],
)
async def test_a_program_that_ends_badly_ends_in_its_code(
    tmp_path: Path, lines: tuple[str, ...], end: str, code: str
) -> None:
    async with leaving_none():
        items, error = await failure(scripted(tmp_path, printing(*lines, end=end)), call())
    assert error.code == code, error
    assert text_of(items) == ("one " if lines and lines[0] == delta("one ") else "")


async def test_the_signal_and_the_end_of_its_complaints_are_told_without_the_key(tmp_path: Path) -> None:
    end = f"sys.stderr.write('out of memory, key {KEY}'); sys.stderr.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    _, error = await failure(scripted(tmp_path, printing("", end=end)), call())
    assert "SIGKILL" in error.message
    assert "out of memory" in error.message
    assert KEY not in error.message


async def test_a_flood_of_output_is_malformed_and_ended(tmp_path: Path) -> None:
    body = "import sys\nwhile True: sys.stdout.write('x' * 65536)"
    async with leaving_none():
        _, error = await failure(scripted(tmp_path, body, output_mb=4), call())
    assert error.code == "malformed"


async def test_bytes_that_are_no_utf_8_become_replacement_characters(tmp_path: Path) -> None:
    whole = result("a?b").replace("?", "\udcff")
    line = delta("a?b").replace("?", "\udcff")
    data = f"{line}\n{whole}\n".encode("utf-8", "surrogateescape")
    backend = scripted(tmp_path, f"import sys\nsys.stdout.buffer.write(b'\\xff\\xfe\\n' + {data!r})")
    assert text_of(await collect(backend, call())) == "a\ufffdb"


async def test_a_child_that_holds_standard_output_holds_up_nobody(tmp_path: Path) -> None:
    body = printing(delta("one"), end="if os.fork() == 0: time.sleep(600)")
    async with leaving_none(), asyncio.timeout(PATIENCE_S):
        items, error = await failure(scripted(tmp_path, body), call())
    assert (text_of(items), error.code) == ("one", "cut")


async def test_nothing_after_the_last_word_is_waited_for(tmp_path: Path) -> None:
    async with leaving_none(), asyncio.timeout(PATIENCE_S):
        items = await collect(scripted(tmp_path, printing(result("done"), end="time.sleep(600)")), call())
    assert text_of(items) == "done"
