"""Names that producers and workers must agree on."""

from __future__ import annotations

from typing import Final

from promptmill.contract import Priority

TASK_NAME: Final = "promptmill.complete"

QUEUES: Final = ("promptmill.api", "promptmill.api.batch")
"""The queues of the API family, first served first."""


def queue_for(priority: Priority) -> str:
    """The queue that a job's message goes to."""
    return QUEUES[0] if priority == "interactive" else QUEUES[1]
