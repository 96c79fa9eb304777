"""Is a value a secret that was typed where only a reference to one belongs?

Better to refuse an honest value now and then than to keep one key in Redis: the advice says where a value goes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final, cast
from urllib.parse import urlsplit

ADVICE: Final = (
    "keys are never stored in Redis: put it in an environment variable or a file of the workers, and name that with "
    "--api-key-env or --api-key-file (or an option that ends in _env or _file)"
)

_PREFIXED: Final = re.compile(
    r"(?<![A-Za-z0-9])(?:(?:sk|rk|pk|gsk|xai|hf|ghp|pplx|nvapi|key)[-_](?=[\w-]*\d)[\w-]{12,}"
    r"|AIza[\w-]{20,}|AKIA[A-Z0-9]{12,}|eyJ[\w-]{10,}\.[\w-]{10,})"
)
_BEARER: Final = re.compile(r"\b(?:bearer|basic) +[\w.~+/=-]{8,}", re.IGNORECASE)
_HEX: Final = re.compile(r"[0-9a-fA-F]{32,}")
_RANDOM: Final = re.compile(r"(?<![\w-])(?=[A-Za-z0-9]*[a-z])(?=[A-Za-z0-9]*[A-Z])(?=[A-Za-z0-9]*\d)[A-Za-z0-9]{32,}")
_SECRET_NAME: Final = re.compile(
    r"(?:^|[_-])(?:api[_-]?key|access[_-]?key|secret|password|passwd|token|credentials?|authorization)$", re.IGNORECASE
)


def find_key(value: Any, place: str) -> str | None:
    """Where ``value``, or something in it, looks like a key; None where nothing does. The key itself is never told.

    ``place`` names the value; names of what is inside are put behind it with dots.
    """
    return next(_found(value, place, named=False), None)


def _found(value: Any, place: str, *, named: bool) -> Iterator[str]:
    """``named``: what stands here is the name of a variable or of a file, whatever it is called."""
    if isinstance(value, dict):
        for key, inner in cast("dict[Any, Any]", value).items():
            name = str(key)
            if looks_like_key(name):
                yield f"a name in {place}"
            reference = named or name.endswith(("_env", "_file"))
            if not reference and isinstance(inner, str) and inner and _SECRET_NAME.search(name):
                yield f"{place}.{name}"
            yield from _found(inner, f"{place}.{name}", named=reference)
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(cast("list[Any]", value)):
            yield from _found(inner, f"{place}.{number}", named=named)
    elif isinstance(value, str) and looks_like_key(value):
        yield place


def looks_like_key(text: str) -> bool:
    """True for a text that holds a key in one of the usual forms, an address with a password, or a long random text."""
    if _PREFIXED.search(text) or _BEARER.search(text) or _HEX.fullmatch(text) or _RANDOM.search(text):
        return True
    return "://" in text and _has_password(text)


def _has_password(url: str) -> bool:
    try:
        return bool(urlsplit(url).password)
    except ValueError:
        return False
