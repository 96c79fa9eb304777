"""Small answers of the producer library."""

from __future__ import annotations

from dataclasses import dataclass, field

from promptmill.contract import Job


@dataclass(frozen=True, slots=True)
class JobPage:
    """Some jobs, newest first, and where to go on; ``next_cursor`` is None at the end."""

    jobs: list[Job]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether a job can be claimed right now; ``reason`` says why not; ``workers`` counts those that can claim.

    ``families`` counts them by family. ``paused`` are the models that some worker does not ask until their login is
    renewed. ``levels``: how the workers of a family keep programs together, for those that run any.
    """

    ok: bool
    reason: str
    workers: int
    families: dict[str, int] = field(default_factory=dict[str, int])
    paused: list[str] = field(default_factory=list[str])
    levels: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
