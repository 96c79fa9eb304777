"""Budgets: what a user may use in one UTC day.

What counts is what was booked, so attempts that run at the moment do not: a user can go past a limit by what they have
running when they reach it.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Final, Literal

import orjson

from promptmill import keys
from promptmill.backlog import unknown
from promptmill.contract import JobRequest
from promptmill.errors import Overloaded
from promptmill.settings import Budget, Settings
from promptmill.store import Store
from promptmill.store.connection import store_errors
from promptmill.usage.entries import NANO

logger = logging.getLogger(__name__)

_TOLD_MS: Final = int(keys.BUDGET_TOLD_TTL.total_seconds() * 1000)


async def check_budgets(store: Store, settings: Settings, requests: Iterable[JobRequest]) -> dict[str, str]:
    """As :func:`check_budget` for every user of some requests; the warnings by user.

    A repetition of a job that is stored passes: it answers that job and uses nothing.
    """
    if settings.budget is None and not any(config.budget for config in settings.users.values()):
        return {}
    by_user: dict[str, list[JobRequest]] = defaultdict(list)
    for request in requests:
        by_user[request.user].append(request)
    warnings: dict[str, str] = {}
    for user, own in by_user.items():
        try:
            warning = await check_budget(store, settings, user)
        except Overloaded:
            if await unknown(store, own):
                raise
            continue
        if warning is not None:
            warnings[user] = warning
    return warnings


async def check_budget(store: Store, settings: Settings, user: str) -> str | None:
    """Look whether a user may submit; answers a warning past a soft limit, None where all is well.

    One read for users with a budget, none for others. Operators hear of each soft limit once per user and day.

    Raises
    ------
    Overloaded
        ``budget_exceeded``: a hard limit is reached; ``limit`` names it, ``retry_after_s`` is the time to midnight UTC.
    StoreUnavailable
        Redis does not answer.
    """
    budget = settings.budget_of(user)
    if budget is None:
        return None
    now = datetime.now(UTC)
    day = now.date().isoformat()
    with store_errors(store.address):
        raw: list[bytes | None] = await store.wire.call(
            "HMGET", keys.ledger_sums(day), f"user_cost:{user}", f"user_tokens:{user}"
        )
    dollars, tokens = int(raw[0] or 0) / NANO, int(raw[1] or 0)
    reached = _reached(budget, "hard", dollars, tokens)
    if reached is not None:
        limit, said = reached
        midnight = (now + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
        raise Overloaded(
            f"the budget of user {user!r} for {day} is used up: {said}; it begins anew at {midnight:%Y-%m-%dT%H:%MZ}",
            code="budget_exceeded",
            field="user",
            limit=limit,
            retry_after_s=round((midnight - now).total_seconds(), 3),
        )
    reached = _reached(budget, "soft", dollars, tokens)
    if reached is None:
        return None
    warning = f"the soft budget of user {user!r} for {day} is used up: {reached[1]}"
    await _tell_operators(store, user, day, warning)
    return warning


def _reached(budget: Budget, kind: Literal["soft", "hard"], dollars: float, tokens: int) -> tuple[float, str] | None:
    """The first limit of a kind that is reached, and how that is said."""
    usd = budget.soft_usd if kind == "soft" else budget.hard_usd
    if usd is not None and dollars >= usd:
        return usd, f"${dollars:.6g} of ${usd:g}"
    most = budget.soft_tokens if kind == "soft" else budget.hard_tokens
    if most is not None and tokens >= most:
        return most, f"{tokens} of {most} tokens"
    return None


async def _tell_operators(store: Store, user: str, day: str, message: str) -> None:
    with store_errors(store.address):
        first = await store.wire.call("SET", keys.budget_told(user, day), "1", "NX", "PX", _TOLD_MS)
        if first is None:
            return
        event = {"event": "budget_soft", "user": user, "message": message, "at": datetime.now(UTC).isoformat()}
        await store.wire.call("PUBLISH", keys.OPERATORS, orjson.dumps(event))
    logger.warning("%s", message)
