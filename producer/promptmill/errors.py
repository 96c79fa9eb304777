"""Every error that promptmill raises or stores, as one tree.

::

    PromptmillError                 code, message, retryable, field, limit, retry_after_s
    ├── RequestRefused              the request was not taken; nothing was stored
    │   ├── BadRequest              bad_request, unknown_model, unknown_role, too_large
    │   ├── IdempotencyConflict     idempotency_conflict
    │   ├── NotFound                not_found
    │   ├── NotAuthorised           not_authorised
    │   └── Overloaded              backlog_full, budget_exceeded
    ├── StoreUnavailable            store_unavailable: Redis cannot be reached, refuses us, or is full
    ├── BackendError                an attempt failed: timeout_*, unreachable, auth, cut, empty …
    ├── JobFailed                   a job that ended as `failed` or `expired`, raised to who waits for its result
    ├── JobCancelled                a job that ended as `cancelled`, likewise
    ├── WaitTimeout                 the caller's own waiting time ran out; the job goes on
    ├── Closed                      the producer was closed while it was used; jobs go on
    └── ConfigError                 bad_config: names file, key and reason

Branch on ``code`` (stable) and ``retryable``, never on the message. All survive pickling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class CodeSpec:
    """What a code means to programs: whether the same request may succeed later, and its HTTP status."""

    retryable: bool
    http_status: int


CODES: Final[dict[str, CodeSpec]] = {
    # refused at the door
    "bad_request": CodeSpec(False, 400),
    "unknown_model": CodeSpec(False, 400),
    "unknown_role": CodeSpec(False, 400),
    "not_found": CodeSpec(False, 404),
    "not_authorised": CodeSpec(False, 401),
    "idempotency_conflict": CodeSpec(False, 409),
    "too_large": CodeSpec(False, 413),
    "budget_exceeded": CodeSpec(False, 429),
    "backlog_full": CodeSpec(True, 429),
    "store_unavailable": CodeSpec(True, 503),
    # how an attempt or a job ends
    "expired": CodeSpec(True, 504),
    "timeout_connect": CodeSpec(True, 504),
    "timeout_first_token": CodeSpec(True, 504),
    "timeout_idle": CodeSpec(True, 504),
    "timeout_total": CodeSpec(True, 504),
    "unreachable": CodeSpec(True, 502),
    "auth": CodeSpec(False, 502),
    "auth_expired": CodeSpec(False, 502),
    "rate_limited": CodeSpec(True, 502),
    "overloaded": CodeSpec(True, 502),
    "context_too_long": CodeSpec(False, 400),
    "refused": CodeSpec(False, 422),
    "cut": CodeSpec(True, 502),
    "empty": CodeSpec(True, 502),
    "malformed": CodeSpec(True, 502),
    "crashed": CodeSpec(True, 502),
    "poisoned": CodeSpec(False, 500),
    # local to a process, never stored with a job
    "wait_timeout": CodeSpec(True, 504),
    "cancelled": CodeSpec(False, 409),
    "closed": CodeSpec(True, 503),
    "bad_config": CodeSpec(False, 500),
    "missing_extra": CodeSpec(False, 500),
    "port_in_use": CodeSpec(False, 500),
    "data_dir_in_use": CodeSpec(False, 500),
    "not_ready": CodeSpec(True, 503),
    "part_died": CodeSpec(True, 503),
    "cannot_write": CodeSpec(True, 507),
    "internal": CodeSpec(False, 500),
}


class PromptmillError(Exception):
    """Base of all.

    ``code`` is one of :data:`CODES`; ``retryable`` says whether the same request may succeed later;
    ``field`` and ``limit`` name what was out of bounds; ``retry_after_s`` is the wait that the other side asked for.
    """

    default_code = "bad_request"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        retryable: bool | None = None,
        field: str | None = None,
        limit: float | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        spec = CODES.get(self.code)
        # A code from a newer version is kept as it is; only its defaults are unknown here.
        self.retryable = retryable if retryable is not None else bool(spec and spec.retryable)
        self.field = field
        self.limit = limit
        self.retry_after_s = retry_after_s

    @property
    def http_status(self) -> int:
        """The status that the gateway answers with."""
        spec = CODES.get(self.code)
        return spec.http_status if spec else 500

    def to_dict(self) -> dict[str, Any]:
        """``code``, ``message``, ``retryable`` and, where known, ``field``, ``limit``, ``retry_after_s``."""
        data: dict[str, Any] = {"code": self.code, "message": self.message, "retryable": self.retryable}
        for name in ("field", "limit", "retry_after_s"):
            value = getattr(self, name)
            if value is not None:
                data[name] = value
        return data

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own __reduce__ would call __init__ without the keyword arguments and lose them.
        return _rebuild, (type(self), self.message, self.to_dict(), self.__dict__.copy())

    def __str__(self) -> str:
        return self.message


def _rebuild(
    cls: type[PromptmillError], message: str, fields: dict[str, Any], state: dict[str, Any]
) -> PromptmillError:
    error = cls.__new__(cls)
    Exception.__init__(error, message)
    error.__dict__.update({**fields, **state})
    return error


class RequestRefused(PromptmillError):
    """The request was not taken; nothing was stored."""


class BadRequest(RequestRefused):
    """The request itself is wrong; ``field`` says where."""


class IdempotencyConflict(RequestRefused):
    """The idempotency key was used before, by the same user, with another request."""

    default_code = "idempotency_conflict"


class NotFound(RequestRefused):
    """No such job, or not one that this user may see."""

    default_code = "not_found"


class NotAuthorised(RequestRefused):
    """No credentials, wrong ones, or ones for somebody else."""

    default_code = "not_authorised"


class Overloaded(RequestRefused):
    """The system takes no more for now (``backlog_full``) or the budget is used up (``budget_exceeded``)."""

    default_code = "backlog_full"


class StoreUnavailable(PromptmillError):
    """Redis cannot be reached, refuses our credentials, is too old, or has no room.

    Whether what was asked took effect is unknown: repeat it with the same idempotency key.
    """

    default_code = "store_unavailable"


class BackendError(PromptmillError):
    """An attempt failed. Raised by backends; ``provider_request_id`` helps the provider's support."""

    default_code = "crashed"

    def __init__(self, message: str, *, code: str, provider_request_id: str | None = None, **fields: Any) -> None:
        super().__init__(message, code=code, **fields)
        self.provider_request_id = provider_request_id


class JobFailed(PromptmillError):
    """The job ended as ``failed`` or ``expired``; carries the job's own error. ``job_id`` names it."""

    default_code = "crashed"

    def __init__(self, message: str, *, job_id: str, code: str | None = None, **fields: Any) -> None:
        super().__init__(message, code=code, **fields)
        self.job_id = job_id


class JobCancelled(PromptmillError):
    """The job ended as ``cancelled``. ``job_id`` names it."""

    default_code = "cancelled"

    def __init__(self, message: str, *, job_id: str) -> None:
        super().__init__(message)
        self.job_id = job_id


class WaitTimeout(PromptmillError, TimeoutError):
    """The caller's own waiting time ran out. The job goes on."""

    default_code = "wait_timeout"


class Closed(PromptmillError):
    """The producer was closed, before or while it was used. Jobs go on."""

    default_code = "closed"


class ConfigError(PromptmillError):
    """The configuration is wrong; the message names file, key and reason."""

    default_code = "bad_config"


class MissingExtra(PromptmillError):
    """An optional part is not installed; the message says what to install."""

    default_code = "missing_extra"
