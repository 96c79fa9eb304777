"""Whether a text is JSON of the form that a schema describes; the part that can be run in a process of its own.

As a program (:mod:`~promptmill_workers.backends.structured` runs it) it reads one JSON object, ``path`` (its
``sys.path``), ``limit_s``, and either ``schema`` (null: any object) and ``text``, or ``expressions`` (a list of place
and regular expression); it prints one, ``problem`` (null: none). The kernel ends it by SIGPROF once it has used
``limit_s`` of CPU, whatever runs then: a regular expression holds the interpreter's lock and hears of nothing else. It
imports nothing of promptmill's: that would take longer than the check.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import lru_cache
from importlib import import_module
from itertools import islice
from time import monotonic
from typing import Any, Final

_SHOWN: Final = 120
_ERRORS: Final = 20
_deadline: ContextVar[float] = ContextVar("_deadline", default=float("inf"))


class OutOfTimeError(Exception):
    """The check took longer than it was allowed."""


def problem(text: str, schema: dict[str, Any] | None, limit_s: float = float("inf")) -> str | None:
    """Why ``text`` is no JSON of this form and where (a JSON pointer); None where it is.

    The words hold nothing of the answer but names of properties: they end up in logs. References are resolved within
    the schema only; nothing is fetched.

    Raises
    ------
    OutOfTimeError
        After about ``limit_s`` in the schema's own loops and references. Parsing and regular expressions are not
        interrupted.
    """
    if text.lstrip().startswith("```"):
        return "the answer is a block of Markdown, not bare JSON"
    try:
        value = json.loads(text, parse_constant=_refuse)
    except RecursionError:
        return "the answer is nested too deeply"
    except ValueError as err:
        # The standard library's own words name the place and quote nothing.
        return f"the answer is not JSON: {err}"
    if schema is None:
        return None if isinstance(value, dict) else f"the answer is {_kind(value)}, not a JSON object"
    token = _deadline.set(monotonic() + limit_s)
    try:
        return _unfit(value, schema)
    except RecursionError:
        return "the answer cannot be checked: it or the schema's references are nested too deeply"
    except ArithmeticError:
        return "the answer cannot be checked: it holds a number beyond all bounds"
    finally:
        _deadline.reset(token)


def uncompiled(expressions: list[tuple[str, str]]) -> tuple[str, str] | None:
    """The first of ``(place, regular expression)`` that Python does not know, as ``(place, why)``."""
    for path, expression in expressions:
        try:
            re.compile(expression)
        except (re.error, OverflowError, RecursionError) as err:
            return path, str(err)
    return None


def _unfit(value: Any, schema: dict[str, Any]) -> str | None:
    # A registry of our own: the library's default one fetches what it does not know.
    errors = _validator()(schema, registry=import_module("referencing").Registry()).iter_errors(value)
    error: Any = import_module("jsonschema.exceptions").best_match(islice(errors, _ERRORS))
    if error is None:
        return None
    path = "".join(f"/{str(part).replace('~', '~0').replace('/', '~1')}" for part in error.absolute_path)
    return f"the answer does not fit the schema at {_short(path) or 'its top'}: {_reason(error)}"


def _reason(error: Any) -> str:
    wanted = _short(json.dumps(error.validator_value, default=str, ensure_ascii=False))
    match error.validator:
        case "type":
            return f"it is {_kind(error.instance)}, the type must be {wanted}"
        case "required":
            missing = [str(name) for name in error.validator_value if name not in error.instance]
            return f"lacks {_short(', '.join(missing))}"
        case "additionalProperties":
            return _short(str(error.message))
        case None:
            return "nothing may stand here"
        case word:
            return f"{word} {wanted} does not hold"


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")


def _kind(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case str():
            return "a string"
        case int() | float():
            return "a number"
        case list():
            return "an array"
        case _:
            return "an object"


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


@lru_cache(maxsize=1)
def _validator() -> Any:
    """Draft 2020-12 with a look at the clock at every keyword."""
    validators: Any = import_module("jsonschema.validators")  # a fifth of a second, and only where a schema was given
    draft = validators.Draft202012Validator
    return validators.extend(draft, {word: _timed(check) for word, check in draft.VALIDATORS.items()})


def _timed(check: Callable[..., Any]) -> Callable[..., Iterator[Any]]:
    def checked(*args: Any) -> Iterator[Any]:
        if monotonic() > _deadline.get():
            raise OutOfTimeError
        yield from check(*args) or ()

    return checked


def _die_with_parent() -> None:
    """Linux: end with the worker, whatever ended it. Elsewhere the bound on CPU is what ends this."""
    if sys.platform.startswith("linux"):
        import ctypes  # noqa: PLC0415
        import os  # noqa: PLC0415
        import signal  # noqa: PLC0415

        parent = os.getppid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
        if os.getppid() != parent or parent == 1:
            sys.exit(1)  # it died before the line above took effect


def _main() -> None:
    import signal  # noqa: PLC0415 - only the program needs it

    _die_with_parent()
    asked = json.loads(sys.stdin.buffer.read())
    # The default action, by the kernel: no Python has to run for it.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, asked["limit_s"])
    sys.path[:] = asked["path"]
    found = uncompiled(asked["expressions"]) if "expressions" in asked else problem(asked["text"], asked["schema"])
    sys.stdout.write(json.dumps({"problem": found}))


if __name__ == "__main__":
    _main()
