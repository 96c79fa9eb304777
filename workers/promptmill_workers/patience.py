"""Waiting for a store that is away."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from promptmill.errors import StoreUnavailable

logger = logging.getLogger(__name__)

T = TypeVar("T")
_BACKOFF_MAX_S: Final = 2.0


async def patiently(act: Callable[[], Awaitable[T]]) -> T:
    """Repeat an idempotent act until the store answers: a job is not given up because Redis is away."""
    backoff = 0.05
    while True:
        try:
            return await act()
        except StoreUnavailable as err:
            logger.warning("waiting for the store: %s", err)
            await asyncio.sleep(backoff * random.uniform(0.5, 1.5))  # noqa: S311 - spreads retries, no secret
            backoff = min(backoff * 2, _BACKOFF_MAX_S)
