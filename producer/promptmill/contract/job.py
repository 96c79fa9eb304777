"""A job as it is stored and shown."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

JobState = Literal["queued", "running", "waiting", "succeeded", "failed", "cancelled", "expired"]
"""``queued -> running -> succeeded | failed | cancelled | expired``. ``waiting`` is reserved for a human's answer."""

TOKENS_MAX: Final = 10**12
"""No attempt uses so many; sums of more would leave the range of the store's integers."""

END_STATES: Final[frozenset[str]] = frozenset({"succeeded", "failed", "cancelled", "expired"})


class _Stored(BaseModel):
    # A newer writer may add fields; an older reader keeps working.
    model_config = ConfigDict(extra="ignore", frozen=True)


class Usage(_Stored):
    """Tokens that the provider counted. ``estimated`` marks our own guess where it counted none.

    ``input_tokens`` never includes those read from or written to a cache, whichever way the provider reports them.
    """

    input_tokens: int = Field(default=0, ge=0, le=TOKENS_MAX)
    output_tokens: int = Field(default=0, ge=0, le=TOKENS_MAX)
    cache_read_tokens: int = Field(default=0, ge=0, le=TOKENS_MAX)
    cache_write_tokens: int = Field(default=0, ge=0, le=TOKENS_MAX)
    estimated: bool = False


class ErrorInfo(_Stored):
    """Why a job or an attempt did not succeed. ``code`` is stable: see :data:`promptmill.errors.CODES`."""

    code: str
    message: str
    retryable: bool = False
    field: str | None = None
    limit: float | None = None
    retry_after_s: float | None = None


class Attempt(_Stored):
    """One try of one model. ``outcome`` is ``succeeded`` or an error code; times are UTC."""

    attempt: int
    model: str | None = None
    backend: str | None = None
    slot: str | None = None
    outcome: str
    message: str | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    usage: Usage | None = None
    cost_usd: float | None = None
    provider_request_id: str | None = None


class Job(_Stored):
    """A job. ``model`` is the registry name that answered, ``backend`` its type; both are None until one was chosen."""

    id: str
    state: JobState
    user: str
    role: str | None = None
    slot: str | None = None
    model: str | None = None
    backend: str | None = None
    priority: Literal["interactive", "batch"] = "interactive"
    attempt: int = 0
    text: str | None = None
    usage: Usage | None = None
    cost_usd: float | None = None
    finish_reason: str | None = None
    cached: bool = False
    """The answer was kept from an earlier time; nothing was used."""
    error: ErrorInfo | None = None
    attempts: list[Attempt] = Field(default_factory=list[Attempt])
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)

    @property
    def ended(self) -> bool:
        """True once nothing more will happen to the job."""
        return self.state in END_STATES
