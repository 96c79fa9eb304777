"""A job's way through the models that may answer: attempts, repetitions, fallbacks, and hand-ons to other workers.

Every attempt leaves an entry in ``tries``, whatever its end. What readers see between attempts: ``progress`` with the
phase ``retrying`` or ``fallback``, and a ``restart`` before it where a token had gone out, because the text so far is
then void.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from promptmill.contract import JobRequest, Progress, Restart
from promptmill.errors import BackendError
from promptmill.failures import classify
from promptmill.queues import queue_for
from promptmill.routing import Decision, Route
from promptmill.settings import Settings
from promptmill.store import Claimed
from promptmill_workers.attempt import Progressing, estimated_usage, stream
from promptmill_workers.backends.base import Call
from promptmill_workers.joblog import JobLog
from promptmill_workers.models import Backends
from promptmill_workers.pauses import Pauses
from promptmill_workers.writer import Writer

logger = logging.getLogger(__name__)

_RETRY_BASE_S: Final = 0.5
_RETRY_MAX_S: Final = 30.0
_PATIENCE_S: Final = 5.0
"""A model with a backup behind it is not waited for longer than this."""
_TRIES_BEFORE_BACKUP: Final = 2
MESSAGE_MAX_CHARS: Final = 2_000


@dataclass(slots=True)
class Ended:
    """How the course ended: with an answer (``error`` is None) or with the last attempt's error."""

    error: BackendError | None
    into: Progressing
    route: Route


class HandedOn:
    """The job was given to other workers; nothing is left to do here."""


HandOn = Callable[[str, str, str, list[dict[str, Any]] | None, list[str]], Awaitable[None]]
"""``(queue, reason, phase, tries, chain)``; see :meth:`promptmill.store.Store.requeue`."""


@dataclass(slots=True, kw_only=True)
class Course:
    """One claim's course through the models that may answer."""

    job_id: str
    log: JobLog
    request: JobRequest
    claimed: Claimed
    family: str
    settings: Settings
    backends: Backends
    pauses: Pauses
    writer: Writer
    hand_on: HandOn
    tries: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    number: int = 0

    async def run(self, decision: Decision) -> Ended | HandedOn:
        """Ask the models in their order until one answers, or none is left that may."""
        st = self.claimed.record.st
        routes = left_of(decision, st.get("chain"))
        if decision.note and "chain" not in st:
            self._tell(Progress(phase="routing", message=decision.note))
        asked = False
        for position, route in enumerate(routes):
            if self._belongs_elsewhere(route, handed_on="chain" in st and not asked):
                await self._hand_on(routes[position:], asked)
                return HandedOn()
            if asked:
                self.number += 1
            asked = True
            more = decision.automatic and position + 1 < len(routes)
            ended = await self._ask(route, more=more)
            if ended.error is None or not more or not classify(ended.error.code).fall_back:
                return ended
            self._fall_back(ended, routes[position + 1])
        raise AssertionError("a decision has at least one route")

    def _belongs_elsewhere(self, route: Route, *, handed_on: bool) -> bool:
        # What was handed on is run where it arrives: workers whose configurations differ must not pass it to and fro.
        return route.config.worker_family != self.family and not handed_on

    async def _hand_on(self, routes: list[Route], asked: bool) -> None:
        """Give the rest of the chain to the workers of its first model's family."""
        family = routes[0].config.worker_family
        queue = queue_for(self.claimed.record.head["priority"], family)
        reason = f"handed to the {family} workers"
        await self.hand_on(queue, reason, "requeued", self.tries if asked else None, [r.name for r in routes])

    async def _ask(self, route: Route, *, more: bool) -> Ended:
        """Attempts of one model, until it answers or is not to be asked again."""
        limit = min(_TRIES_BEFORE_BACKUP, self.settings.max_attempts) if more else self.settings.max_attempts
        tried = 0
        while True:
            into, started = Progressing(), datetime.now(UTC)
            error = await self._attempt(route, into)
            tried += 1
            if into.usage is None and into.parts:
                into.usage = estimated_usage(self.request, into.text)
            self.tries.append(describe(self.number, route, started, into, error))
            if error is None or into.parts or tried >= limit or not classify(error.code).retry:
                return Ended(error, into, route)
            wait_s = backoff_s(error, tried)
            if more and wait_s > _PATIENCE_S:
                return Ended(error, into, route)
            self.number += 1
            self._tell(Progress(phase="retrying", message=said(error), attempt=self.number, model=route.name))
            await asyncio.sleep(wait_s)

    async def _attempt(self, route: Route, into: Progressing) -> BackendError | None:
        """One attempt; answers why it failed, or None."""
        try:
            backend = self.backends.get(route)
            self.pauses.check(route, backend)
            timeouts = self.settings.timeouts_for(route.config, self.request.timeouts)
            call = Call(self.job_id, self.number, self.request, timeouts)
            try:
                await stream(backend, call, self.log, self.writer, into)
            except BackendError as err:
                if err.code == "auth_expired":
                    self.pauses.expired(route, backend, err)
                raise
        except BackendError as err:
            return err
        except Exception as err:
            # A backend's own bug must end its job, not leave it hanging until its time to live.
            logger.exception("backend of model %r crashed", route.name)
            return BackendError(f"the backend crashed: {type(err).__name__}", code="crashed")
        return None

    def _fall_back(self, ended: Ended, to: Route) -> None:
        error = ended.error
        if error is None:
            return
        if ended.into.parts:
            reason = f"{ended.route.name} failed ({error.code}); {to.name} answers from the beginning"
            self._tell(Restart(reason=reason, attempt=self.number + 1))
        message = f"{ended.route.name}: {said(error)}"
        self._tell(Progress(phase="fallback", message=message, model=to.name, backend=to.config.type))

    def _tell(self, event: Progress | Restart) -> None:
        self.log.add_event(event.to_json())
        self.writer.mark(self.log)


