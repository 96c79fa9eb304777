"""What a ``response_format`` promises is checked, and no schema can hang the worker or make it fetch anything."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptmill.contract import ResponseFormat
from promptmill.errors import BackendError
from promptmill_workers.backends import schema_check, structured
from promptmill_workers.backends.structured import FIELD, check_answer, check_schema
from tests.support.processes import PATIENCE_S, wait_gone, wait_until

ANY_OBJECT = ResponseFormat(type="json_object")
ORDER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "id": {"type": "integer"},
        "lines": {"type": "array", "items": {"$ref": "#/$defs/line"}},
    },
    "required": ["id"],
    "additionalProperties": False,
    "$defs": {
        "line": {
            "type": "object",
            "properties": {"price/unit": {"type": "number", "minimum": 0}, "unit": {"enum": ["kg", "piece"]}},
            "required": ["price/unit"],
        }
    },
}


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine no check is to fail for its time, but where a test is about that."""
    monkeypatch.setattr(structured, "CHECK_S", PATIENCE_S)


def checkers() -> list[psutil.Process]:
    """The processes of ours that check; the run's store and warden are ours too."""
    found: list[psutil.Process] = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [process] if schema_check.__file__ in process.cmdline() else []
    return found


def form(schema: dict[str, Any]) -> ResponseFormat:
    return ResponseFormat(type="json_schema", json_schema=schema)


async def wrong(text: str, asked: ResponseFormat, code: str = "malformed") -> str:
    with pytest.raises(BackendError) as caught:
        await check_answer(text, asked)
    assert caught.value.code == code
    return str(caught.value)


async def refused(schema: dict[str, Any]) -> str:
    with pytest.raises(BackendError) as caught:
        await check_schema(form(schema))
    assert (caught.value.code, caught.value.field, caught.value.retryable) == ("bad_request", FIELD, False)
    return str(caught.value)


async def test_without_a_response_format_any_text_is_an_answer() -> None:
    await check_schema(None)
    await check_answer("```json\n{", None)


async def test_an_answer_that_fits_is_an_answer() -> None:
    await check_schema(form(ORDER))
    await check_answer('{"id": 7, "lines": [{"price/unit": 0.5, "unit": "kg"}, {"price/unit": 3}]}', form(ORDER))
    await check_answer(' {"anything": [1, null]}\n', ANY_OBJECT)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ('{"id": "7"}', "at /id: it is a string, the type must be"),
        ("[]", "at its top: it is an array"),
        ("{}", "at its top: lacks id"),
        ('{"id": 1, "lines": [{"price/unit": 1}, {"price/unit": -1}]}', "at /lines/1/price~1unit: minimum 0"),
        ('{"id": 1, "lines": [{}]}', "at /lines/0: lacks price/unit"),
        ('{"id": 1, "lines": [{"price/unit": 1, "unit": "t"}]}', 'at /lines/0/unit: enum ["kg", "piece"]'),
        ('{"id": 1, "more": 2}', "'more' was unexpected"),
    ],
)
async def test_an_answer_that_does_not_fit_says_where_and_why(answer: str, said: str) -> None:
    assert said in await wrong(answer, form(ORDER))


@pytest.mark.parametrize("asked", [ANY_OBJECT, form({"type": "object"})])
@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ('```json\n{"a": 1}\n```', "Markdown"),
        ('Here it is: {"a": 1}', "not JSON"),
        ('{"a": 1} {"b": 2}', "not JSON"),
        ('{"a": NaN}', "NaN"),
        ('{"a": ', "not JSON"),
        ("[1]", "an array"),
        ("null", "null"),
        ("[" * 100_000, "too deeply"),
    ],
)
async def test_what_is_no_bare_json_object_is_malformed(asked: ResponseFormat, answer: str, said: str) -> None:
    assert said in await wrong(answer, asked)


