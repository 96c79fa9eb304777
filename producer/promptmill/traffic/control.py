"""The gate before each call of a model."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
import weakref
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

from promptmill import keys
from promptmill.rates import RateInfo
from promptmill.routing import Route
from promptmill.settings import ModelLimits
from promptmill.store import Store
from promptmill.store.link import Command
from promptmill.traffic.fleet import TROUBLED_TTL_S, Fleet
from promptmill.traffic.health import Cooldown
from promptmill.traffic.rules import Admission, Reason, Rules, Verdict, host_subject, model_subject, verdicts
from promptmill.traffic.scripts import ADMIT, PROBE, RENEW, REPORT
from promptmill.traffic.waits import SLOT_WAIT_S, Line, Paces
from promptmill.traffic.wire import TTL_MS, Asker, Call

MINUTE_S: Final = 60.0
_US: Final = 1_000_000
_WAIT_MAX_S: Final = 60.0
"""After this one asks again: limits change meanwhile."""
_Held = tuple[float, Reason]
_MINE, _WELL = 1, 2
_NO_LIMITS: Final = ModelLimits()

_REPORT_PARTS: Final = ("health", "probe", "paces", "running", "held", "line", "turns")
_ADMIT_PARTS: Final = ("health", "paces", "running", "held", "line", "due", "needs", "turns")
_RENEW_PARTS: Final = ("health", "probe", "running", "held")


def _names(subject: str, parts: Iterable[str]) -> list[str]:
    return [keys.traffic(subject, part) for part in parts]


class Traffic:
    """Admits calls and learns from their ends; one a worker process, used from its event loop.

    Without :meth:`run` it neither hears of other workers nor keeps leases alive. Where Redis is away every call is
    granted, with a warning: a job is not held up because its limits cannot be seen. ``window_s`` is what counts as a
    minute.
    """

    def __init__(self, store: Store, worker_id: str, *, rules: Rules | None = None, window_s: float = MINUTE_S) -> None:
        self._worker_id = worker_id
        self._asker = Asker(store)
        self._rules = rules or Rules()
        self._rules_json = self._rules.to_json()
        self._window_s = window_s
        self._fleet = Fleet(store, self._asker, self._rules.refresh_s)
        self._book = self._fleet.book
        self._count = 0
        # Weak: what a caller forgets to report gives its place back when its lease runs out.
        self._running: dict[str, weakref.WeakValueDictionary[str, Admission]] = {}
        self._lines: dict[str, dict[str, Line]] = {}
        self._paces: dict[str, tuple[ModelLimits, Paces]] = {}

    # -- before a call ------------------------------------------------------------------------------------------

    async def admit(self, route: Route, user: str, *, tokens: int, probe_ok: bool = True) -> Admission:
        """May a call of ``route`` be made now? Hand a granted admission to :meth:`report` once the call ended.

        ``tokens`` estimates prompt and answer together. With ``probe_ok`` the call may be the one that finds out
        whether a model is well again; it is then likely to fail. Asks Redis only where the model has limits or is
        recovering; raises nothing.
        """
        now = time.monotonic()
        model, host = model_subject(route.name), host_subject(route.config)
        limits = route.config.limits
        admission = Admission(True, 0.0, None, model, host, "", tokens, limits)
        troubled = [s for s in (host, model) if s in self._book.entries] if self._book.entries else []
        for subject in troubled:
            refusal = self._book.entries[subject].refusal(now)
            if refusal is not None:
                return _refused(admission, *refusal)
        for subject in troubled:
            wait_s = await self._probe(subject, admission, probe_ok=probe_ok, now=now)
            if wait_s is not None:
                return await self._give_back(admission, wait_s, "cooldown")
        if limits != _NO_LIMITS or self._fleet.capped(model, now):
            await self._within_limits(admission, user)
        if admission.granted:
            self._count += 1
            admission.lease = admission.lease or f"{self._worker_id}/{self._count} {_digest(user)}"
            self._running.setdefault(model, weakref.WeakValueDictionary())[admission.lease] = admission
        return admission

    async def _probe(self, subject: str, admission: Admission, *, probe_ok: bool, now: float) -> float | None:
        """Where the breaker waits for a probe: be it, or answer how long to wait. None: go on."""
        entry = self._book.entries.get(subject)
        if entry is None or not entry.open:
            return None
        if not probe_ok or entry.probe_after > now:
            return random.uniform(0.25, 0.75)  # noqa: S311 - spreads callers, no secret
        self._book.probed(subject, now)
        token = keys.new_token()
        call = (PROBE, _names(subject, ("health", "probe")), (token, int(self._rules.lease_s * _US)))
        try:
            replies = await self._asker.scripts([call])
        except asyncio.CancelledError:
            self._asker.tell([self._report(subject, admission, "neutral", token=token)])
            raise
        if replies is None:
            return None
        answer, wait_us = replies[0]
        if answer == _MINE:
            admission.probes[subject] = token
            return None
        if answer == _WELL:
            self._fleet.reread.set()
            return None
        return wait_us / _US + random.uniform(0.25, 0.75)  # noqa: S311 - spreads callers, no secret

    async def _within_limits(self, admission: Admission, user: str) -> None:
        """Take a place among the running calls, or turn ``admission`` into a refusal."""
        digest = _digest(user)
        line = self._line(admission.model, digest)
        paces = self._paces_of(admission)
        now = time.monotonic()
        if line.closed_until > now:
            await self._give_back(admission, line.wait_s(now, paces.request_us), line.reason)
            return
        self._count += 1
        admission.user, admission.lease = digest, f"{self._worker_id}/{self._count} {digest}"
        others = line.waiting(now) > 0
        call: Call = (
            ADMIT,
            _names(admission.model, _ADMIT_PARTS),
            (
                admission.lease,
                digest,
                admission.tokens,
                paces.concurrency,
                paces.request_us,
                paces.token_us,
                paces.burst_requests_us,
                paces.burst_tokens_us,
                int(self._rules.lease_s * _US),
                TTL_MS,
                int(others),
                int(SLOT_WAIT_S * _US),
            ),
        )
        admission.leased = True
        try:
            replies = await self._asker.scripts([call])
        except asyncio.CancelledError:
            # The caller will never learn of it, but the place may be taken by now.
            admission.reported = True
            self._asker.tell([self._report(admission.model, admission, "neutral", tokens=0)])
            raise
        if replies is None:
            return
        granted, wait_us, reason = replies[0]
        if granted:
            line.closed_until = 0.0
            return
        admission.leased, admission.lease = False, ""
        now = time.monotonic()
        line.closed_until, line.reason = now + min(int(wait_us) / _US, _WAIT_MAX_S), reason.decode()
        await self._give_back(admission, line.wait_s(now, paces.request_us), line.reason)

    def _line(self, model: str, digest: str) -> Line:
        """Where the jobs of one user wait for one model."""
        lines = self._lines.setdefault(model, {})
        line = lines.get(digest)
        if line is None:
            line = lines[digest] = Line()
        return line

    def _paces_of(self, admission: Admission) -> Paces:
        known = self._paces.get(admission.model)
        if known is None or known[0] is not admission.limits:
            known = self._paces[admission.model] = (admission.limits, Paces(admission.limits, self._window_s))
        return known[1]

    async def _give_back(self, admission: Admission, wait_s: float, reason: Reason) -> Admission:
        """A refusal. A probe that was taken meanwhile is somebody else's again."""
        _refused(admission, wait_s, reason)
        probes, admission.probes = admission.probes, {}
        if probes:
            await self._asker.scripts([self._report(s, admission, "neutral", token=t) for s, t in probes.items()])
        return admission

    # -- after a call -------------------------------------------------------------------------------------------

    async def alive(self, admission: Admission) -> None:
        """The first token came: a probe has its answer, long before the call ends. Costs others nothing."""
        probes, admission.probes = admission.probes, {}
        if probes:
            await self._asker.scripts([self._report(s, admission, "ok", token=t) for s, t in probes.items()])

    async def report(
        self,
        admission: Admission,
        *,
        code: str | None,
        retry_after_s: float | None,
        tokens: int | None,
        rate: RateInfo | None,
    ) -> None:
        """How an admitted call ended: ``code`` is the error's, None for a success; ``tokens`` the real count.

        Anything but an attempt's own codes (``cancelled``, say) only gives the place back. Nothing happens for a
        refused admission or the second time. Raises nothing; what Redis does not take is lost, and leases run out.
        """
        if not admission.granted or admission.reported:
            return
        admission.reported = True
        here = self._running[admission.model]
        running = len(here)
        here.pop(admission.lease, None)
        now = time.monotonic()
        to_model, to_host = verdicts(code)
        held = self._held(code, retry_after_s, rate)
        if held is not None:
            self._book.hold(admission.model, held[0], held[1], now)
        limited = code == "rate_limited"
        calls: list[Call] = []
        if admission.leased or held is not None or limited or self._matters(admission.model, to_model, admission):
            calls.append(
                self._report(
                    admission.model,
                    admission,
                    to_model,
                    code=code,
                    held=held,
                    limited=limited,
                    running=running,
                    tokens=tokens,
                )
            )
        if self._matters(admission.host, to_host, admission):
            calls.append(self._report(admission.host, admission, to_host, code=code))
        if calls:
            in_trouble = held is not None or limited or "sick" in (to_model, to_host)
            await self._asker.scripts(calls, before=_troubled(calls) if in_trouble else ())
        if admission.leased:
            # Its place is free: the next of those who wait here may ask for it at once.
            for line in self._lines.get(admission.model, {}).values():
                if line.reason == "concurrency":
                    line.closed_until = 0.0

    def _matters(self, subject: str, verdict: Verdict, admission: Admission) -> bool:
        # A success is news only of those that failed lately: it costs nothing elsewhere.
        return verdict == "sick" or subject in admission.probes or (verdict == "ok" and subject in self._book.entries)

    def _held(
        self, code: str | None, retry_after_s: float | None, rate: RateInfo | None
    ) -> tuple[float, Reason] | None:
        """For how long the provider itself wants no more calls, and of what it has had enough."""
        waits: list[tuple[float, Reason]] = []
        if code == "rate_limited" and retry_after_s:
            waits.append((retry_after_s, "cooldown"))
        used_up = rate.used_up() if rate is not None else None
        if used_up is not None:
            waits.append((used_up[1], used_up[0]))
        if not waits:
            return None
        seconds, why = max(waits)
        return min(seconds, self._rules.hold_max_s), why

    def _report(
        self,
        subject: str,
        admission: Admission,
        verdict: Verdict,
        *,
        code: str | None = None,
        token: str | None = None,
        held: _Held | None = None,
        limited: bool = False,
        running: int = 0,
        tokens: int | None = None,
    ) -> Call:
        leased = admission.leased and admission.reported and subject == admission.model
        paces = self._paces_of(admission) if leased else None
        correction = 0.0
        if paces is not None and tokens is not None:
            correction = (tokens - admission.tokens) * paces.token_us
        args = (
            self._rules_json,
            TTL_MS,
            subject,
            verdict,
            code or "",
            admission.probes.get(subject, "") if token is None else token,
            random.uniform(0.75, 1.0),  # noqa: S311 - spreads fleets, no secret
            int(held[0] * _US) if held else 0,
            held[1] if held else "",
            admission.lease if leased else "",
            correction,
            int(limited),
            running,
            admission.limits.concurrency or 0,
        )
        return REPORT, _names(subject, _REPORT_PARTS), args

    # -- the fleet ----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Hear of other workers, and keep leases and probes alive, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._fleet.run())
            tasks.create_task(self._renew())

    async def cooldowns(self) -> list[Cooldown]:
        """What keeps calls back now, in the whole fleet, hosts first, by name. Raises StoreUnavailable."""
        return await self._fleet.cooldowns()

    async def _renew(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._rules.renew_s):
                    await self._fleet.capped_anew.wait()
            self._fleet.capped_anew.clear()
            self._forget()
            calls = self._renewals(time.monotonic())
            if calls:
                await self._asker.scripts(calls)

    def _renewals(self, now: float) -> list[Call]:
        calls: list[Call] = []
        for model, admissions in self._running.items():
            capped = self._fleet.capped(model, now)
            leases: list[str] = []
            probes: dict[str, str] = {}
            for admission in list(admissions.values()):
                # Calls from before the cap was learned take their places too.
                admission.leased = admission.leased or capped
                if admission.leased:
                    leases.append(admission.lease)
                probes.update(admission.probes)
            if leases:
                calls.append(self._renewal(model, probes.pop(model, ""), leases))
            calls += [self._renewal(subject, token, []) for subject, token in probes.items()]
        return calls

    def _renewal(self, subject: str, token: str, leases: list[str]) -> Call:
        rules = self._rules
        fixed = (int(rules.lease_s * _US), TTL_MS, int(rules.cut_every_s * _US), token)
        return RENEW, _names(subject, _RENEW_PARTS), (*fixed, *leases)

    def _forget(self) -> None:
        now = time.monotonic()
        for lines in self._lines.values():
            for user in [u for u, line in lines.items() if line.closed_until < now and not line.waiting(now)]:
                del lines[user]
        for model in [m for m, admissions in self._running.items() if not len(admissions)]:
            del self._running[model]


def _refused(admission: Admission, wait_s: float, reason: Reason) -> Admission:
    admission.granted, admission.wait_s, admission.reason = False, wait_s, reason
    return admission


@lru_cache(maxsize=4096)
def _digest(user: str) -> str:
    return keys.user_digest(user)


def _troubled(calls: Iterable[Call]) -> list[Command]:
    """Listed before it is in trouble, so that a crash between the two leaves a name too many and never one too few."""
    named = [word for _, _, args in calls for word in (time.time(), args[2])]
    return [("ZADD", keys.TROUBLED, *named), ("EXPIRE", keys.TROUBLED, TROUBLED_TTL_S)]
