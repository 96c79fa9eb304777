"""The backends of this process, one per model of the registry.

A model whose configuration changes while calls of it run gets a new backend; the old one serves those calls to their
end and is closed behind the last.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager

from promptmill.errors import BackendError, ConfigError, MissingExtra
from promptmill.routing import Route
from promptmill.settings import ModelConfig
from promptmill_workers.backends.base import Backend
from promptmill_workers.isolated import make_backend

logger = logging.getLogger(__name__)


class _Made:
    __slots__ = ("backend", "calls", "config", "name")

    def __init__(self, name: str, config: ModelConfig, backend: Backend) -> None:
        self.name = name
        self.config = config
        self.backend = backend
        self.calls = 0


class Backends:
    """Use from one event loop."""

    def __init__(self) -> None:
        self._made: dict[str, list[_Made]] = {}
        self._current: Mapping[str, ModelConfig] | None = None
        self._closing: set[asyncio.Task[None]] = set()

    async def use(self, models: Mapping[str, ModelConfig], family: str) -> None:
        """From now on these are the models: make those that this family of workers runs, close what is no more.

        Making takes seconds where a provider's SDK is imported, so it happens in a thread. One that cannot be made is
        only logged: the other models work, and its jobs say why theirs does not.
        """
        self._current = models
        for made in [made for several in self._made.values() for made in several]:
            self._retire(made)
        for name, config in models.items():
            if config.worker_family == family and self._find(name, config) is None:
                try:
                    backend = await asyncio.to_thread(_make, name, config)
                except BackendError as err:
                    logger.error("%s", err)  # noqa: TRY400 - the message says all, the trace nothing
                    continue
                # A job may have made it meanwhile, or the configuration may have changed again.
                spare = _Made(name, config, backend)
                if self._find(name, config) is None:
                    self._made.setdefault(name, []).append(spare)
                    self._retire(spare)
                else:
                    self._close(spare)

    @contextmanager
    def lend(self, route: Route) -> Generator[Backend]:
        """The backend of a route; it is not closed while the block lasts.

        Raises
        ------
        BackendError
            ``bad_request``: its configuration cannot work or a package is missing; the message says which.
            ``crashed``: a third party's factory failed.
        """
        made = self._find(route.name, route.config)
        if made is None:
            made = _Made(route.name, route.config, _make(route.name, route.config))
            self._made.setdefault(route.name, []).append(made)
        made.calls += 1
        try:
            yield made.backend
        finally:
            made.calls -= 1
            self._retire(made)

    def _find(self, name: str, config: ModelConfig) -> _Made | None:
        for made in self._made.get(name, ()):
            if made.config is config or made.config == config:
                return made
        return None

    def _retire(self, made: _Made) -> None:
        """Close it where no call uses it and its configuration is not the one that holds."""
        if made.calls or self._current is None or self._current.get(made.name) == made.config:
            return
        several = self._made.get(made.name, [])
        if made in several:
            several.remove(made)
            if not several:
                del self._made[made.name]
            self._close(made)

    def _close(self, made: _Made) -> None:
        task = asyncio.ensure_future(_aclose(made))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def aclose(self) -> None:
        """Close all of them."""
        several, self._made = self._made, {}
        for made in (made for made_of_one in several.values() for made in made_of_one):
            await made.backend.aclose()
        await asyncio.gather(*self._closing)


def _make(name: str, config: ModelConfig) -> Backend:
    try:
        return make_backend(name, config)
    except (ConfigError, MissingExtra) as err:
        raise BackendError(f"model {name!r}: {err}", code="bad_request") from err
    except Exception as err:
        # A third party's bug must end its own model's jobs, and not the worker with everybody's.
        logger.exception("the backend of model %s cannot be made", name)
        what = f"model {name!r}: its backend cannot be made: {type(err).__name__}"
        raise BackendError(what, code="crashed") from err


async def _aclose(made: _Made) -> None:
    try:
        await made.backend.aclose()
    except Exception:
        # A third party's; nothing depends on its end, and the new backend works.
        logger.exception("the former backend of model %s did not close", made.name)
    else:
        logger.info("the former backend of model %s is closed", made.name)
