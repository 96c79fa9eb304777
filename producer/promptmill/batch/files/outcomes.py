"""How one line ended, as it is written into results or failures."""

from __future__ import annotations

from typing import Any

import orjson

from promptmill.batch.files.checking import BadLine
from promptmill.batch.files.format import Format
from promptmill.batch.files.records import Record
from promptmill.batch.models import BatchResult
from promptmill.contract import ErrorInfo, Job, Usage


def error_of(result: BatchResult) -> ErrorInfo | None:
    """Why a line has no answer; None where it has one."""
    job = result.job
    if job is None:
        return ErrorInfo(code="not_found", message="the job of this line is no longer stored")
    if job.state == "succeeded":
        return None
    if job.error is not None:
        return job.error
    return _by_state(job.state)


def _by_state(state: str) -> ErrorInfo:
    if state == "cancelled":
        return ErrorInfo(code="cancelled", message="the line was cancelled", retryable=True)
    if state == "expired":
        return ErrorInfo(code="expired", message="the line was not run in time", retryable=True)
    return ErrorInfo(code="not_found", message="no result is stored for this line", retryable=True)


def error_without_result(batch_state: str) -> ErrorInfo:
    """Why a line of a batch that is over has no result at all."""
    return _by_state(batch_state)


def answer_of(form: Format, result: BatchResult, job: Job) -> dict[str, Any]:
    """What is written for a line whose ``job`` succeeded. What an equal line had is told as free of charge."""
    if result.same is not None:
        return form.answer(result.id, job, Usage(), 0.0 if job.cost_usd is not None else None)
    return form.answer(result.id, job, job.usage or Usage(), job.cost_usd)


def failure_of(
    line_id: str | None, error: ErrorInfo, job: Job | None, record: Record | None, *, is_json: bool
) -> dict[str, Any]:
    """What is written for a line without an answer; ``record`` is the line as it stands in the input."""
    failure: dict[str, Any] = {
        "id": line_id,
        "line": record.number if record else None,
        "code": error.code,
        "message": error.message,
        "retryable": error.retryable,
        "job_id": job.id if job else None,
        "attempts": len(job.attempts) if job else 0,
    }
    if record is not None:
        failure["input"] = _as_json(record.raw) if is_json else record.raw.decode(errors="replace")
    return failure


def failure_of_bad_line(bad: BadLine, raw: bytes) -> dict[str, Any]:
    """What is written for a line that was left out because it is wrong."""
    error = ErrorInfo(code=bad.code, message=bad.message)
    record = Record(bad.number, bad.offset, bad.size, raw)
    return failure_of(None, error, None, record, is_json=False)


def _as_json(raw: bytes) -> object:
    try:
        orjson.loads(raw)
    except orjson.JSONDecodeError:
        # An escaped lone surrogate, which our reader lets pass and others do not: then as text.
        return raw.decode(errors="replace")
    return orjson.Fragment(raw)
