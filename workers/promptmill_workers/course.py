"""A job's way through the models that may answer: attempts, repetitions, fallbacks, and hand-ons to other workers.

Every attempt leaves an entry in ``tries``, whatever its end. What readers see between attempts: ``progress`` with the
phase ``retrying`` or ``fallback``, and a ``restart`` before it where a token had gone out, because the text so far is
then void.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, Protocol

from promptmill.contract import JobRequest, Progress, Restart, Timeouts
from promptmill.errors import BackendError, PromptmillError
from promptmill.failures import CLASSES, classify
from promptmill.queues import queue_for
from promptmill.routing import Decision, Route
from promptmill.settings import Settings
from promptmill.store import Claimed, Store
from promptmill.tracing import Span, span
from promptmill.traffic import Admission, Traffic
from promptmill.usage import Booker, keep_try, tell_asking
from promptmill.usage.estimates import BYTES_PER_TOKEN
from promptmill_workers.attempt import Progressing, stream
from promptmill_workers.backends.base import Call
from promptmill_workers.joblog import JobLog
from promptmill_workers.meters import note_attempt
from promptmill_workers.models import Backends
from promptmill_workers.outcomes import Outcome, backoff_s, describe, said, settle, tell_span
from promptmill_workers.patience import patiently
from promptmill_workers.pauses import Pauses
from promptmill_workers.writer import Writer

logger = logging.getLogger(__name__)

_PATIENCE_S: Final = 5.0
"""A model with a backup behind it is not waited for longer than this."""
_TRIES_BEFORE_BACKUP: Final = 2
_WAIT_HERE_S: Final = 1.0
"""A longer wait for a model's limits or health is waited in the queue: here it would hold a place that others need."""
_WAITED_HERE_S: Final = 5.0
"""Short waits add up to this; then the job makes room for those of other models."""
_AWAY_S: Final = (2.0, 10.0)
_CROWD: Final = 4
"""Those who wait for one model take no more than this part of a worker's places."""
_ANSWER_TOKENS: Final = 500
"""What an answer is taken to need before it is there, where the request sets no bound."""
_COUNTED: Final = CLASSES.keys() - {"crashed"}
"""Outcomes that count towards a model's attempts: the loss of a worker is counted apart."""


@dataclass(slots=True)
class Ended:
    """How the course ended: with an answer (``error`` is None) or with the last attempt's error."""

    error: BackendError | None
    into: Progressing
    route: Route


@dataclass(slots=True)
class Current:
    """An attempt that runs."""

    number: int
    route: Route
    started: datetime
    into: Progressing


class HandedOn:
    """The job was given to other workers, or back to the queue; nothing is left to do here."""


class HandOn(Protocol):
    """Gives a job back; see :meth:`promptmill.store.Store.requeue`."""

    def __call__(
        self,
        queue: str,
        reason: str,
        phase: str,
        *,
        tries: list[dict[str, Any]] | None,
        chain: list[str],
        wait_s: float | None = None,
    ) -> Awaitable[None]: ...


