"""One job to store, and the command that stores it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from promptmill import keys
from promptmill.contract import JobRequest, Progress, Timeouts
from promptmill.store import scripts
from promptmill.store.head import pack_head, record_ttl_ms
from promptmill.store.link import Command


@dataclass(frozen=True, slots=True)
class Submission:
    """One job to store: its id, its request, and how long things may take (all bounds set)."""

    job_id: str
    request: JobRequest
    queue: str
    timeouts: Timeouts
    max_attempts: int
    retention: timedelta
    note: str | None = None
    """Told to its readers with the ``queued`` event."""
    batch: tuple[str, int, str] | None = None
    """The batch that it is a line of: id, index and the caller's name of the line."""
    trace: str | None = None
    """Its submitter's span, as a ``traceparent``."""

    @property
    def life_ms(self) -> int:
        return record_ttl_ms(self.timeouts, self.max_attempts)

    @property
    def retention_ms(self) -> int:
        return int(self.retention.total_seconds() * 1000)

    def command(self) -> Command:
        """The call of the submit script, by its digest."""
        return (
            "EVALSHA",
            scripts.SUBMIT.sha,
            2,
            keys.record(self.job_id),
            keys.log(self.job_id),
            keys.new_token(),
            pack_head(self.request, self.queue, self.batch, self.trace),
            self.request.to_json(),
            _QUEUED if self.note is None else Progress(phase="queued", message=self.note).to_json(),
            self.life_ms,
            self.retention_ms,
            int((self.timeouts.queue_s or 0) * 1000),
        )


_QUEUED = Progress(phase="queued").to_json()
