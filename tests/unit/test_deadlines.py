"""The bounds of an attempt."""

from __future__ import annotations

import asyncio

import pytest

from promptmill.contract import Timeouts
from promptmill.errors import BackendError
from promptmill_workers.deadlines import Deadlines


async def test_no_first_token_in_time() -> None:
    with pytest.raises(BackendError) as caught:
        async with Deadlines(Timeouts(first_token_s=0.05, idle_s=60, total_s=60)):
            await asyncio.Event().wait()
    assert caught.value.code == "timeout_first_token"


async def test_silence_after_a_token_even_where_the_first_may_take_long() -> None:
    async def run() -> None:
        async with asyncio.timeout(60), Deadlines(Timeouts(first_token_s=60, idle_s=0.05, total_s=60)) as deadlines:
            deadlines.touch()
            await asyncio.Event().wait()

    with pytest.raises(BackendError) as caught:
        await run()
    assert caught.value.code == "timeout_idle"


async def test_a_stream_that_never_pauses_still_ends() -> None:
    async def run() -> None:
        async with Deadlines(Timeouts(first_token_s=60, idle_s=60, total_s=0.1)) as deadlines:
            while True:
                deadlines.touch()
                await asyncio.sleep(0.005)

    with pytest.raises(BackendError) as caught:
        await run()
    assert caught.value.code == "timeout_total"


class ScriptedLoop(asyncio.SelectorEventLoop):
    """Its clock stands still unless a test moves it: a machine that pauses is not to look like a silent provider."""

    now = 1000.0

    def time(self) -> float:
        return self.now


def test_touching_in_time_passes() -> None:
    async def run(loop: ScriptedLoop, silent_s: float) -> None:
        async with Deadlines(Timeouts(first_token_s=60, idle_s=1, total_s=60)) as deadlines:
            for _ in range(6):
                deadlines.touch()
                loop.now += silent_s
                for _ in range(3):
                    await asyncio.sleep(0)  # what is due by then runs

    with asyncio.Runner(loop_factory=ScriptedLoop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, ScriptedLoop)
        runner.run(run(loop, 0.9))
        with pytest.raises(BackendError, match="idle_s"):
            runner.run(run(loop, 1.1))


async def test_a_cancellation_from_elsewhere_stays_one() -> None:
    async def run() -> None:
        async with Deadlines(Timeouts(total_s=60)):
            await asyncio.Event().wait()

    task = asyncio.create_task(run())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancellation_that_comes_with_a_timeout_is_not_swallowed() -> None:
    async def run() -> None:
        async with Deadlines(Timeouts(total_s=0.01)):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                task.cancel()
                raise

    task = asyncio.create_task(run())
    with pytest.raises(asyncio.CancelledError):
        await task
