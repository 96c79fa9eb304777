"""What is stored with a job's end, and the event that tells readers of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from promptmill.contract import Done, Error, ErrorInfo
from promptmill.errors import PromptmillError
from promptmill.routing import Route
from promptmill_workers.attempt import Progressing
from promptmill_workers.course import Course, Ended
from promptmill_workers.outcomes import MESSAGE_MAX_CHARS


@dataclass(frozen=True, slots=True)
class End:
    """``event`` is the end event, ``fields`` what the record keeps, ``code`` the error's where there is one."""

    state: str
    event: bytes
    fields: dict[str, Any]
    code: str | None = None


def success(ended: Ended, course: Course) -> End:
    """The end of a job whose last attempt answered."""
    into, route = ended.into, ended.route
    done = Done(
        text=into.text,
        usage=into.usage,
        cost_usd=into.cost_usd,
        backend=route.config.type,
        model=route.name,
        finish_reason=into.finished.reason if into.finished else None,
        attempt=course.number,
        cached=into.cached or None,
    )
    return End("succeeded", done.to_json(), done.model_dump(mode="json", exclude={"type"}, exclude_none=True))


def failure(error: PromptmillError, into: Progressing, route: Route | None, course: Course | None) -> End:
    """The end of a job that failed. ``route`` and ``course`` are None where it did not come to them."""
    info = ErrorInfo.model_validate({**error.to_dict(), "message": error.message[:MESSAGE_MAX_CHARS]})
    event = Error(code=info.code, message=info.message, retryable=info.retryable)
    fields: dict[str, Any] = {
        "error": info.model_dump(exclude_none=True),
        # What readers saw stays readable: tokens joined equal the stored text for failures too.
        "text": into.text or None,
        "usage": into.usage.model_dump() if into.usage else None,
        "cost_usd": into.cost_usd,
    }
    if course is not None:
        fields["attempt"] = course.number
    if route is not None:
        fields |= {"model": route.name, "backend": route.config.type}
    return End("failed", event.to_json(), fields, info.code)
