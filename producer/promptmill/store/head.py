"""How a job's record is packed, and how it is read as a :class:`~promptmill.contract.Job`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

import orjson

from promptmill.contract import Done, Job, JobRequest, JobState, Timeouts, Token
from promptmill.contract.events import Cancelled, Error
from promptmill.store.ids import EventId
from promptmill.store.tries import Try, merge_tries

FIELDS: Final = ("head", "st", "tries", "late", "end")
"""What :func:`read_job` needs, in this order."""

_RECORD_SLACK_MS: Final = 60_000


def record_ttl_ms(timeouts: Timeouts, max_attempts: int) -> int:
    """How long an unended job may live after a state change: queue time plus attempts times the total timeout."""
    queue_s, total_s = timeouts.queue_s or 0.0, timeouts.total_s or 0.0
    return int((queue_s + max_attempts * total_s) * 1000) + _RECORD_SLACK_MS


def pack_head(
    request: JobRequest, queue: str, batch: tuple[str, int, str] | None = None, trace: str | None = None
) -> bytes:
    """The immutable small facts of a job, read without touching its request."""
    facts: dict[str, Any] = {
        "user": request.user,
        "role": request.role,
        "slot": request.slot,
        "model": request.model,
        "priority": request.priority,
        "queue": queue,
        "metadata": request.metadata,
    }
    if request.cancel_on_disconnect:
        facts["tied"] = True
    if batch is not None:
        facts["batch"] = batch
    if trace is not None:
        facts["trace"] = trace
    return orjson.dumps(facts)


def at(ms: float | None) -> datetime | None:
    """A time in ms since 1970 as UTC."""
    return None if ms is None else datetime.fromtimestamp(ms / 1000, UTC)


class Record:
    """A job's record, decoded once: ``head`` and ``st`` as dicts, the rest on demand."""

    __slots__ = ("_end", "_late", "_tries", "head", "job_id", "st")

    def __init__(self, job_id: str, fields: list[bytes | None]) -> None:
        head, st, self._tries, self._late, self._end = fields
        if head is None or st is None:
            raise ValueError("the record lacks its head or its state")
        self.job_id = job_id
        self.head: dict[str, Any] = orjson.loads(head)
        self.st: dict[str, Any] = orjson.loads(st)

    @property
    def user(self) -> str:
        """The job's owner."""
        return self.head["user"]

    @property
    def tied(self) -> bool:
        """True for a job that is to be cancelled where its readers leave (``cancel_on_disconnect``)."""
        return bool(self.head.get("tied"))

    @property
    def batch(self) -> tuple[str, int, str] | None:
        """The batch that it is a line of: its id, the line's index and the caller's name of it."""
        batch = self.head.get("batch")
        return (batch[0], batch[1], batch[2]) if batch else None

    @property
    def trace(self) -> str | None:
        """The trace that its submitter began, as W3C's ``traceparent``; see :mod:`promptmill.tracing`."""
        return self.head.get("trace")

    @property
    def queue(self) -> str:
        """Where its message goes: the queue it was submitted to, or the one that it was handed to."""
        return self.st.get("queue") or self.head["queue"]

    @property
    def state(self) -> JobState:
        """The job's state."""
        return self.st["state"]

    @property
    def ended(self) -> bool:
        """True once nothing more will happen to the job."""
        return "finished" in self.st

    @property
    def end_id(self) -> EventId | None:
        """The id of the end event, once there is one."""
        return EventId(int(self.st["epoch"]), 1) if self.ended else None

    @property
    def end(self) -> dict[str, Any]:
        """What was stored with the end; empty before."""
        return orjson.loads(self._end) if self._end else {}

    @property
    def tries(self) -> list[Try]:
        """The attempts that ended, those that a worker told of late among them; each once."""
        tries: list[Try] = orjson.loads(self._tries) if self._tries else []
        late: list[Try] = orjson.loads(self._late) if self._late else []
        return merge_tries(tries, late) if late else tries

    def seen_all(self, last: EventId) -> bool:
        """True where a reader that is at ``last`` lacks nothing but the end event."""
        before_end = self.st.get("last")
        return before_end is not None and last >= EventId.read(before_end.encode())

    def job(self) -> Job:
        """The job as everyone sees it."""
        head, st, end = self.head, self.st, self.end
        running_attempt = st["attempts"]
        return Job.model_validate(
            {
                "id": self.job_id,
                "state": st["state"],
                "user": head["user"],
                "role": head.get("role"),
                "slot": head.get("slot"),
                "model": end.get("model") or head.get("model"),
                "backend": end.get("backend"),
                "priority": head.get("priority", "interactive"),
                "attempt": end.get("attempt") or running_attempt,
                "text": end.get("text"),
                "usage": end.get("usage"),
                "cost_usd": end.get("cost_usd"),
                "finish_reason": end.get("finish_reason"),
                "cached": bool(end.get("cached")),
                "error": end.get("error"),
                "attempts": self.tries,
                "created_at": at(st["created"]),
                "started_at": at(st.get("started")),
                "finished_at": at(st.get("finished")),
                "metadata": head.get("metadata") or {},
            }
        )

    def late_events(self) -> tuple[bytes | None, bytes]:
        """What a reader gets after the log was deleted: the text as one token event (or None), and the end event."""
        end = self.end
        text = end.get("text")
        token = Token(text=text).to_json() if text else None
        if self.state == "succeeded":
            return token, Done.model_validate({**end, "type": "done", "text": text or ""}).to_json()
        if self.state == "cancelled":
            return token, Cancelled(reason=end.get("reason") or "cancelled").to_json()
        return token, Error.model_validate({**(end.get("error") or {}), "type": "error"}).to_json()
