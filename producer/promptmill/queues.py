"""Names that producers and workers must agree on."""

from __future__ import annotations

from typing import Final

from promptmill.contract import Priority

TASK_NAME: Final = "promptmill.complete"

API_FAMILY: Final = "api"
"""Backends that only wait for a server; thousands share a worker process."""


def queues_of(family: str) -> tuple[str, str]:
    """The queues of a family, first served first."""
    return f"promptmill.{family}", f"promptmill.{family}.batch"


def queue_for(priority: Priority, family: str) -> str:
    """The queue that a job's message goes to."""
    interactive, batch = queues_of(family)
    return interactive if priority == "interactive" else batch