class _Deferred(Exception):
    """The model is not to be asked for so long: the job waits in the queue."""

    def __init__(self, wait_s: float, reason: str) -> None:
        super().__init__(reason)
        self.wait_s = wait_s
        self.reason = reason


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
    traffic: Traffic
    store: Store
    booker: Booker
    writer: Writer
    hand_on: HandOn
    taken: Callable[[], None]
    """Stops this course: the claim is somebody else's."""
    served: Callable[[str], Awaitable[bool]]
    """Whether a family has a worker that can claim."""
    waiting: Counter[str]
    """How many jobs of this process wait for a model's limits, by model."""
    claim: str
    tries: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    number: int = 0
    current: Current | None = None
    """The attempt that runs now."""
    told_bytes: int = 0
    """Text of the attempts before it."""

    def describe(
        self, number: int, route: Route, started: datetime, into: Progressing, error: PromptmillError | None
    ) -> dict[str, Any]:
        """An attempt, as it is stored."""
        return describe(number, route, started, into, error, self.claim)

    def interrupted(self) -> dict[str, Any] | None:
        """The attempt that ran when the claim was taken away; None where there was none."""
        now = self.current
        if now is None:
            return None
        error = PromptmillError("its claim was taken away", code="cancelled")
        return self.describe(now.number, now.route, now.started, now.into, error)

    async def run(self, decision: Decision) -> Ended | HandedOn:
        """Ask the models in their order until one answers, or none is left that may."""
        st = self.claimed.record.st
        routes = left_of(decision, st.get("chain"))
        if decision.note and "chain" not in st:
            self._tell(Progress(phase="routing", message=decision.note))
        # What was handed on is run where it arrives: workers whose configurations differ must not pass it to and fro.
        handed = bool(st.get("handed")) and routes[0].name in (st.get("chain") or ())
        before = len(self.tries)
        for position, route in enumerate(routes):
            asked = len(self.tries) > before
            more = decision.automatic and position + 1 < len(routes)
            if route.config.worker_family != self.family and not (handed and position == 0):
                if more and not await self.served(route.config.worker_family):
                    message = f"no {route.config.worker_family} worker is there for {route.name}"
                    self._tell(Progress(phase="fallback", message=message, model=routes[position + 1].name))
                    continue
                await self._hand_on(routes[position:], asked)
                return HandedOn()
            if asked:
                self.number += 1
            try:
                ended = await self._ask(route, more=more)
            except _Deferred as wait:
                await self._put_off(routes[position:], wait)
                return HandedOn()
            if ended.error is None or not more or not classify(ended.error.code).fall_back:
                return ended
            if len(self.tries) > before:
                await self._keep_last()
            self._fall_back(ended, routes[position + 1])
        raise AssertionError("a decision has at least one route")

    async def _hand_on(self, routes: list[Route], asked: bool) -> None:
        """Give the rest of the chain to the workers of its first model's family."""
        family = routes[0].config.worker_family
        queue = queue_for(self.claimed.record.head["priority"], family)
        reason = f"handed to the {family} workers"
        names = [route.name for route in routes]
        await self.hand_on(queue, reason, "requeued", tries=self.tries if asked else None, chain=names)

    async def _put_off(self, routes: list[Route], wait: _Deferred) -> None:
        """Back to the queue, for as long as its model is not to be asked."""
        queue = queue_for(self.claimed.record.head["priority"], routes[0].config.worker_family)
        tries = self.tries if len(self.tries) > len(self.claimed.tries) else None
        names = [route.name for route in routes]
        await self.hand_on(queue, wait.reason, "waiting", tries=tries, chain=names, wait_s=wait.wait_s)

    async def _ask(self, route: Route, *, more: bool) -> Ended:
        """Attempts of one model, until it answers or is not to be asked again."""
        limit = min(_TRIES_BEFORE_BACKUP, self.settings.max_attempts) if more else self.settings.max_attempts
        # What was tried before the job was put off counts too.
        earlier = [t for t in self.tries if t.get("model") == route.name and t.get("outcome") in _COUNTED]
        tried = len(earlier)
        if tried >= limit:
            last = earlier[-1]
            message = last.get("message") or "it failed before"
            return Ended(BackendError(message, code=last["outcome"]), Progressing(), route)
        while True:
            admission = await self._admitted(route, more=more)
            if isinstance(admission, BackendError):
                return Ended(admission, Progressing(), route)
            await self._begin(route, admission)
            into, started = Progressing(), datetime.now(UTC)
            self.current = Current(self.number, route, started, into)
            about = {"gen_ai.operation.name": "text_completion", "gen_ai.request.model": route.name}
            with span("promptmill.attempt", "client", {**about, "promptmill.attempt": self.number}) as attempt:
                error = await self._reported(admission, route, into, attempt)
            self.told_bytes += len(into.text.encode())
            tried += 1
            self.tries.append(self.describe(self.number, route, started, into, error))
            self.current = None
            if error is None or into.parts or tried >= limit or not (error.retryable and classify(error.code).retry):
                return Ended(error, into, route)
            await self._keep_last()
            wait_s = backoff_s(error, tried)
            if more and wait_s > _PATIENCE_S:
                return Ended(error, into, route)
            self.number += 1
            self._tell(Progress(phase="retrying", message=said(error), attempt=self.number, model=route.name))
            if wait_s > _WAIT_HERE_S:
                raise _Deferred(wait_s, f"{route.name}: {said(error)}")
            await asyncio.sleep(wait_s)

    async def _begin(self, route: Route, admission: Admission) -> None:
        """Tell the store which attempt begins, before the model is asked.

        Asked while the store is away, it could be an attempt that nobody hears of, should the worker die; and by the
        time the store is back the job may be somebody else's.
        """
        facts = {"attempt": self.number, "model": route.name, "backend": route.config.type, "slot": route.slot}
        facts["text_before"] = self.told_bytes
        try:
            if not await patiently(partial(tell_asking, self.store, self.job_id, self.claim, facts)):
                self.taken()
                await asyncio.sleep(0)  # cancelled here
        except asyncio.CancelledError:
            await self.traffic.report(admission, code="cancelled", retry_after_s=None, tokens=0, rate=None)
            raise

    async def _admitted(self, route: Route, *, more: bool) -> Admission | BackendError:
        """Leave to ask the model now. The error where another model is to be asked in its place.

        Raises
        ------
        _Deferred
            It is not to be asked for longer than is waited here.
        """
        asked = int(len(self.claimed.request) / BYTES_PER_TOKEN) + (self.request.max_tokens or _ANSWER_TOKENS)
        told, waited_s = False, 0.0
        while True:
            admission = await self.traffic.admit(route, self.request.user, tokens=asked)
            if admission.granted:
                return admission
            if more and (admission.reason == "cooldown" or admission.wait_s > _PATIENCE_S):
                message = f"model {route.name!r} is not to be asked now ({admission.reason})"
                return BackendError(message, code="overloaded", retry_after_s=admission.wait_s)
            waited_s += admission.wait_s
            crowd = self.waiting[route.name] >= max(1, self.settings.concurrency // _CROWD)
            if admission.wait_s > _WAIT_HERE_S or waited_s > _WAITED_HERE_S or crowd:
                away_s = random.uniform(*_AWAY_S)  # noqa: S311 - spreads callers, no secret
                reason = f"{route.name} is not to be asked yet: {admission.reason}"
                raise _Deferred(admission.wait_s if admission.wait_s > _WAIT_HERE_S else away_s, reason)
            if not told:
                told = True
                message = f"for {route.name}: {admission.reason}"
                self._tell(Progress(phase="waiting", message=message, model=route.name))
            self.waiting[route.name] += 1
            try:
                await asyncio.sleep(admission.wait_s)
            finally:
                self.waiting[route.name] -= 1

    async def _reported(
        self, admission: Admission, route: Route, into: Progressing, attempt: Span
    ) -> BackendError | None:
        """One attempt, whose end is told to the fleet, whatever it is."""
        code, wait_s = "cancelled", None
        try:
            error = await self._attempt(route, into, admission, attempt)
            code, wait_s = (error.code, error.retry_after_s) if error else (None, None)
        finally:
            ended_at = time.monotonic()
            try:
                settle(self.request, into, route)
            except Exception:
                # What it cost must not decide whether it counts as answered.
                logger.exception("the usage of an attempt of job %s cannot be settled", self.job_id)
            note_attempt(route, Outcome(code, ended_at - into.began_at, into.first_s, into.usage, into.cost_usd))
            tell_span(attempt, route, into, code)
            usage = into.usage
            if usage is not None:
                tokens = usage.input_tokens + usage.output_tokens + usage.cache_write_tokens
            else:
                tokens = None if code is None else 0  # a call that failed without a word used nothing
            if self._impatient(route, code):
                code = "cancelled"
            await self.traffic.report(admission, code=code, retry_after_s=wait_s, tokens=tokens, rate=into.rate)
        return error

    def _impatient(self, route: Route, code: str | None) -> bool:
        """A bound of the request's own, shorter than the model's, says nothing of the model's health."""
        if code is None or not code.startswith("timeout_"):
            return False
        field = code.removeprefix("timeout_") + "_s"
        own: float | None = getattr(self.request.timeouts, field)
        usual: float | None = getattr(self.settings.timeouts_for(route.config, Timeouts()), field)
        return own is not None and (usual is None or own < usual)

    async def _keep_last(self) -> None:
        """The claim goes on after an attempt that failed: what it used must survive this worker's death.

        Told before the next attempt begins, however long the store is away.
        """
        await patiently(partial(keep_try, self.store, self.job_id, self.tries[-1]))
        self.booker.soon(self.job_id)

    async def _attempt(
        self, route: Route, into: Progressing, admission: Admission, attempt: Span
    ) -> BackendError | None:
        """One attempt; answers why it failed, or None."""
        try:
            with self.backends.lend(route) as backend:
                login = self.pauses.check(route, backend)
                # A model that streams is well: the others need not wait for the end of a long answer.
                first = partial(self._first, into, admission, attempt)
                timeouts = self.settings.timeouts_for(route.config, self.request.timeouts)
                call = Call(self.job_id, self.number, self.request, timeouts)
                try:
                    await stream(backend, call, self.log, self.writer, into, on_first=first)
                except BackendError as err:
                    if err.code == "auth_expired":
                        self.pauses.expired(route, backend, login, err)
                    raise
                self.pauses.answered(route)
        except BackendError as err:
            return err
        except Exception as err:
            # A backend's own bug must end its job, not leave it hanging until its time to live.
            logger.exception("backend of model %r crashed", route.name)
            return BackendError(f"the backend crashed: {type(err).__name__}", code="crashed")
        return None

    async def _first(self, into: Progressing, admission: Admission, attempt: Span) -> None:
        into.first_at = time.monotonic()
        attempt.event("first token")
        if admission.probe:
            await self.traffic.alive(admission)

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
