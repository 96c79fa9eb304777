"""The bounds of one attempt, without a timer per token."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from promptmill.contract import Timeouts
from promptmill.errors import BackendError


class Deadlines:
    """Cancels the current task when a bound passes and raises ``timeout_first_token``, ``_idle`` or ``_total`` for it.

    ``touch`` only notes the time: the one timer that runs looks at the note when it is due and goes to sleep again.
    Works like :func:`asyncio.timeout`: a cancellation from elsewhere stays a cancellation.
    """

    __slots__ = ("_code", "_handle", "_loop", "_started", "_task", "_timeouts", "_touched")

    def __init__(self, timeouts: Timeouts) -> None:
        self._timeouts = timeouts
        self._loop = asyncio.get_running_loop()
        self._started = self._touched = 0.0
        self._code: str | None = None
        self._handle: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[object] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.current_task()
        self._started = self._loop.time()
        self._arm()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            self._handle.cancel()
        code, task = self._code, self._task
        if code is None or task is None:
            return
        # Only our own cancellation becomes an error; if somebody else cancelled too, it stays one.
        if task.uncancel() <= 0 and kind is not None and issubclass(kind, asyncio.CancelledError):
            raise self._error(code) from error

    def touch(self) -> None:
        """A token came."""
        first = not self._touched or self._touched == float("inf")
        self._touched = self._loop.time()
        if first and self._handle is not None:
            # The bound between tokens is often the shorter one; afterwards it only moves away.
            self._handle.cancel()
            self._arm()

    def hold(self) -> None:
        """It is we who do not read now: the bound between tokens does not count until the next :meth:`touch`."""
        self._touched = float("inf")

    def _due(self) -> tuple[float, str]:
        bounds = self._timeouts
        due = [(self._started + (bounds.total_s or float("inf")), "timeout_total")]
        if self._touched:
            due.append((self._touched + (bounds.idle_s or float("inf")), "timeout_idle"))
        else:
            due.append((self._started + (bounds.first_token_s or float("inf")), "timeout_first_token"))
        return min(due)

    def _arm(self) -> None:
        due, _ = self._due()
        if due != float("inf"):
            self._handle = self._loop.call_at(due, self._look)

    def _look(self) -> None:
        due, code = self._due()
        if self._loop.time() < due:
            self._arm()
        elif self._task is not None:
            self._code = code
            self._task.cancel()

    def _error(self, code: str) -> BackendError:
        bounds = self._timeouts
        message = {
            "timeout_first_token": f"no token within first_token_s = {bounds.first_token_s} s",
            "timeout_idle": f"no further token within idle_s = {bounds.idle_s} s",
            "timeout_total": f"not finished within total_s = {bounds.total_s} s",
        }[code]
        return BackendError(message, code=code)
