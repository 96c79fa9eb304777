"""The keyword arguments of ``submit``, once for both producers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

from promptmill.contract import JobRequest, Limits, Message, Priority, Timeouts, parse_request


class RequestOptions(TypedDict, total=False):
    """What :class:`~promptmill.contract.JobRequest` takes beside the prompt; None means not given."""

    system: str | None
    model: str | None
    role: str | None
    slot: str | None
    exclude: list[str] | None
    max_tokens: int | None
    temperature: float | None
    stop: str | list[str] | None
    response_format: dict[str, Any] | None
    user: str | None
    metadata: dict[str, Any] | None
    priority: Priority | None
    timeouts: Timeouts | dict[str, float] | None
    idempotency_key: str | None
    cache: bool | None
    cancel_on_disconnect: bool | None


class BatchOptions(RequestOptions, total=False):
    """What a batch takes beside its items; the fields of a request hold for items that do not say otherwise."""

    name: str | None
    """Shown with the batch."""
    ahead: int
    """How many items are taken from the source before the result of the first one is read; 1,000."""
    dedupe: bool
    """Run equal requests once; their results are the same."""
    max_cost_usd: float
    """Cancel the batch once the lines that ended have cost more."""


def build_request(
    prompt: str | None,
    messages: Sequence[Message | dict[str, Any]] | None,
    options: RequestOptions,
    limits: Limits,
) -> JobRequest:
    """A checked request. Raises :class:`~promptmill.errors.BadRequest`."""
    data: dict[str, Any] = {k: v for k, v in options.items() if v is not None}
    if prompt is not None:
        data["prompt"] = prompt
    if messages is not None:
        data["messages"] = list(messages)
    return parse_request(data, limits)
