"""Keeps parts alive, and ends all of them.

One event loop does everything; signal handlers only set events (:mod:`promptmill.up.signals`). Every wait is bounded.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from itertools import groupby
from typing import Final, Self

from promptmill.up.part import Part, PartDied, PartSpec, describe_status

STABLE_S: Final = 30.0
"""A part that lived so long died of something new: it is restarted at once."""
FIRST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 30.0
_KEEPERS_WAIT_S: Final = 5.0


def restart_pause_s(rapid_deaths: int) -> float:
    """How long to wait before a restart after that many deaths in a row, each less than 30 s after its start.

    The first is restarted at once; then 0.5 s, 1 s, 2 s … up to 30 s.
    """
    if rapid_deaths <= 0:
        return 0.0
    return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(rapid_deaths - 1, 16))


class Supervisor:
    """Starts parts, restarts those that die, ends all. An async context manager: leaving it ends every part.

    Until :meth:`settled` was called a death is an error, raised by :meth:`first_death`: a configuration that cannot
    work must not be tried for ever. After it, the part is started again.
    """

    def __init__(
        self,
        tell: Callable[[str], None],
        on_change: Callable[[], None] | None = None,
        hurry: asyncio.Event | None = None,
    ) -> None:
        self.parts: dict[str, Part] = {}
        self.hurry = hurry or asyncio.Event()
        """Set it to have everything killed at once instead of waited for."""
        self._tell = tell
        self._on_change = on_change
        self._settled = False
        self._stopping = asyncio.Event()
        self._death: asyncio.Future[PartDied] = asyncio.get_running_loop().create_future()
        self._keepers: list[asyncio.Task[None]] = []
        # We hold the write end, and only we: descriptors are close-on-exec unless passed on.
        self._lifeline, self._lifeline_end = os.pipe()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def lifeline(self) -> int:
        """The read end that parts inherit: ``PROMPTMILL_LIFELINE_FD`` in their environment."""
        return self._lifeline

    def pids(self) -> dict[str, int]:
        """The pids of the parts that run now, by name."""
        return {name: part.pid for name, part in self.parts.items() if part.pid}

    async def start(self, spec: PartSpec) -> None:
        """Start a part and keep it alive from now on.

        Raises
        ------
        PartDied
            It could not be started at all.
        """
        part = Part(spec, self._lifeline, self._tell)
        self.parts[spec.name] = part
        try:
            await part.start()
        except OSError as err:
            raise PartDied(spec.name, f"cannot start {spec.command[0]}: {err.strerror}", []) from err
        self._keepers.append(asyncio.create_task(self._keep(part), name=f"keep {spec.name}"))

    async def first_death(self) -> PartDied:
        """Wait for a part to die before :meth:`settled` was called."""
        return await asyncio.shield(self._death)

    def settled(self) -> None:
        """Everything works: from now on a part that dies is restarted."""
        self._settled = True

    async def stop(self) -> None:
        """End all parts, by their order; with ``hurry`` set, all at once. Returns when none is left."""
        self._stopping.set()
        by_order = sorted(self.parts.values(), key=lambda part: part.spec.stop_order)
        try:
            for _, group in groupby(by_order, key=lambda part: part.spec.stop_order):
                if self.hurry.is_set():
                    break
                await asyncio.gather(*(part.end(self.hurry) for part in group))
            await asyncio.gather(*(part.end(self.hurry) for part in by_order))
        finally:
            self._close_lifeline()
            if self._keepers:
                # Each collects its part's last words and ends by itself; one whose part the kernel holds is left.
                _, stuck = await asyncio.wait(self._keepers, timeout=_KEEPERS_WAIT_S)
                for keeper in stuck:
                    keeper.cancel()
                await asyncio.gather(*self._keepers, return_exceptions=True)
                self._keepers.clear()
            self._death.cancel()

    def _close_lifeline(self) -> None:
        # Whatever still lives, a part that was just being started for instance, sees the end now.
        if self._lifeline_end >= 0:
            os.close(self._lifeline_end)
            os.close(self._lifeline)
            self._lifeline = self._lifeline_end = -1

    async def _keep(self, part: Part) -> None:
        rapid_deaths = 0
        while True:
            how = describe_status(await part.wait())
            if self._stopping.is_set():
                return
            if not self._settled:
                if not self._death.done():
                    self._death.set_result(PartDied(part.spec.name, how, list(part.tail)))
                return
            rapid_deaths = rapid_deaths + 1 if time.monotonic() - part.started_at < STABLE_S else 0
            self._changed()
            if not await self._restart(part, how, rapid_deaths):
                return

    async def _restart(self, part: Part, how: str, rapid_deaths: int) -> bool:
        """Start ``part`` again, as often as it takes. False where everything is being ended instead."""
        while True:
            pause_s = restart_pause_s(rapid_deaths - 1)
            if pause_s:
                self._tell(f"{part.spec.name} died ({how}); next start in {pause_s:g} s")
            if await self._stopped_within(pause_s):
                return False
            try:
                await part.start()
            except OSError as err:
                # No memory or no process to be had: that can pass.
                self._tell(f"{part.spec.name} cannot be started: {err.strerror}")
                rapid_deaths += 1
                continue
            if self._stopping.is_set():
                await part.end(self.hurry)
                await part.wait()
                return False
            self._tell(f"{part.spec.name} died ({how}); restarted as pid {part.pid}")
            self._changed()
            return True

    async def _stopped_within(self, seconds: float) -> bool:
        if not seconds:
            return self._stopping.is_set()
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            return False
        return True

    def _changed(self) -> None:
        if self._on_change:
            self._on_change()
