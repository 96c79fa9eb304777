"""Small answers of the producer library."""

from __future__ import annotations

from dataclasses import dataclass

from promptmill.contract import Job


@dataclass(frozen=True, slots=True)
class JobPage:
    """Some jobs, newest first, and where to go on; ``next_cursor`` is None at the end."""

    jobs: list[Job]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether a job can be claimed right now; ``reason`` says why not; ``workers`` counts those that can claim."""

    ok: bool
    reason: str
    workers: int
