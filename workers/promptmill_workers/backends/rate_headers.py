"""The headers in which providers tell their limits.

Read are ``anthropic-ratelimit-{requests,tokens,input-tokens,output-tokens}-{limit,remaining,reset}``, whose resets are
times (RFC 3339; https://platform.claude.com/docs/en/api/rate-limits), and ``x-ratelimit-{limit,remaining,reset}-
{requests,tokens}``, whose resets are durations such as ``1m2.5s`` or ``20ms``
(https://platform.openai.com/docs/guides/rate-limits) or, elsewhere, plain seconds. Times are compared with the
answer's own ``date``, so a clock that is wrong here does no harm. What cannot be read counts as not told.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

from promptmill.rates import RateInfo, RateWindow

_ANTHROPIC: Final = "anthropic-ratelimit-"
_OPENAI: Final = "x-ratelimit-"
_UNITS_S: Final = {"d": 86_400.0, "h": 3_600.0, "m": 60.0, "s": 1.0, "ms": 0.001, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_PART: Final = re.compile(r"(\d{1,9}(?:\.\d{1,12})?)(ms|us|µs|ns|d|h|m|s)", re.ASCII)
_NUMBER: Final = re.compile(r"\d{1,12}(?:\.\d{1,12})?", re.ASCII)
_MAX_S: Final = 7 * 86_400.0
_COUNT_DIGITS: Final = 15


def rate_info(headers: Mapping[str, str]) -> RateInfo | None:
    """What an answer's headers (any case) tell of limits; None where they tell nothing."""
    names = [name for name in headers if "ratelimit-" in name.lower()]
    if not names:
        return None
    low = {name.lower(): headers[name].strip() for name in names}
    date = headers.get("date")
    if any(name.startswith(_ANTHROPIC) for name in low):
        kinds = ("requests", "tokens", "input-tokens", "output-tokens")
        windows = [_window(low, [f"{_ANTHROPIC}{kind}-{part}" for part in _PARTS], date) for kind in kinds]
        info = RateInfo(*windows)
    else:
        pair = [_window(low, [f"{_OPENAI}{part}-{kind}" for part in _PARTS], date) for kind in ("requests", "tokens")]
        info = RateInfo(*pair)
    return info if info != RateInfo() else None


_PARTS: Final = ("limit", "remaining", "reset")


def _window(low: Mapping[str, str], names: list[str], date: str | None) -> RateWindow | None:
    limit, remaining, reset = (low.get(name, "") for name in names)
    window = RateWindow(_count(limit), _count(remaining), _reset_s(reset, date) if reset else None)
    return window if window != RateWindow() else None


def _count(text: str) -> int | None:
    # Some proxies write counts as floats.
    whole = text.removesuffix(".0")
    return int(whole) if whole.isascii() and whole.isdecimal() and len(whole) <= _COUNT_DIGITS else None


def _reset_s(text: str, date: str | None) -> float | None:
    if _NUMBER.fullmatch(text):
        seconds = float(text)
    elif _PART.match(text):
        parts = _PART.findall(text)
        if "".join(number + unit for number, unit in parts) != text:
            return None
        seconds = sum(float(number) * _UNITS_S[unit] for number, unit in parts)
    else:
        at = _time(text)
        if at is None:
            return None
        seconds = max((at - _told_at(date)).total_seconds(), 0.0)
    # What is further off is a date in plain seconds, or a mistake.
    return seconds if seconds <= _MAX_S else None


def _time(text: str) -> datetime | None:
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        return None
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def _told_at(date: str | None) -> datetime:
    try:
        at = parsedate_to_datetime(date) if date else datetime.now(UTC)
    except ValueError:
        return datetime.now(UTC)
    return at if at.tzinfo else at.replace(tzinfo=UTC)
