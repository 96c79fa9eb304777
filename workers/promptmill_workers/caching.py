"""Answers kept for requests that ask for it (``cache``): the same request to the same model is answered from the store.

The key is made of all that the answer depends on, and of the user: nobody gets an answer that was made for another one.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final

import orjson

from promptmill import keys
from promptmill.contract import JobRequest, Usage
from promptmill.routing import Route
from promptmill.store import Store
from promptmill.store.connection import store_errors
from promptmill_workers.attempt import Progressing
from promptmill_workers.backends.base import Finished

_BESIDE: Final = frozenset(
    {
        *("model", "role", "slot", "exclude", "metadata", "priority", "timeouts"),
        *("idempotency_key", "cancel_on_disconnect", "cache"),
    }
)
"""Fields of a request that no provider sees; which model they lead to is in the key by itself."""


class AnswerCache:
    """Finds and keeps answers. ``ttl_s`` is how long one is kept."""

    def __init__(self, store: Store, ttl_s: float) -> None:
        self._store = store
        self._ttl_ms = max(1, int(ttl_s * 1000))

    async def find(self, request: JobRequest, route: Route) -> Progressing | None:
        """The answer of a model to a request, as if it had just come; it used nothing. Raises StoreUnavailable."""
        with store_errors(self._store.address):
            raw: bytes | None = await self._store.wire.call("GET", keys.cached(_digest(request, route)))
        if raw is None:
            return None
        kept: dict[str, Any] = orjson.loads(raw)
        return Progressing(
            parts=[kept["text"]],
            usage=Usage(),
            cost_usd=0.0,
            finished=Finished(reason=kept["finish_reason"]),
            cached=True,
        )

    def keep(self, request: JobRequest, route: Route, into: Progressing) -> None:
        """Keep a whole answer. A hint: one that is lost is asked for again."""
        answer = {"text": into.text, "finish_reason": into.finished.reason if into.finished else "stop"}
        key = keys.cached(_digest(request, route))
        self._store.wire.tell([("SET", key, orjson.dumps(answer), "PX", self._ttl_ms)])


def _digest(request: JobRequest, route: Route) -> str:
    config = route.config
    facts = [
        request.model_dump(mode="json", exclude_defaults=True, exclude=set(_BESIDE)) | {"user": request.user},
        [route.name, config.type, config.model_name, config.api_url, config.options],
    ]
    return hashlib.sha256(orjson.dumps(facts, option=orjson.OPT_SORT_KEYS, default=str)).hexdigest()
