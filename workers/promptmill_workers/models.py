"""The backends of this process, one per model of the registry."""

from __future__ import annotations

import logging

from promptmill.errors import BackendError, ConfigError, MissingExtra
from promptmill.routing import Route
from promptmill.settings import Settings
from promptmill_workers.backends.base import Backend
from promptmill_workers.isolated import make_backend

logger = logging.getLogger(__name__)


class Backends:
    """Use from one event loop, but for :meth:`load`."""

    def __init__(self) -> None:
        self._made: dict[str, Backend] = {}

    def load(self, settings: Settings, family: str) -> None:
        """Make those that this family of workers runs.

        Blocks for seconds where a provider's SDK is imported: call it from a thread.
        One that cannot be made is only logged: the other models work, and its jobs say why theirs does not.
        """
        for name, config in settings.registry.items():
            if config.worker_family != family:
                continue
            try:
                self.get(Route(name, config))
            except BackendError as err:
                logger.error("%s", err)  # noqa: TRY400 - the message says all, the trace nothing

    def get(self, route: Route) -> Backend:
        """The backend of a route.

        Raises
        ------
        BackendError
            ``bad_request``: its configuration cannot work or a package is missing; the message says which.
        """
        backend = self._made.get(route.name)
        if backend is None:
            try:
                backend = make_backend(route.name, route.config)
            except (ConfigError, MissingExtra) as err:
                raise BackendError(f"model {route.name!r}: {err}", code="bad_request") from err
            self._made[route.name] = backend
        return backend

    async def aclose(self) -> None:
        """Close all of them."""
        made, self._made = self._made, {}
        for backend in made.values():
            await backend.aclose()
