"""What a producer knows of who will answer: enough to refuse what nothing can, and to choose queue and lifetime."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from promptmill.contract import JobRequest, Timeouts
from promptmill.errors import BadRequest, StoreUnavailable
from promptmill.live import LiveRegistry
from promptmill.queues import API_FAMILY
from promptmill.routing import Route, decide
from promptmill.settings import DEFAULT_TIMEOUTS, Settings
from promptmill.store import Store


class Routes:
    """The decision stays the worker's: what is told here is checked and chosen by what is known now."""

    def __init__(self, settings: Settings) -> None:
        self.live = LiveRegistry(settings)
        self._settings = settings

    async def check(self, requests: Sequence[JobRequest], store: Callable[[], Awaitable[Store]]) -> None:
        """Refuse what nothing can answer, by the newest of the registry; without a store by what is known here.

        Raises BadRequest, else StoreUnavailable where there is no store.
        """
        unreachable: StoreUnavailable | None = None
        try:
            await self.live.refresh_if_stale(await store())
        except StoreUnavailable as err:
            unreachable = err
        try:
            self._check(requests)
        except BadRequest:
            if unreachable is not None:
                raise
            # Added a moment ago, perhaps: nothing is refused by a snapshot that is not the newest.
            await self.live.refresh(await store())
            self._check(requests)
        if unreachable is not None:
            raise unreachable

    def _check(self, requests: Sequence[JobRequest]) -> None:
        for request in requests:
            if self._knows(request):
                decide(self.live.registry, request)

    def timeouts(self, request: JobRequest) -> Timeouts:
        """What bounds the job's life in the store: its model's own timeouts too, where the model is known here."""
        first = self._first(request)
        if first is not None:
            return self._settings.timeouts_for(first.config, request.timeouts)
        return request.timeouts.over(self._settings.timeouts.over(DEFAULT_TIMEOUTS))

    def family(self, request: JobRequest) -> str:
        """Whose queue it goes to. Where the model is not known here the API workers hand it to the right ones."""
        first = self._first(request)
        return first.config.worker_family if first is not None else API_FAMILY

    def _first(self, request: JobRequest) -> Route | None:
        if not self._knows(request):
            return None
        try:
            return decide(self.live.registry, request).first
        except BadRequest:
            # Taken away since it was checked. Of many that are submitted together some may be stored: the workers say.
            return None

    def _knows(self, request: JobRequest) -> bool:
        """Whether it can be told here what answers.

        Without models in the configuration only ``echo`` and what operators added live is known here: workers may have
        more, so what is not known is no error.
        """
        registry = self.live.registry
        if self._settings.models:
            return request.model not in self.live.entries.unreadable
        if request.model is not None:
            return request.model in registry.models
        if request.exclude:
            return False
        slots = registry.slots(request.role, request.user) if request.role is not None else {}
        return slots is not None and all(model in registry.models for model in slots.values())
