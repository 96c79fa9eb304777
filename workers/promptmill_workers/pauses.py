"""Models whose login has expired: nothing is asked of them until somebody renews it.

A login is a person's to renew. Until then every call would start a program only to be refused, so the jobs of the model
fail at once as ``auth_expired``. Operators learn of it three ways: an event on their channel, the worker's heartbeat
(which ``promptmill doctor`` and the gateway's health show), and the jobs' own error.
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
"""A login that no file shows is tried again after so long."""


@runtime_checkable
class HasLogin(Protocol):
    """A backend whose login can be renewed while the worker runs."""

    def login_fingerprint(self) -> str | None:
        """Changes when the login is renewed; None where that cannot be seen."""
        ...


@dataclass(frozen=True, slots=True)
class _Pause:
    message: str
    fingerprint: str | None
    since_s: float


class Pauses:
    """The paused models of one worker process. ``publish`` sends an event to the operators and must not block."""

    def __init__(self, publish: Callable[[dict[str, Any]], None]) -> None:
        self._publish = publish
        self._paused: dict[str, _Pause] = {}

    def check(self, route: Route, backend: Backend) -> None:
        """Raise BackendError ``auth_expired`` while the model is paused; end the pause where its login was renewed."""
        pause = self._paused.get(route.name)
        if pause is None:
            return
        now = _fingerprint(backend)
        if now != pause.fingerprint or (now is None and time.monotonic() - pause.since_s > PROBE_AFTER_S):
            del self._paused[route.name]
            self._say(route, "renewed", "its login was renewed" if now else "its login is tried again")
            return
        raise BackendError(
            f"model {route.name!r} is paused until its login is renewed: {pause.message}", code="auth_expired"
        )

    def expired(self, route: Route, backend: Backend, error: BackendError) -> None:
        """A call ended as ``auth_expired``: pause the model and tell the operators, once."""
        known = route.name in self._paused
        self._paused[route.name] = _Pause(error.message, _fingerprint(backend), time.monotonic())
        if not known:
            self._say(route, "expired", error.message)

    @property
    def names(self) -> list[str]:
        """The models that are paused now."""
        return list(self._paused)

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
