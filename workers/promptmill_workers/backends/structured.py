"""Structured answers: what a ``response_format`` promises is checked, whichever provider was asked.

A schema comes from whoever may submit a job, so checking must neither hang nor reach out: references lead nowhere but
into the schema itself, and a check that can run away runs in a process of its own, which the kernel ends after
``CHECK_S`` of CPU. Those are checks with a regular expression (nothing interrupts it within a process), with
``uniqueItems`` (quadratic in the library), of a large text, and whatever did not finish within ``QUICK_S``. They cost
a tenth of a second or two; all others about a millisecond in the event loop.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import weakref
from importlib import import_module
from typing import Any, Final, cast
from urllib.parse import unquote

from promptmill.contract import ResponseFormat
from promptmill.errors import BackendError
from promptmill_workers.backends import schema_check

CHECK_S: Final = 5.0
QUICK_S: Final = 0.02
LARGE_CHARS: Final = 32 * 1024
MAX_SCHEMAS: Final = 2000
"""Schemas within a schema: to check a schema of 64 KB against its own draft can take three seconds."""
AT_ONCE: Final = 2
"""Processes that check at the same time."""

FIELD: Final = "response_format.json_schema"
_IN_PLACE: Final = ("allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas", "$ref")
_SLOW: Final = frozenset({"pattern", "patternProperties", "uniqueItems"})
_UNSUPPORTED: Final = ("$dynamicRef", "$dynamicAnchor", "$recursiveRef", "unevaluatedProperties", "unevaluatedItems")
_DRAFT: Final = "https://json-schema.org/draft/2020-12/schema"
# Keywords whose value is data, or names: what stands in them is no schema.
_DATA: Final = frozenset({"const", "enum", "default", "examples", "required", "dependentRequired"})
_NAMED: Final = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})


class _Gates:
    """Who may check apart, in one event loop: so many at once, and each user one at a time."""

    def __init__(self) -> None:
        self.all = asyncio.Semaphore(AT_ONCE)
        self._users: weakref.WeakValueDictionary[str, asyncio.Semaphore] = weakref.WeakValueDictionary()

    def of(self, user: str) -> asyncio.Semaphore:
        """A user's own: many slow checks of one user keep that user waiting, and nobody else."""
        gate = self._users.get(user)
        if gate is None:
            gate = self._users[user] = asyncio.Semaphore(1)
        return gate


_gates: Final[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Gates]] = weakref.WeakKeyDictionary()


async def check_schema(response_format: ResponseFormat | None, user: str = "default") -> None:
    """Whether the schema can be checked at all; await it before the provider is paid for an answer.

    Raises
    ------
    BackendError
        ``bad_request`` with the field ``response_format.json_schema``: the schema is not valid, refers to something
        outside of itself, refers to itself without end, or uses what is not supported here.
    """
    if response_format is not None and response_format.json_schema is not None:
        # A thread: the library's import takes a fifth of a second, a schema of 64 KB about as much.
        expressions = await asyncio.to_thread(_check_schema, dict(response_format.json_schema))
        if expressions:
            # Compiling some takes a second for each kilobyte, and nothing interrupts it within this process.
            found = await _apart({"expressions": expressions}, user)
            if found is not None:
                raise _refused(found[0], f"not a regular expression that Python knows: {found[1]}")


def _check_schema(schema: dict[str, Any]) -> list[tuple[str, str]]:
    """Raises BackendError; answers the regular expressions that are left to be looked at, with their places."""
    if str(schema.get("$schema", _DRAFT)).rstrip("#") != _DRAFT:
        raise _refused("/$schema", "only draft 2020-12 is supported")
    places = dict(_walk(schema, ""))
    if sum(map(_count, places.values())) > MAX_SCHEMAS:
        raise _refused("", f"it holds more than {MAX_SCHEMAS} schemas")
    expressions: list[tuple[str, str]] = []
    for path, place in places.items():
        expressions += ((path, expression) for expression in _check_place(path, place, schema))
    _check_meta(schema)
    _check_loops(places)
    return expressions


async def check_answer(text: str, response_format: ResponseFormat | None, user: str = "default") -> None:
    """Whether the whole answer has the form that was asked for; nothing is asked without a ``response_format``.

    Raises
    ------
    BackendError
        ``malformed``, saying where (a JSON pointer) and why; JSON in a block of Markdown is malformed too.
        ``bad_request`` where the check took longer than ``CHECK_S``.
    """
    if response_format is None:
        return
    schema = response_format.json_schema
    found: str | None
    if len(text) > LARGE_CHARS or (schema and any(_SLOW & place.keys() for _, place in _walk(schema, ""))):
        found = await _apart({"schema": schema, "text": text}, user)
    else:
        try:
            found = schema_check.problem(text, schema, QUICK_S)
        except schema_check.OutOfTimeError:
            found = await _apart({"schema": schema, "text": text}, user)
    if found is not None:
        raise BackendError(found, code="malformed")


