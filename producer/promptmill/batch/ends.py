"""How a line ended, as it is counted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson

from promptmill.store import Record
from promptmill.store.tries import Try
from promptmill.usage.entries import NANO

_TOKENS = ("input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens")


def ended_line(index: int, state: str, end: dict[str, Any], tries: Iterable[Try]) -> bytes:
    """The argument of the count script for a line whose job ended; what all of its attempts used counts."""
    tokens = dict.fromkeys(_TOKENS, 0)
    cost_nano, estimated, unpriced = 0, 0, 0
    for try_ in tries:
        usage: dict[str, Any] | None = try_.get("usage")
        if usage is None:
            continue
        for name in _TOKENS:
            tokens[name] += usage.get(name, 0)
        estimated |= bool(usage.get("estimated"))
        cost = try_.get("cost_usd")
        if cost is None:
            unpriced = 1
        else:
            cost_nano += round(cost * NANO)
    counts = [*tokens.values(), cost_nano, int(estimated), unpriced]
    return orjson.dumps([index, state, *counts, _code(state, end), end.get("model") or "", -1])


def ended_record(index: int, record: Record) -> bytes:
    """The same from the job's record."""
    return ended_line(index, record.state, record.end, record.tries)


def ended_as(index: int, first: int, record: Record | None) -> bytes:
    """The same for a line that gets the answer of an equal earlier one, which was counted already."""
    if record is None:
        return gone_line(index, first=first)
    end = record.end
    return _free(index, record.state, _code(record.state, end), end.get("model") or "", first)


def gone_line(index: int, code: str = "not_found", *, first: int = -1) -> bytes:
    """The same for a line without a job: its record is gone, or its request cannot be read."""
    return _free(index, "failed", code, "", first)


def cancelled_line(index: int, first: int) -> bytes:
    """The same for a line that was to have an equal one's answer, and whose batch was cancelled before."""
    return _free(index, "cancelled", "cancelled", "", first)


def _free(index: int, state: str, code: str, model: str, first: int) -> bytes:
    return orjson.dumps([index, state, 0, 0, 0, 0, 0, 0, 0, code, model, first])


def _code(state: str, end: dict[str, Any]) -> str:
    if state == "succeeded":
        return ""
    error: dict[str, Any] = end.get("error") or {}
    return error.get("code") or ("crashed" if state == "failed" else state)
