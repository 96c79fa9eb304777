"""The backends of this process, one per model of the registry, made when first needed."""

from __future__ import annotations

from promptmill.errors import BackendError, ConfigError, MissingExtra
from promptmill.routing import Route
from promptmill_workers.backends import load_backend
from promptmill_workers.backends.base import Backend


class Backends:
    """Use from one event loop."""

    def __init__(self) -> None:
        self._made: dict[str, Backend] = {}

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
                backend = load_backend(route.name, route.config)
            except (ConfigError, MissingExtra) as err:
                raise BackendError(f"model {route.name!r}: {err}", code="bad_request") from err
            self._made[route.name] = backend
        return backend

    async def aclose(self) -> None:
        """Close all of them."""
        made, self._made = self._made, {}
        for backend in made.values():
            await backend.aclose()