def left_of(decision: Decision, chain: list[str] | None) -> list[Route]:
    """The routes that are still to be asked: all, or those that a hand-on left."""
    if chain is None:
        return list(decision.routes)
    left = [route for route in decision.routes if route.name in chain]
    # The registry changed meanwhile, and none of them is left: what it says now counts.
    return left or list(decision.routes)


def said(error: BackendError) -> str:
    """An error for readers' progress, bounded."""
    return f"{error.code}: {error.message}"[:MESSAGE_MAX_CHARS]


def backoff_s(error: BackendError, tried: int) -> float:
    """Full jitter, so that jobs that failed together do not come back together; no less than the provider asked for."""
    wait_s = random.uniform(0, min(_RETRY_BASE_S * 2 ** (tried - 1), _RETRY_MAX_S))  # noqa: S311 - no secret
    if error.retry_after_s is not None:
        wait_s = min(max(wait_s, error.retry_after_s), _RETRY_MAX_S)
    return wait_s


def describe(
    number: int, route: Route, started: datetime, into: Progressing, error: BackendError | None
) -> dict[str, Any]:
    """What :class:`~promptmill.contract.Attempt` reads; built by hand because this runs for every job."""
    request_id = error.provider_request_id if error else into.finished and into.finished.provider_request_id
    fields = {
        "attempt": number,
        "model": route.name,
        "backend": route.config.type,
        "slot": route.slot,
        "outcome": error.code if error else "succeeded",
        "message": error.message[:MESSAGE_MAX_CHARS] if error else None,
        "started_at": started.isoformat(),
        "finished_at": datetime.now(UTC).isoformat(),
        "usage": into.usage.model_dump() if into.usage else None,
        "cost_usd": into.cost_usd,
        "provider_request_id": request_id,
    }
    return {name: value for name, value in fields.items() if value is not None}
