"""The bodies of the HTTP interface that are not the contract's own."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from promptmill.contract import Job
from promptmill.contract.request import Text


class JobAnswer(Job):
    """A job, and the address of its events: relative to this server, signed, good for a limited time."""

    stream_url: str


class JobList(BaseModel):
    """Some jobs, newest first; pass ``next_cursor`` as ``cursor`` for the next ones. None: there are no more."""

    jobs: list[JobAnswer]
    next_cursor: str | None


class CancelRequest(BaseModel):
    """Why a job is stopped; shown to its readers."""

    model_config = ConfigDict(extra="forbid")

    reason: Text = Field(default="cancelled by the caller", min_length=1, max_length=1000)


class Health(BaseModel):
    """The process is alive."""

    status: Literal["ok"] = "ok"


class Ready(BaseModel):
    """Whether a job submitted now can be claimed; ``reason`` says why not, ``workers`` counts those that can claim.

    ``families`` counts them by family; ``paused`` are models that are not asked until their login is renewed.
    """

    ready: bool
    reason: str
    workers: int
    families: dict[str, int] = Field(default_factory=dict)
    paused: list[str] = Field(default_factory=list)


class Problem(BaseModel):
    """An error (RFC 9457). Branch on ``code``, never on ``detail``."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    retryable: bool
    field: str | None = None
    limit: float | None = None
    retry_after_s: float | None = None
