"""What a batch is, as clients and the store speak of it: its head, its lines, its state and its results."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from promptmill.contract import Job, Usage
from promptmill.contract.request import Name

BatchState = Literal["uploading", "running", "completed", "cancelling", "cancelled", "expired"]
"""``uploading -> running -> completed``, ``cancelling -> cancelled``, ``expired``. Lines run while others come."""

BATCH_END_STATES: Final[frozenset[str]] = frozenset({"completed", "cancelled", "expired"})

CHUNK_LINES: Final = 100
"""How many lines a chunk has, where a batch's head says nothing else."""


class BatchHead(BaseModel):
    """What is said of a batch when it is created, and never changes.

    Line ``i`` is in chunk ``i // chunk_lines``; every chunk but the last is full. Clients choose a smaller
    ``chunk_lines`` where lines are large, so that no chunk becomes too big for one value of the store.
    ``expires_s`` counts from creation; ``retention_s`` from the end; None leaves both to the settings. Once its ended
    lines have cost more than ``max_cost_usd``, the batch is cancelled, whoever watches.
    ``options`` are the client's own notes (format, model …); the server hands them back and reads nothing in them.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    user: Name = "default"
    name: Name | None = None
    expires_s: float | None = Field(default=None, gt=0)
    retention_s: float | None = Field(default=None, gt=0)
    max_cost_usd: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    chunk_lines: int = Field(default=CHUNK_LINES, ge=1, le=CHUNK_LINES)
    retry_of: str | None = None
    """The batch whose failed lines these are."""
    options: dict[str, JsonValue] = Field(default_factory=dict[str, JsonValue])


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One line as it is uploaded.

    ``id`` is the caller's own, unique in the batch. ``request`` holds the fields of a JobRequest that was checked
    already, as its ``to_json`` writes them. ``same`` is the index of an earlier line with an equal request whose answer
    this line shall have, too; such a line runs no job.
    """

    id: str
    request: dict[str, Any]
    same: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a chunk."""
        data: dict[str, Any] = {"id": self.id, "request": self.request}
        if self.same is not None:
            data["same"] = self.same
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> BatchLine:
        """The reverse of :meth:`to_dict`."""
        return cls(data["id"], data["request"], data.get("same"))


class BatchStatus(BaseModel):
    """A batch as it stands now. ``total`` is None until all is uploaded.

    ``uploaded_chunks`` is where an interrupted upload goes on. ``fed`` counts the lines that were given to the queue.
    ``succeeded`` … ``expired`` count lines that ended, equal lines (``same``) too; ``usage`` and ``cost_usd`` count
    each job once. ``failures`` counts lines that did not succeed by error code, ``models`` ended lines by the model
    that answered.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: str
    state: BatchState
    user: str
    name: str | None = None
    total: int | None = None
    chunk_lines: int = CHUNK_LINES
    uploaded_chunks: int = 0
    uploaded_lines: int = 0
    fed: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    expired: int = 0
    usage: Usage = Usage()
    cost_usd: float = 0.0
    unpriced: int = 0
    """How many ended lines have no known cost, beside ``cost_usd``."""
    failures: dict[str, int] = Field(default_factory=dict[str, int])
    models: dict[str, int] = Field(default_factory=dict[str, int])
    retry_of: str | None = None
    created_at: datetime
    ended_at: datetime | None = None
    expires_at: datetime | None = None
    options: dict[str, JsonValue] = Field(default_factory=dict[str, JsonValue])

    @property
    def done(self) -> int:
        """How many lines have ended, whichever way."""
        return self.succeeded + self.failed + self.cancelled + self.expired

    @property
    def ended(self) -> bool:
        """True once nothing more will happen to the batch."""
        return self.state in BATCH_END_STATES


@dataclass(frozen=True, slots=True)
class BatchResult:
    """How one line ended.

    ``id`` is the caller's own; ``job`` is None where the job's record is gone (counted as failed, ``not_found``).
    ``same`` is the index of the line whose job this is, where an equal earlier line ran in its place.

    Lines that were never fed, because the batch was cancelled or expired, have no result: they are counted only.
    """

    index: int
    id: str
    job: Job | None
    same: int | None = None
