"""What the ledger says of one attempt, made from the job's record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from typing import Any, Final

import orjson
from pydantic import ValidationError

from promptmill.contract import JobRequest, Usage
from promptmill.errors import BadRequest
from promptmill.registry import Registry
from promptmill.routing import Route, decide
from promptmill.store import Record
from promptmill.store.tries import Try, day_of, ended_at, is_presumed, try_id
from promptmill.usage.estimates import BYTES_PER_TOKEN, estimated_usage
from promptmill.usage.prices import price

NANO: Final = 1_000_000_000
_NO_USAGE: Final = Usage()


@dataclass(frozen=True, slots=True)
class Entry:
    """One field of a day's ledger: its name, and its JSON value.

    The value has ``user``, ``role``, ``model``, ``backend`` (empty where there is none), ``slot``, ``outcome``, ``in``,
    ``out``, ``cache_read``, ``cache_write`` (tokens), ``cost`` (nano-dollars), ``at`` (ms since 1970), and where they
    hold ``estimated``, ``unpriced`` (tokens whose price nobody knows) and ``presumed`` (a later statement of its worker
    takes its place).
    """

    day: str
    field: str
    value: bytes


def entry_of(record: Record, try_: Try, registry: Registry, request: bytes | None) -> Entry:
    """The entry of one try. ``request`` is the job's, in JSON; needed where the try is presumed."""
    head = record.head
    model, backend, slot = try_.get("model"), try_.get("backend"), try_.get("slot")
    usage = Usage.model_validate(try_["usage"]) if try_.get("usage") else _NO_USAGE
    if is_presumed(try_) and request is not None:
        asked = JobRequest.model_validate_json(request)
        if model is None and (route := _asked(record, asked, registry)) is not None:
            model, backend, slot = route.name, route.config.type, route.slot
        if try_["text_bytes"]:
            size = float(try_.get("bytes_per_token") or BYTES_PER_TOKEN)
            usage = estimated_usage(asked, int(try_["text_bytes"]), size)
    cost = _nano_dollars(try_, model, usage, registry)
    at = ended_at(try_)
    value: dict[str, Any] = {
        "user": head["user"],
        "role": head.get("role") or "",
        "model": model or "",
        "backend": backend or "",
        "slot": slot or "",
        "outcome": try_.get("outcome") or "",
        "in": usage.input_tokens,
        "out": usage.output_tokens,
        "cache_read": usage.cache_read_tokens,
        "cache_write": usage.cache_write_tokens,
        "cost": cost or 0,
        "at": int(at.timestamp() * 1000),
    }
    flags = {
        "estimated": usage.estimated,
        "unpriced": cost is None and total_tokens(value) > 0,
        "presumed": is_presumed(try_),
    }
    value |= {name: True for name, holds in flags.items() if holds}
    return Entry(day_of(try_), f"{record.job_id}:{try_id(try_)}", orjson.dumps(value))


def total_tokens(value: Mapping[str, Any]) -> int:
    """All tokens of an entry's value."""
    return value["in"] + value["out"] + value["cache_read"] + value["cache_write"]


def _nano_dollars(try_: Try, model: str | None, usage: Usage, registry: Registry) -> int | None:
    if try_.get("cost_usd") is not None:
        dollars: Decimal | None = Decimal(repr(float(try_["cost_usd"])))
    else:
        config = registry.models.get(model) if model else None
        dollars = price(config, usage, ended_at(try_)) if config else None
    return None if dollars is None else int((dollars * NANO).to_integral_value(ROUND_HALF_UP))


def _asked(record: Record, request: JobRequest, registry: Registry) -> Route | None:
    """Which model a try that says nothing was most likely made of: the first one of those that were left."""
    try:
        decision = decide(registry, request)
    except (BadRequest, ValidationError):
        return None
    chain: list[str] | None = record.st.get("chain")
    return next((r for r in decision.routes if chain and r.name in chain), decision.first)
