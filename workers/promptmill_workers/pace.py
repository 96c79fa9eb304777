"""Tokens that flow go before jobs that start.

Starting a job costs as much of the event loop as a hundred tokens. When many start at once, those that stream already
would wait behind them; so jobs start one at a time, and only as fast as the loop keeps up.
"""

from __future__ import annotations

import asyncio
from typing import Final

_TURN_MAX_S: Final = 0.004
"""A turn of the loop that took longer says that it is behind."""
_STEP_S: Final = 0.005
_WAIT_MAX_S: Final = 0.5


class Pace:
    """Use from one event loop."""

    def __init__(self) -> None:
        self._one_at_a_time = asyncio.Lock()

    async def turn(self) -> None:
        """Return when it is this job's turn: at once on an idle loop, about 0.5 s after the call at the latest.

        The bound counts from the call, not from the head of the line: a loop that is always behind delays its jobs, but
        starts as many as come.
        """
        clock = asyncio.get_running_loop().time
        began = clock()
        async with self._one_at_a_time:
            while True:
                before = clock()
                await asyncio.sleep(0)
                now = clock()
                if now - before <= _TURN_MAX_S or now - began > _WAIT_MAX_S:
                    return
                await asyncio.sleep(_STEP_S)
