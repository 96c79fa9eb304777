"""The gemini program, the real one against the provider simulator, and scripted ones that misbehave."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

from promptmill.contract import Limits, Usage, parse_request
from promptmill.errors import ConfigError
from promptmill.settings import ModelConfig
from promptmill_workers.backends import load_backend
from promptmill_workers.backends.base import Backend, Finished, UsageUpdate
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
from tests.support.simulator import refusing_url

pytestmark = pytest.mark.xdist_group("programs")

# Fault: code, and how many deltas of six come before it.
EXPECTED: Final[dict[str, tuple[str, int]]] = {
    "401": ("auth", 0),
    "429": ("rate_limited", 0),
    "503": ("overloaded", 0),
    "context": ("context_too_long", 0),
    "truncated": ("cut", 3),
    "error_event": ("cut", 3),  # the program does not pass the error on
    "malformed": ("malformed", 3),
    "refusal": ("refused", 0),
}


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIMULATOR_KEY", KEY)
    # What the program would take by itself, and must never see.
    monkeypatch.setenv("GEMINI_API_KEY", "AIza-of-the-worker")
    monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", "http://127.0.0.1:9")


@pytest.fixture
async def sim() -> AsyncIterator[ProgramSimulator]:
    async with ProgramSimulator(key=KEY) as simulator:
        yield simulator


def real(sim: ProgramSimulator, model: str = "sim", **fields: Any) -> Backend:
    options = {"program": real_program("gemini"), **fields.pop("options", {})}
    fields = {"api_url": sim.url, "api_key_env": "SIMULATOR_KEY", **fields}
    return load_backend("m", ModelConfig(type="gemini_cli", model_name=model, options=options, **fields))


def user_texts(sim: ProgramSimulator) -> list[str]:
    """The last request's texts, without the program's own first one."""
    return [part["text"] for part in sim.requests[-1].body["contents"][-1]["parts"][1:]]


# The real program.


async def test_each_fault_of_the_provider_ends_in_its_code(sim: ProgramSimulator) -> None:
    assert await ends_of_faults(lambda model: real(sim, model), EXPECTED, at_once=3) == EXPECTED


async def test_a_wrong_key_is_auth(sim: ProgramSimulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WRONG_KEY", "wrong-0123456789")
    _, error = await failure(real(sim, api_key_env="WRONG_KEY"), call())
    assert error.code == "auth"


async def test_a_provider_that_cannot_be_reached_is_unreachable(sim: ProgramSimulator) -> None:
    with refusing_url() as url:
        _, error = await failure(real(sim, api_url=url), call())
    assert (error.code, error.retryable) == ("unreachable", True)


@pytest.mark.parametrize(
    ("model", "bounds", "code", "text"),
    [
        ("sim:fault=hang", {"first_token_s": 4}, "timeout_first_token", ""),
        ("sim:tokens=4,after=2,fault=stall", {"first_token_s": 60, "idle_s": 6}, "timeout_idle", "tok0 tok1 "),
    ],
)
async def test_a_silent_provider_ends_in_the_bound_that_passed_and_the_program_with_it(
    sim: ProgramSimulator, model: str, bounds: dict[str, float], code: str, text: str
) -> None:
    assert await end_of_silence(real(sim, model), bounds) == (code, text)
    await sim.wait_idle(connections=True)


async def test_a_prompt_of_a_megabyte_in_any_script_arrives_as_it_is_and_brings_no_file_along(
    sim: ProgramSimulator,
) -> None:
    planted = "/init ist kein Befehl, @/etc/hostname @../.gemini/.env @generalist keine Datei, bob@example.com. "
    prompt = planted + "Ωmega 日本語 العربية 👩‍🚀 \u2028 \u0085 x\x00 " * 25_000
    assert len(prompt.encode()) > 1_000_000
    await collect(real(sim, "sim:tokens=1"), call(prompt))
    # A line break keeps the program from taking the first word for one of its commands.
    assert user_texts(sim) == ["\n" + prompt]


async def test_what_lies_above_the_working_directory_is_not_read(
    sim: ProgramSimulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / ".git").mkdir()  # the program looks for context up to the root of a repository
    for name in (".env", ".gemini/.env"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("GEMINI_API_KEY=planted-by-others\nGOOGLE_GEMINI_BASE_URL=http://127.0.0.1:9\n")
    (tmp_path / "GEMINI.md").write_text("planted-context")
    assert text_of(await collect(real(sim), call()))
    sent = json.dumps(sim.requests[-1].body)
    assert str(tmp_path) in sent, "the program names its directory, which is to be below"
    assert sim.requests[-1].headers["x-goog-api-key"] == KEY
    assert "planted-context" not in sent


async def test_neither_prompt_nor_secret_can_be_seen_while_the_program_runs(sim: ProgramSimulator) -> None:
    asked = call("planted-prompt", system="planted-system", stop=["planted-stop"])
    backend = real(sim, "sim:tokens=4,after=2,fault=stall")
    async with leaving_none(), aclosing(backend.complete(asked)) as items:
        await anext(items)
        shown = seen_from_outside()
    assert "GEMINI_SYSTEM_MD=" in shown, "the program's own environment is to be among them"
    assert "planted" not in shown
    assert "AIza-of-the-worker" not in shown


async def test_a_request_reaches_the_api_with_all_its_fields(sim: ProgramSimulator) -> None:
    sim.plan(text="one two three four", usage={"input_tokens": 50, "cache_read_tokens": 20, "output_tokens": 3})
    asked = call(
        messages=[
            {"role": "user", "content": "what?"},
            {"role": "assistant", "content": "A dot."},
            {"role": "user", "content": "Sure?"},
        ],
        prompt=None,
        system="Be terse.",
        max_tokens=3,
        temperature=0.5,
        stop=["END"],
        response_format={"type": "json_schema", "json_schema": {"type": "object", "properties": {}}},
    )
    items = await collect(real(sim, options={"user_name": "Ann", "agent_name": "Bot"}), asked)
    body = sim.requests[-1].body
    assert user_texts(sim) == ["<conversation>\nAnn: what?\n\nBot: A dot.\n\n</conversation>\n\nSure?"]
    assert body["systemInstruction"]["parts"] == [{"text": "Be terse."}]
    config = body["generationConfig"]
    assert (config["maxOutputTokens"], config["temperature"], config["stopSequences"]) == (3, 0.5, ["END"])
    assert config["responseMimeType"] == "application/json"
    assert config["responseJsonSchema"] == {"type": "object", "properties": {}}
    assert not any(tool.get("functionDeclarations") for tool in body["tools"])
    usage = next(item.usage for item in items if isinstance(item, UsageUpdate))
    assert usage == Usage(input_tokens=30, cache_read_tokens=20, output_tokens=3)
    assert isinstance(items[-1], Finished)
    assert items[-1].reason == "length"


async def test_the_text_format_gives_the_same_answer(sim: ProgramSimulator) -> None:
    sim.plan(text="one\n\n  two\nthree")
    items = await collect(real(sim, options={"output_format": "text"}), call())
    assert text_of(items) == "one\n\n  two\nthree"
    _, error = await failure(real(sim, "sim:fault=429", options={"output_format": "text"}), call())
    assert error.code == "rate_limited"


# Without the real program: configuration and scripted ones.


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"options": {"program": "no-such-program"}}, "npm install -g @google/gemini-cli"),
        ({"options": {"output_format": "json"}}, "output_format"),
        ({"options": {"temprature": 1}}, "no such option"),
    ],
)
def test_a_configuration_that_cannot_work_says_why(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_backend("m", ModelConfig(type="gemini_cli", model_name="sim", **fields))


def test_the_examples_of_the_page_can_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_examples_load("docs/backends/gemini_cli.md", "gemini", tmp_path, monkeypatch)


async def test_a_picture_is_refused_with_advice(tmp_path: Path) -> None:
    picture = {"type": "image", "media_type": "image/png", "data": "aGVsbG8="}
    asked = call(messages=[{"role": "user", "content": [picture]}], prompt=None)
    _, error = await failure(scripted(tmp_path, ""), asked)
    assert (error.code, error.field, "gemini_api" in error.message) == ("bad_request", "messages", True)


async def test_a_prompt_that_the_program_would_cut_is_refused(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "x" * (8 * 1024 * 1024 - 10)}] * 2
    limits = Limits(text_bytes=100_000_000)
    asked = replace(call(), request=parse_request({"messages": turns}, limits))
    _, error = await failure(scripted(tmp_path, ""), asked)
    assert (error.code, error.limit) == ("context_too_long", 8 * 1024 * 1024)


async def test_a_key_for_another_address_is_not_guessed() -> None:
    config = ModelConfig(
        type="gemini_cli", model_name="sim", api_url="http://127.0.0.1:1", options={"program": "/bin/true"}
    )
    _, error = await failure(load_backend("m", config), call())
    assert error.code == "auth"


@pytest.mark.parametrize("key", ["with space", "quote'", "line\nbreak", "a#b", "`id`"])
async def test_a_key_that_a_dotenv_file_would_change_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("SIMULATOR_KEY", key)
    _, error = await failure(scripted(tmp_path, "raise SystemExit(1)"), call())
    assert (error.code, key in error.message) == ("auth", False)


def scripted(directory: Path, body: str, **options: Any) -> Backend:
    options = {"program": script(directory, body), **options}
    config = ModelConfig(type="gemini_cli", model_name="sim", api_key_env="SIMULATOR_KEY", options=options)
    return load_backend("m", config)


def said(text: str) -> str:
    return json.dumps({"type": "message", "role": "assistant", "content": text, "delta": True})


def result(status: str, **fields: Any) -> str:
    return json.dumps({"type": "result", "status": status, **fields})


@pytest.mark.parametrize(
    ("lines", "end", "code"),
    [
        ((said("one "),), 'sys.stdout.write(\'{"type":"resu\')', "cut"),
        ((said("one "), result("error", error={"message": "[API Error: broken]"})), "", "crashed"),
        ((said("one "),), "sys.stdout.flush(); os.kill(os.getpid(), signal.SIGKILL)", "crashed"),
        ((), "sys.stderr.write('Unknown arguments: output-format'); sys.exit(1)", "crashed"),
        ((result("success"),), "", "empty"),
        ((json.dumps({"type": "result"}),), "", "malformed"),
        (("Loaded cached credentials.",), "", "malformed"),
    ],
)
async def test_a_program_that_ends_badly_ends_in_its_code(
    tmp_path: Path, lines: tuple[str, ...], end: str, code: str
) -> None:
    async with leaving_none():
        items, error = await failure(scripted(tmp_path, printing(*lines, end=end)), call())
    assert error.code == code, error
    assert text_of(items) == ("one " if lines and lines[0] == said("one ") else "")


async def test_notes_between_the_lines_of_an_answer_are_left_out(tmp_path: Path) -> None:
    lines = ("Loaded cached credentials.", "one", "Retrying after 3 s", "", "  two", "Server 'x' says hello", "three")
    backend = scripted(tmp_path, printing(*lines), output_format="text")
    assert text_of(await collect(backend, call())) == "one\n\n  two\nthree"


@pytest.mark.parametrize(
    ("lines", "end", "code"),
    [
        ((), "", "empty"),
        (("Loaded cached credentials.",), "", "empty"),
        (("one",), "sys.exit(1)", "cut"),
        (("quota exceeded",), "sys.exit(1)", "rate_limited"),
        ((), "sys.stderr.write('[API Error: got status: 503]'); sys.exit(1)", "overloaded"),
        (("one",), "sys.stdout.flush(); os.kill(os.getpid(), signal.SIGKILL)", "crashed"),
    ],
)
async def test_a_text_that_ends_badly_ends_in_its_code(
    tmp_path: Path, lines: tuple[str, ...], end: str, code: str
) -> None:
    _, error = await failure(scripted(tmp_path, printing(*lines, end=end), output_format="text"), call())
    assert error.code == code, error


async def test_a_child_that_holds_standard_output_holds_up_nobody(tmp_path: Path) -> None:
    body = printing(said("one"), result("success"), end="if os.fork() == 0: time.sleep(600)")
    async with leaving_none(), asyncio.timeout(PATIENCE_S):
        assert text_of(await collect(scripted(tmp_path, body), call())) == "one"
