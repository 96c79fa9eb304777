"""The feeder: keeps a bounded number of lines of all batches in the queue, and ends batches.

Every worker has one; the one that holds the lease feeds. A lease that is lost without being noticed does no harm: each
step is refused once another feeder has taken the batch, and a line's job has one id whoever submits it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import defaultdict
from typing import Final

from promptmill import keys
from promptmill.batch import scripts
from promptmill.batch.repair import count_ended, let_go, stop_lines
from promptmill.batch.steps import Steps
from promptmill.batch.store import read_head, run
from promptmill.batch.view import FIELDS, Known, View, shares
from promptmill.client.routes import Routes
from promptmill.errors import NotFound, Overloaded, StoreUnavailable
from promptmill.heartbeat import ready_workers
from promptmill.settings import Settings
from promptmill.store import Store
from promptmill.store.connection import store_errors
from promptmill.usage.booking import run_all
from promptmill.usage.budgets import check_budget
from promptmill.usage.entries import NANO

logger = logging.getLogger(__name__)

WINDOW_MIN: Final = 100
_TTL_S: Final = keys.FEEDER_TTL.total_seconds()
_RENEW_S: Final = 1.0
_MARGIN_S: Final = 1.0
_BUSY_S: Final = 0.1
"""How often a window that may have room is looked at: a second's worth of lines waits in it."""
_QUIET_S: Final = 0.5
_LINKS_FULL_S: Final = 0.5
_BUDGET_S: Final = 5.0
_UNREADABLE_S: Final = 30.0
_ACTIVE_MAX: Final = 10_000
_GONE_MS: Final = 60_000
"""A name without a batch is one that is being made, or whose maker died; after so long it is the latter."""