async def test_the_message_holds_nothing_of_what_the_model_said() -> None:
    for answer in ('{"id": "the secret"}', '{"id": 1, "lines": ["the secret"]}', "the secret", '{"a": the secret}'):
        said = await wrong(answer, form(ORDER))
        assert "secret" not in said
        assert len(said) < 500


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "strnig"}, "/type: not a valid schema"),
        ({"properties": {"a": {"minimum": "0"}}}, "/properties/a/minimum: not a valid schema"),
        ({"properties": []}, "/properties: not a valid schema"),
        ({"$schema": "http://json-schema.org/draft-07/schema#"}, "draft 2020-12"),
        ({"$schema": 7}, "draft 2020-12"),
        ({"$ref": "http://127.0.0.1:9/schema.json"}, "leads out of the schema"),
        ({"items": {"$ref": "other.json"}}, "/items: $ref 'other.json' leads out"),
        ({"$ref": "#/$defs/none"}, "leads nowhere"),
        ({"$ref": "#/enum/0", "enum": [{"pattern": "(a+)+$"}]}, "leads nowhere"),
        ({"properties": {"a": {"$id": "http://127.0.0.1:9/", "type": "string"}}}, "belong to the top"),
        ({"properties": {"a": {"$schema": "http://json-schema.org/draft-04/schema"}}}, "belong to the top"),
        ({"$ref": "#"}, "refers to itself without end"),
        (
            {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"}]}, "b": {"not": {"$ref": "#"}}}},
            "itself",
        ),
        ({"unevaluatedProperties": False}, "not supported"),
        ({"$dynamicRef": "#x"}, "not supported"),
        ({"$anchor": "x", "items": {"$ref": "#x"}}, "$anchor is not supported"),
        ({"properties": {"a": {"pattern": "("}}}, "/properties/a: not a regular expression"),
        ({"patternProperties": {r"\p{L}": {}}}, "not a regular expression"),
        ({"allOf": [True] * 5000}, "more than 2000 schemas"),
        ({"properties": {"enum": {"allOf": [True] * 5000}}}, "more than 2000 schemas"),
        ({"items": {"properties": {str(i): {} for i in range(5000)}}}, "more than 2000 schemas"),
    ],
)
async def test_a_schema_that_cannot_be_checked_is_refused_before_the_call(schema: dict[str, Any], said: str) -> None:
    assert said in await refused(schema)


@pytest.mark.parametrize(
    ("schema", "fits", "does_not"),
    [
        ({"properties": {"next": {"$ref": "#"}, "v": {"type": "number"}}}, '{"next": {"v": 1}}', '{"next": {"v": ""}}'),
        ({"$id": "https://example.org/s", "items": {"$ref": "#/$defs/a"}, "$defs": {"a": {"const": 1}}}, "[1]", "[2]"),
        ({"$defs": {"a b/c%~": {"const": 1}}, "items": {"$ref": "#/$defs/a%20b~1c%25~0"}}, "[1]", "[2]"),
        ({"properties": {"pattern": {"const": "("}, "$ref": {"const": 1}}}, '{"pattern": "("}', '{"$ref": 2}'),
        ({"pattern": r"^\d{4}-\d\d$"}, '"2026-11"', '"yesterday"'),
        ({"uniqueItems": True}, "[1, 2]", "[1, 1]"),
        ({"items": False}, "[]", "[1]"),
        ({"default": {"$ref": "http://127.0.0.1:9/"}, "const": {"pattern": "("}}, '{"pattern": "("}', "{}"),
    ],
)
async def test_schemas_of_many_forms_are_understood(schema: dict[str, Any], fits: str, does_not: str) -> None:
    await check_schema(form(schema))
    await check_answer(fits, form(schema))
    await wrong(does_not, form(schema))


def doubling(levels: int) -> dict[str, Any]:
    """A schema without a loop whose check takes 2**levels steps."""
    below = {"allOf": [{"$ref": "#/$defs/{}"}] * 2}
    defs = {str(i): json.loads(json.dumps(below).replace("{}", str(i + 1))) for i in range(levels)}
    return {"$ref": "#/$defs/0", "$defs": {**defs, str(levels): {"type": "string"}}}


@pytest.mark.parametrize(
    ("schema", "answer"),
    [
        (doubling(40), '"x"'),
        ({"pattern": "^(a+)+$"}, json.dumps("a" * 60 + "b")),
        ({"items": {"allOf": [{"minimum": 0}] * 1000}}, json.dumps([1] * 16_000)),
        ({"uniqueItems": True}, json.dumps([{"n": i} for i in range(100_000)])),
    ],
    ids=["references", "expression", "product", "uniqueItems"],
)
async def test_a_schema_made_to_hang_ends_soon_and_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch, schema: dict[str, Any], answer: str
) -> None:
    await check_schema(form(schema))
    monkeypatch.setattr(structured, "CHECK_S", 1.0)
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0.001)
            turns += 1

    turning = asyncio.create_task(turn())
    try:
        assert "takes longer than 1 s" in await wrong(answer, form(schema), "bad_request")
    finally:
        turning.cancel()
    assert turns > 0, "checked here nobody else would have a turn"
    assert checkers() == []


async def test_a_check_that_is_cancelled_leaves_no_process() -> None:
    task = asyncio.create_task(check_answer(json.dumps("a" * 60 + "b"), form({"pattern": "^(a+)+$"})))
    await wait_until(lambda: bool(checkers()), "it is being checked")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert checkers() == []


