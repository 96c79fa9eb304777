"""The events of a job, as they stand in its log and travel to readers.

An event's JSON begins with ``{"type":"<type>"``: the relay reads the type from there without parsing the rest. The id,
``<epoch>-<n>``, is not part of the JSON; n counts 1, 2, 3 … within an epoch. ``done``, ``error`` and ``cancelled`` end
the log. The tokens since the last ``restart``, joined, equal the stored text.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from promptmill.contract.job import Usage

END_TYPES: Final[frozenset[str]] = frozenset({"done", "error", "cancelled"})


class _Event(BaseModel):
    model_config = ConfigDict(extra="ignore")

    type: Any
    id: str | None = Field(default=None, exclude=True)
    """``<epoch>-<n>``; pass it as ``after`` (or ``Last-Event-ID``) to resume right behind this event."""

    @property
    def ends(self) -> bool:
        """True for the one event after which no other comes."""
        return self.type in END_TYPES

    def to_json(self) -> bytes:
        """The bytes that are stored and published: ``type`` first, fields without a value left out."""
        return self.model_dump_json(exclude_none=True).encode()


class Progress(_Event):
    """What happens to the job besides tokens. ``phase``: queued, started, retrying, fallback, requeued, tool …"""

    type: Literal["progress"] = "progress"
    phase: str
    message: str | None = None
    attempt: int | None = None
    backend: str | None = None
    model: str | None = None


class Token(_Event):
    """A piece of the answer: one or several of the provider's chunks."""

    type: Literal["token"] = "token"
    text: str


class Restart(_Event):
    """The text so far is void; the next tokens start the answer anew."""

    type: Literal["restart"] = "restart"
    reason: str
    attempt: int | None = None


class Confirm(_Event):
    """Reserved: a tool call that waits for a human."""

    type: Literal["confirm"] = "confirm"
    call_id: str
    tool: str
    arguments: dict[str, Any] = Field(default_factory=dict)
    expires_at: datetime | None = None


class Done(_Event):
    """The job succeeded."""

    type: Literal["done"] = "done"
    text: str
    usage: Usage | None = None
    cost_usd: float | None = None
    backend: str | None = None
    model: str | None = None
    finish_reason: str | None = None
    attempt: int | None = None
    cached: bool | None = None


class Error(_Event):
    """The job failed or expired. Named like ``EventSource``'s own event, so pages test ``if (e.data)``."""

    type: Literal["error"] = "error"
    code: str
    message: str
    retryable: bool = False


class Cancelled(_Event):
    """The job was stopped."""

    type: Literal["cancelled"] = "cancelled"
    reason: str


class Unknown(_Event):
    """An event of a type that this version does not know. Readers skip it; ``data`` holds its fields."""

    model_config = ConfigDict(extra="allow")

    type: str


Event = Progress | Token | Restart | Confirm | Done | Error | Cancelled | Unknown

_known: TypeAdapter[Any] = TypeAdapter(
    Annotated[
        Progress | Token | Restart | Confirm | Done | Error | Cancelled,
        Field(discriminator="type"),
    ]
)


def parse_event(data: bytes | str, event_id: str | None = None) -> Event:
    """One event from its JSON.

    A type that this version does not know becomes :class:`Unknown`.

    Raises
    ------
    ValueError
        ``data`` is not a JSON object with a ``type``.
    """
    try:
        event = _known.validate_json(data)
    except ValidationError as err:
        if not any(e["type"] == "union_tag_invalid" for e in err.errors()):
            raise
        event = Unknown.model_validate_json(data)
    event.id = event_id
    return event