class Feeder:
    """Feeds batches until cancelled; see :meth:`run`. Use from one event loop. ``name`` shows who has the lease."""

    def __init__(self, store: Store, settings: Settings, name: str = "") -> None:
        self._store = store
        self._settings = settings
        self._routes = Routes(settings)
        self._token = f"{name}:{keys.new_token()}"
        self._steps = Steps(store, settings, self._routes, self._token)
        self._held_until = 0.0
        self._renewed_at = -math.inf
        self._looked_at = -math.inf
        self._known: dict[str, Known] = {}
        self._windows: dict[str, int] = {}
        self._budgets: dict[str, tuple[float, bool]] = {}
        self._turn = 0
        self._news = asyncio.Event()
        self.stopped = False
        """Set it to give the lease up and feed no more."""

    def wake(self) -> None:
        """There may be something to do: a batch was made, added to or cancelled."""
        self._news.set()

    async def run(self) -> None:
        """Feed whenever the lease can be had, for ever."""
        while True:
            try:
                pause_s = await self.round()
            except StoreUnavailable as err:
                logger.warning("the feeder waits: %s", err)
                self._known.clear()
                pause_s = self._settings.heartbeat_s
            if pause_s > 0:
                try:
                    async with asyncio.timeout(pause_s):
                        await self._news.wait()
                except TimeoutError:
                    pass  # nothing was told: look by ourselves
            self._news.clear()

    async def round(self) -> float:
        """Look at every batch once; answers after how many seconds to do so again. Raises StoreUnavailable."""
        with store_errors(self._store.address):
            ids: list[bytes] = await self._store.wire.call("ZRANGE", keys.BATCHES, 0, _ACTIVE_MAX - 1)
        if not ids or self.stopped:
            await self.release()
            return self._settings.heartbeat_s
        if not await self._lead():
            return min(self._settings.heartbeat_s, _TTL_S / 2)
        views = await self._views([raw.decode() for raw in ids])
        await self._look_around()
        active = [(known, view) for known, view in views if await self._tended(known, view)]
        fed = await self._feed(active)
        if fed:
            return 0.0
        return _BUSY_S if len(active) < len(views) or any(view.left for _, view in active) else _QUIET_S

    # -- the lease ----------------------------------------------------------------------------------------------

    async def _lead(self) -> bool:
        """Take the lease, or renew it in time."""
        now = time.monotonic()
        if now < self._held_until and now - self._renewed_at < _RENEW_S:
            return True
        (held,) = await run_all(self._store, scripts.LEASE, [((keys.FEEDER,), [self._token, str(int(_TTL_S * 1000))])])
        if not held:
            if self._held_until:
                logger.info("another feeder has the lease")
                self._held_until = 0.0
                self._known.clear()
            return False
        if not self._held_until:
            logger.info("feeding batches")
        # From before it was asked: the reply may have taken long.
        self._held_until, self._renewed_at = now + _TTL_S - _MARGIN_S, now
        return True

    @property
    def holds(self) -> bool:
        """Whether this one feeds, as far as it knows."""
        return time.monotonic() < self._held_until

    async def release(self) -> None:
        """Give the lease up, so that another feeder begins at once. Raises StoreUnavailable."""
        if self._held_until:
            self._held_until = 0.0
            self._known.clear()
            await run_all(self._store, scripts.RELEASE, [((keys.FEEDER,), [self._token])])

    # -- looking ------------------------------------------------------------------------------------------------

    async def _views(self, ids: list[str]) -> list[tuple[Known, View]]:
        with store_errors(self._store.address):
            rows = await self._store.ask([("HMGET", keys.batch(batch_id), *FIELDS) for batch_id in ids])
        views: list[tuple[Known, View]] = []
        self._known = {batch_id: known for batch_id, known in self._known.items() if batch_id in set(ids)}
        for batch_id, row in zip(ids, rows, strict=True):
            view = View.read(row)
            known = self._known.get(batch_id)
            if view is not None and known is None:
                known = await self._take(batch_id)
            elif view is not None and view.feeder != self._token:
                # Another feeder had it meanwhile, and may believe that it still does.
                known = await self._take(batch_id)
            if view is None or known is None:
                await self._forget_missing(batch_id)
                continue
            views.append((known, view))
        return views

    async def _take(self, batch_id: str) -> Known | None:
        """From now on every other feeder's steps are refused."""
        try:
            known = Known(batch_id, await read_head(self._store, batch_id))
        except NotFound:
            return None
        await run(self._store, scripts.TAKE, batch_id, self._token)
        self._known[batch_id] = known
        return known

    async def _forget_missing(self, batch_id: str) -> None:
        with store_errors(self._store.address):
            score: bytes | None = await self._store.wire.call("ZSCORE", keys.BATCHES, batch_id)
            if score is not None and time.time() * 1000 - float(score) > _GONE_MS:
                await self._store.wire.call("ZREM", keys.BATCHES, batch_id)

    async def _look_around(self) -> None:
        """Who could run lines, and what they are routed to."""
        now = time.monotonic()
        if now - self._looked_at < self._settings.heartbeat_s:
            return
        self._looked_at = now
        await self._routes.live.refresh_if_stale(self._store)
        slots: dict[str, int] = defaultdict(int)
        for beat in await ready_workers(self._store):
            slots[beat.family] += max(1, math.floor(beat.concurrency * self._settings.batch_share))
        self._windows = {family: max(WINDOW_MIN, 2 * count) for family, count in slots.items()}
        with store_errors(self._store.address):
            ttl_ms = int(keys.LIST_TTL.total_seconds() * 1000)
            await self._store.wire.call("PEXPIRE", keys.BATCHES, ttl_ms, "GT")

    def _window(self, family: str) -> int:
        """How many lines may wait or run at once for a family's workers."""
        return self._settings.batch_window or self._windows.get(family, WINDOW_MIN)

    # -- one batch ----------------------------------------------------------------------------------------------

    async def _tended(self, known: Known, view: View) -> bool:
        try:
            return await self._tend(known, view)
        except StoreUnavailable:
            raise
        except Exception:
            # One batch that only a newer version reads must not stop the others.
            logger.exception("batch %s cannot be looked after", known.batch_id)
            known.rest_until = time.monotonic() + _UNREADABLE_S
            return False

    async def _tend(self, known: Known, view: View) -> bool:
        """All but feeding; True where the batch has a share in the window."""
        if view.over:
            if await let_go(self._store, known, view):
                with store_errors(self._store.address):
                    await self._store.wire.call("ZREM", keys.BATCHES, known.batch_id)
            return False
        if view.feeds and time.time() * 1000 >= view.deadline_ms and await self._expired(known.batch_id):
            return False
        limit_usd = known.stored.head.max_cost_usd
        if view.feeds and limit_usd is not None and view.cost_nano > limit_usd * NANO:
            logger.info("batch %s cost more than %g dollars and is cancelled", known.batch_id, limit_usd)
            await run(self._store, scripts.STOP, known.batch_id, "cancelled")
            self._news.set()
            return False
        if view.state == "cancelling":
            if await self._steps.feed_again(known, view, push=False):
                await stop_lines(self._store, known, view)
            return False
        now = time.monotonic()
        if now - known.repaired_at >= self._settings.heartbeat_s:
            known.repaired_at = now
            await count_ended(self._store, known, view)
        if view.sent < view.fed and now >= known.rest_until:
            if not await self._steps.feed_again(known, view, push=True):
                known.rest_until = now + _LINKS_FULL_S
            return False  # seen anew in the next round
        return view.feeds

    async def _expired(self, batch_id: str) -> bool:
        # The store's clock decides; ours only says when to ask.
        if await run(self._store, scripts.STOP, batch_id, "expired") == b"early":
            return False
        logger.info("batch %s is past its deadline", batch_id)
        self._news.set()
        return True

    async def _feed(self, active: list[tuple[Known, View]]) -> int:
        """Let each batch have its share of its family's window, one step for each; answers how many lines were fed."""
        families: dict[str, list[tuple[Known, View]]] = defaultdict(list)
        for known, view in active:
            families[known.family].append((known, view))
        fed = 0
        self._turn += 1
        for family, batches in families.items():
            begin = self._turn % len(batches)
            turns = [*batches[begin:], *batches[:begin]]
            parts = shares(self._window(family), [view.in_flight + view.left for _, view in turns])
            for (known, view), part in zip(turns, parts, strict=True):
                if view.left and self.holds and time.monotonic() >= known.rest_until and await self._may_spend(known):
                    fed += await self._fed(known, view, part - view.in_flight)
        return fed

    async def _fed(self, known: Known, view: View, most: int) -> int:
        if most <= 0:
            return 0
        try:
            return await self._steps.feed(known, view, most)
        except StoreUnavailable:
            raise
        except Exception:
            logger.exception("batch %s cannot be fed", known.batch_id)
            known.rest_until = time.monotonic() + _UNREADABLE_S
            return 0

    async def _may_spend(self, known: Known) -> bool:
        """A batch of a user whose budget of the day is used up waits for the next day, or for its deadline."""
        user = known.stored.head.user
        looked_at, well = self._budgets.get(user, (-math.inf, True))
        now = time.monotonic()
        if now - looked_at > (_RENEW_S if well else _BUDGET_S):
            try:
                await check_budget(self._store, self._settings, user)
                well = True
            except Overloaded as err:
                if well:
                    logger.warning("batch %s waits: %s", known.batch_id, err)
                well = False
            if len(self._budgets) > _ACTIVE_MAX:
                self._budgets.clear()
            self._budgets[user] = (now, well)
        return well
