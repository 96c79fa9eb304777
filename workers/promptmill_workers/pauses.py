"""Models whose login has expired: nothing is asked of them until somebody renews it.

A login is a person's to renew. Until then every call would start a program only to be refused, so the jobs of the model
fail at once as ``auth_expired``. Operators learn of it three ways: an event on their channel, the worker's heartbeat
(which ``promptmill doctor`` and the gateway's health show), and the jobs' own error.

The login that counts is the one that a call began with: it may be renewed while the call is under way, and what is then
refused is the old one.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Protocol, runtime_checkable

from promptmill.errors import BackendError
from promptmill.routing import Route
from promptmill_workers.backends.base import Backend

logger = logging.getLogger(__name__)

PROBE_AFTER_S: Final = 300.0
"""A login whose renewal no file shows is tried again after so long, by one job."""


@runtime_checkable
class HasLogin(Protocol):
    """A backend whose login can be renewed while the worker runs."""

    def login_fingerprint(self) -> str | None:
        """Changes when the login is renewed; None where that cannot be seen."""
        ...


@dataclass(slots=True)
class _Pause:
    message: str
    fingerprint: str | None
    tried_at_s: float


class Pauses:
    """The paused models of one worker process. ``publish`` sends an event to the operators and must not block."""

    def __init__(self, publish: Callable[[dict[str, Any]], None]) -> None:
        self._publish = publish
        self._paused: dict[str, _Pause] = {}

    def check(self, route: Route, backend: Backend) -> str | None:
        """Before a call: the fingerprint of the login that it begins with, for :meth:`expired`.

        Raises
        ------
        BackendError
            ``auth_expired``: the model is paused, its login was not renewed, and it is not this call's turn to try.
        """
        now = _fingerprint(backend)
        pause = self._paused.get(route.name)
        if pause is None:
            return now
        if now != pause.fingerprint:
            self._resume(route)
            return now
        if now is None and time.monotonic() - pause.tried_at_s > PROBE_AFTER_S:
            pause.tried_at_s = time.monotonic()  # the others wait for what becomes of this one
            return now
        message = f"model {route.name!r} is paused until its login is renewed: {pause.message}"
        raise BackendError(message, code="auth_expired")

    def expired(self, route: Route, backend: Backend, began_with: str | None, error: BackendError) -> None:
        """A call ended as ``auth_expired``: pause the model and tell the operators, once."""
        if _fingerprint(backend) != began_with:
            return  # renewed meanwhile: what was refused is no longer the login
        known = route.name in self._paused
        self._paused[route.name] = _Pause(error.message, began_with, time.monotonic())
        if not known:
            self._say(route, "expired", error.message)

    def answered(self, route: Route) -> None:
        """A call succeeded: whatever was thought of the login, it works."""
        if route.name in self._paused:
            self._resume(route)

    @property
    def names(self) -> list[str]:
        """The models that are paused now."""
        return list(self._paused)

    def _resume(self, route: Route) -> None:
        del self._paused[route.name]
        self._say(route, "renewed", "its login was renewed")

    def _say(self, route: Route, what: str, message: str) -> None:
        provider = route.config.type.partition("_")[0]
        logger.warning("model %s: login %s: %s", route.name, what, message)
        self._publish(
            {
                "event": f"{provider}_auth_{what}",
                "model": route.name,
                "backend": route.config.type,
                "host": socket.gethostname(),
                "message": message,
                "at": datetime.now(UTC).isoformat(),
            }
        )


def _fingerprint(backend: Backend) -> str | None:
    return backend.login_fingerprint() if isinstance(backend, HasLogin) else None