async def test_a_large_answer_is_checked_apart_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    large = json.dumps({"id": 1, "lines": [{"price/unit": i} for i in range(20_000)]})
    await check_answer(large, form(ORDER))
    await check_answer(large, ANY_OBJECT)
    broken = large.replace(": 19999}", ': "x"}')
    assert "at /lines/19999/price~1unit" in await wrong(broken, form(ORDER))
    assert "an array" in await wrong(f"[{large}]", ANY_OBJECT)


async def test_the_checking_process_sees_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []
    start = asyncio.create_subprocess_exec

    async def noting(*command: Any, **options: Any) -> Any:
        started.append(options)
        assert "planted" not in str(command)
        return await start(*command, **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", noting)
    monkeypatch.setenv("PLANTED_KEY", "planted")
    await check_answer('"planted"', form({"pattern": "planted"}))
    assert [options["env"] for options in started] == [{}]


async def test_nothing_is_fetched_even_past_the_check_of_the_schema() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        schema = {"$ref": f"http://127.0.0.1:{listener.getsockname()[1]}/schema.json"}
        with pytest.raises(Exception, match="Unresolvable"):
            schema_check.problem("{}", schema)
        with pytest.raises(TimeoutError):
            listener.accept()


SCHEMAS = st.recursive(
    st.booleans() | st.sampled_from([{}, {"type": "string"}, {"$ref": "#"}, {"$ref": "#/$defs/a"}, {"minimum": 3}]),
    lambda inner: (
        st.dictionaries(
            st.sampled_from(["properties", "$defs", "dependentSchemas"]), st.dictionaries(st.sampled_from("ab"), inner)
        )
        | st.dictionaries(st.sampled_from(["anyOf", "allOf", "oneOf", "prefixItems"]), st.lists(inner, max_size=3))
        | st.dictionaries(
            st.sampled_from(["items", "not", "if", "then", "else", "contains", "additionalProperties"]), inner
        )
    ),
    max_leaves=8,
).filter(lambda schema: isinstance(schema, dict))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(0, 5) | st.sampled_from(["", "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=8,
)


@given(SCHEMAS, VALUES)
async def test_a_schema_that_was_taken_never_fails_in_any_other_way(schema: dict[str, Any], value: Any) -> None:
    seen: list[BackendError] = []
    for step in (check_schema(form(schema)), check_answer(json.dumps(value), form(schema))):
        if seen:
            step.close()
            continue
        try:
            await step
        except BackendError as error:
            seen.append(error)
    assert [error.code for error in seen] in ([], ["bad_request"], ["malformed"])
    assert not any("nested too deeply" in str(error) for error in seen)


async def test_slow_checks_of_one_user_hold_up_no_other() -> None:
    slow, quick = form({"pattern": "^(a+)+$"}), form({"pattern": "^b$"})
    hostile = json.dumps("a" * 60 + "b")
    checks = [asyncio.create_task(check_answer(hostile, slow, "mallory")) for _ in range(6)]
    try:
        await wait_until(lambda: bool(checkers()), "they are being checked")
        await check_answer('"b"', quick, "alice")
        assert not any(check.done() for check in checks)
    finally:
        for check in checks:
            check.cancel()
        await asyncio.gather(*checks, return_exceptions=True)


async def test_compiling_an_expression_holds_up_nobody_and_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured, "CHECK_S", 0.5)
    said = await refused({"pattern": "(?i)" + "[\x01-\uffff]" * 2000})
    assert "takes longer than 0.5 s" in said


async def test_a_number_beyond_all_bounds_is_malformed() -> None:
    assert "beyond all bounds" in await wrong("1" + "0" * 400, form({"multipleOf": 0.5}))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs PR_SET_PDEATHSIG")
async def test_a_check_does_not_outlive_its_worker() -> None:
    program = """
import asyncio, json
from promptmill.contract import ResponseFormat
from promptmill_workers.backends import structured
from promptmill_workers.backends.structured import check_answer
structured.CHECK_S = 600
asked = ResponseFormat(type="json_schema", json_schema={"pattern": "^(a+)+$"})
asyncio.run(check_answer(json.dumps("a" * 60 + "b"), asked))
"""
    worker = await asyncio.create_subprocess_exec(sys.executable, "-c", program)
    process = psutil.Process(worker.pid)
    await wait_until(lambda: bool(process.children()), "it is being checked")
    (checker,) = process.children()
    # It is a checker only once it has read what to check; before, the end of its input ends it anyway.
    await wait_until(lambda: checker.cpu_times().user >= 0.5, "it computes")
    worker.kill()
    await worker.wait()
    wait_gone([checker.pid])
