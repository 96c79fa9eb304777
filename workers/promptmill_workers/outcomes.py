"""What is made of an attempt's outcome: its entry in ``tries``, its usage and cost, and how long to wait after it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from promptmill.contract import JobRequest, Usage
from promptmill.errors import BackendError, PromptmillError
from promptmill.routing import Route
from promptmill.store.tries import CLAIM_CHARS
from promptmill.tracing import Span
from promptmill.usage import price, settled_usage
from promptmill_workers.attempt import Progressing

MESSAGE_MAX_CHARS: Final = 2_000
_RETRY_BASE_S: Final = 0.5
_RETRY_MAX_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended, for who counts: ``code`` is None where it answered, ``first_s`` where no token came."""

    code: str | None
    took_s: float
    first_s: float | None
    usage: Usage | None
    cost_usd: float | None


def said(error: BackendError) -> str:
    """An error for readers' progress, bounded."""
    return f"{error.code}: {error.message}"[:MESSAGE_MAX_CHARS]


def backoff_s(error: BackendError, tried: int) -> float:
    """Full jitter, so that jobs that failed together do not come back together; no less than the provider asked for."""
    wait_s = random.uniform(0, min(_RETRY_BASE_S * 2 ** (tried - 1), _RETRY_MAX_S))  # noqa: S311 - no secret
    if error.retry_after_s is not None:
        wait_s = min(max(wait_s, error.retry_after_s), _RETRY_MAX_S)
    return wait_s


def settle(request: JobRequest, into: Progressing, route: Route) -> None:
    """What an attempt used, estimated where nobody counted, and what that costs where its provider did not say."""
    size = len(into.text.encode())
    into.usage = settled_usage(request, into.usage, size, whole=into.finished is not None, model=route.name)
    if into.usage is not None and into.cost_usd is None:
        cost = price(route.config, into.usage)
        into.cost_usd = float(cost) if cost is not None else None


def describe(
    number: int, route: Route, started: datetime, into: Progressing, error: PromptmillError | None, claim: str
) -> dict[str, Any]:
    """What :class:`~promptmill.contract.Attempt` reads; built by hand because this runs for every job."""
    request_id = getattr(error, "provider_request_id", None) or (
        into.finished.provider_request_id if into.finished else None
    )
    fields = {
        "attempt": number,
        "claim": claim[:CLAIM_CHARS],
        "model": route.name,
        "backend": route.config.type,
        "slot": route.slot,
        "outcome": error.code if error else "succeeded",
        "message": error.message[:MESSAGE_MAX_CHARS] if error else None,
        "started_at": started.isoformat(),
        "finished_at": datetime.now(UTC).isoformat(),
        "usage": into.usage.model_dump() if into.usage else None,
        "cost_usd": into.cost_usd,
        "provider_request_id": request_id,
    }
    return {name: value for name, value in fields.items() if value is not None}


def tell_span(attempt: Span, route: Route, into: Progressing, code: str | None) -> None:
    """What an attempt's span says at its end, by OpenTelemetry's names where it has any."""
    about: dict[str, str | int | float | None] = {
        "promptmill.backend": route.config.type,
        "promptmill.slot": route.slot,
    }
    if into.usage is not None:
        about["gen_ai.usage.input_tokens"] = into.usage.input_tokens
        about["gen_ai.usage.output_tokens"] = into.usage.output_tokens
    if into.finished is not None:
        about["promptmill.finish_reason"] = into.finished.reason
    attempt.note({**about, "promptmill.cost_usd": into.cost_usd})
    if code is not None:
        attempt.fail(code)