async def _apart(work: dict[str, Any], user: str) -> Any:
    """Do ``work`` in a process of its own; answers what :mod:`.schema_check` says of it, None where all is well."""
    asked = {"path": sys.path, "limit_s": CHECK_S, **work}
    gates = _gates.get(asyncio.get_running_loop())
    if gates is None:
        gates = _gates[asyncio.get_running_loop()] = _Gates()
    async with gates.of(user), gates.all:
        # No environment, which holds keys; -I and -S: nothing is imported but what is needed.
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", schema_check.__file__),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={},
            start_new_session=True,
        )
        try:
            out, _ = await process.communicate(json.dumps(asked).encode())
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    if process.returncode == -signal.SIGPROF:
        raise _refused("", f"checking with it takes longer than {CHECK_S:g} s")
    if process.returncode:
        raise BackendError(f"the check of the answer ended with code {process.returncode}", code="crashed")
    return json.loads(out)["problem"]


def _refused(path: str, reason: str) -> BackendError:
    return BackendError(f"{FIELD}{path}: {reason}", code="bad_request", field=FIELD)


def _count(place: dict[str, Any]) -> int:
    """A schema, and those in it that are no objects (``true``, ``false``)."""
    held: list[Any] = list(place.values())
    for value in place.values():
        if isinstance(value, list):
            held += cast("list[Any]", value)
        elif isinstance(value, dict):
            held += cast("dict[str, Any]", value).values()
    return 1 + sum(isinstance(each, bool) for each in held)


def _walk(schema: Any, path: str) -> list[tuple[str, dict[str, Any]]]:
    """Every schema in a schema, with its JSON pointer; the schema itself first."""
    found: list[tuple[str, dict[str, Any]]] = []
    if not isinstance(schema, dict):
        return found
    place = cast("dict[str, Any]", schema)
    found.append((path, place))
    for word, value in place.items():
        if word in _DATA:
            continue
        inner = f"{path}/{_escaped(word)}"
        if word in _NAMED and isinstance(value, dict):
            for name, child in cast("dict[str, Any]", value).items():
                found += _walk(child, f"{inner}/{_escaped(name)}")
        elif isinstance(value, list):
            for index, child in enumerate(cast("list[Any]", value)):
                found += _walk(child, f"{inner}/{index}")
        else:
            found += _walk(value, inner)
    return found


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _check_place(path: str, place: dict[str, Any], root: dict[str, Any]) -> list[str]:
    """Raises BackendError; answers the regular expressions of this place."""
    if place is not root and not {"$id", "$schema"}.isdisjoint(place):
        raise _refused(path, "$id and $schema belong to the top of the schema")
    for word in _UNSUPPORTED:
        if word in place:
            raise _refused(path, f"{word} is not supported")
    if "$anchor" in place:
        raise _refused(path, "$anchor is not supported; refer by a pointer, as in #/$defs/NAME")
    expressions: list[Any] = [place["pattern"]] if "pattern" in place else []
    named: Any = place.get("patternProperties")
    if isinstance(named, dict):
        expressions += cast("dict[str, Any]", named)
    return [str(expression) for expression in expressions]


def _check_meta(schema: dict[str, Any]) -> None:
    draft: Any = import_module("jsonschema").Draft202012Validator
    error: Any = next(draft(draft.META_SCHEMA).iter_errors(schema), None)
    if error is not None:
        path = "".join(f"/{_escaped(str(part))}" for part in error.absolute_path)
        raise _refused(path, f"not a valid schema: {error.message[:200]}")


def _check_loops(places: dict[str, dict[str, Any]]) -> None:
    """Every reference must lead to a schema, and no schema may need itself for the same value."""
    state: dict[str, bool] = {}  # False: being looked at

    def visit(path: str) -> None:
        if path in state:
            if not state[path]:
                raise _refused(path, "refers to itself without end")
            return
        state[path] = False
        for inner in _same_value(path, places):
            visit(inner)
        state[path] = True

    try:
        for path in places:
            visit(path)
    except RecursionError:
        raise _refused("", "its references make too long a chain") from None


def _same_value(path: str, places: dict[str, dict[str, Any]]) -> list[str]:
    """The schemas that are applied to the very value to which the one at ``path`` is applied."""
    place, found = places[path], list[str]()
    for word in _IN_PLACE:
        if word not in place:
            continue
        value: Any = place[word]
        inner = f"{path}/{_escaped(word)}"
        if word == "$ref":
            target = unquote(value.removeprefix("#")) if isinstance(value, str) and value[:2] in {"#", "#/"} else None
            if target is None:
                raise _refused(path, f"$ref {str(value)[:200]!r} leads out of the schema, and nothing is fetched")
            if target not in places:
                raise _refused(path, f"$ref {value[:200]!r} leads nowhere")
            found.append(target)
        elif isinstance(value, list):
            found += [f"{inner}/{index}" for index in range(len(cast("list[Any]", value)))]
        elif word == "dependentSchemas":
            found += [f"{inner}/{_escaped(name)}" for name in cast("dict[str, Any]", value)]
        else:
            found.append(inner)
    return [each for each in found if each in places]
