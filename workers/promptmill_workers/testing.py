"""The conformance suite: what every backend does, whoever wrote it.

Subclass :class:`BackendConformance` in a test module, name the class ``Test…``, implement ``opened`` against a fake
provider, and let pytest collect it (with pytest-asyncio in ``auto`` mode, or any plugin that runs ``async def``
tests)::

    class TestMine(BackendConformance):
        @asynccontextmanager
        async def opened(self, scenario):
            async with my_fake_provider(scenario) as url:
                backend = Mine("mine", ModelConfig(type="mine", options={"url": url}))
                try:
                    yield backend
                finally:
                    await backend.aclose()

The suite needs no pytest itself; a failure is an ``AssertionError`` that says what was expected.
"""

from __future__ import annotations

import asyncio
import pickle
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

from promptmill.contract import JobRequest, Timeouts, parse_request
from promptmill.errors import CODES, BackendError
from promptmill.text import clean_text
from promptmill_workers.backends.base import Backend, Call, Finished, Item, TextDelta, UsageUpdate

PROMPT_S: Final = 10.0
"""How soon a cancelled or closed call must have returned."""

SCRIPTS: Final = (
    "English, ",
    "naïve Ελληνικά Русский ",
    "日本語 한국어 中文 ",
    "العربية עברית हिन्दी ไทย ",
    "👩‍🚀 🏳️‍🌈 \U0001d518\U0001d52b\U0001d526 ",
    # What str.splitlines() takes for line ends, and what looks like a protocol's own marks.
    "line\u2028par\u2029nel\u0085vt\x0bff\x0cfs\x1c",
    "\r\n\n\r\ttab",
    "data: [DONE]\n\nevent: error\n\n",
    "e\u0301 \u200d\ufeff \x00 \uffff",
    # A surrogate pair in two pieces, and a half without its other half.
    "pair \ud83d",
    "\ude00 ",
    "lone \ud800",
    " end\ud83d",
)


@dataclass(frozen=True, slots=True)
class Scenario:
    """What the fake provider is to do.

    ``pieces`` is the answer, one delta each where the protocol allows it; None answers with the last user message.
    With ``fault`` the answer goes wrong after ``after`` deltas: ``cut`` (the connection ends without the protocol's
    end), ``empty`` (it ends properly without any text), ``hang`` (nothing ever comes), ``stall`` (``after`` deltas,
    then nothing). With ``times`` only the first so many calls go wrong (``Call.attempt`` counts them from 1).
    """

    pieces: tuple[str, ...] | None = None
    fault: Literal["cut", "empty", "hang", "stall"] | None = None
    after: int = 0
    times: int | None = None


def call(prompt: str = "hello", *, attempt: int = 1, job_id: str = "job", **fields: Any) -> Call:
    """A call with every timeout set; ``fields`` are the request's own."""
    request: JobRequest = parse_request({"prompt": prompt, **fields})
    bounds = Timeouts(queue_s=60, connect_s=30, first_token_s=30, idle_s=30, total_s=60)
    return Call(job_id=job_id, attempt=attempt, request=request, timeouts=bounds)


async def collect(backend: Backend, asked: Call) -> list[Item]:
    """All items of one call."""
    async with aclosing(backend.complete(asked)) as items:
        return [item async for item in items]


async def failure(backend: Backend, asked: Call) -> tuple[list[Item], BackendError]:
    """The items before the error, and the error; anything else is a failure of the test."""
    seen: list[Item] = []
    async with aclosing(backend.complete(asked)) as items:
        try:
            async for item in items:
                seen.append(item)  # noqa: PERF401
        except BackendError as error:
            return seen, error
    raise AssertionError(f"expected a BackendError after {seen}")


def text_of(items: Iterable[Item]) -> str:
    """The answer that the items make."""
    return "".join(item.text for item in items if isinstance(item, TextDelta))


def expect(condition: object, message: str) -> None:
    """Raise AssertionError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise AssertionError(message)


class BackendConformance(ABC):
    """The suite. Implement ``opened``; override ``wait_disconnected`` where there is a connection to see.

    ``answer_s`` is how long a call may take to answer a few words; a backend that starts a program needs more on a busy
    machine.
    """

    answer_s: ClassVar[float] = 10.0

    @abstractmethod
    def opened(self, scenario: Scenario) -> AbstractAsyncContextManager[Backend]:
        """The backend under test, with a provider behind it that does as ``scenario`` says; closed on the way out."""

    async def wait_disconnected(self) -> None:  # noqa: B027 - a backend without connections has nothing to wait for
        """Return when the provider sees no connection of ours, or no program of ours runs; raise TimeoutError else."""

    async def test_the_deltas_joined_are_the_answer(self) -> None:
        pieces = ("Once ", "upon ", "a ", "time")
        async with self.opened(Scenario(pieces)) as backend:
            _same(text_of(await collect(backend, call())), "".join(pieces))

    async def test_finished_comes_exactly_once_and_last(self) -> None:
        async with self.opened(Scenario(("one ", "two"))) as backend:
            items = await collect(backend, call())
        ends = [i for i, item in enumerate(items) if isinstance(item, Finished)]
        expect(ends == [len(items) - 1], f"Finished stands at {ends} of {len(items)} items")
        last = items[-1]
        expect(isinstance(last, Finished) and last.reason == "stop", f"expected the reason stop: {last}")

    async def test_usage_counts_are_never_negative(self) -> None:
        async with self.opened(Scenario(("one ", "two"))) as backend:
            items = await collect(backend, call())
        for item in items:
            if isinstance(item, UsageUpdate):
                low = min(v for v in item.usage.model_dump().values() if not isinstance(v, bool))
                expect(low >= 0, f"a negative count: {item.usage}")

    async def test_every_script_arrives_unchanged(self) -> None:
        async with self.opened(Scenario(SCRIPTS)) as backend:
            items = await collect(backend, call())
        _same(text_of(items), clean_text("".join(SCRIPTS)))

    async def test_no_delta_is_empty_or_unwritable(self) -> None:
        async with self.opened(Scenario(SCRIPTS)) as backend:
            items = await collect(backend, call())
        for item in items:
            if isinstance(item, TextDelta):
                expect(item.text, "an empty delta")
                expect(clean_text(item.text) == item.text, f"a lone surrogate in {item.text!r}")

    async def test_a_long_answer_arrives_whole(self) -> None:
        pieces = tuple(f"token{i} " for i in range(20_000))
        async with self.opened(Scenario(pieces)) as backend:
            _same(text_of(await collect(backend, call())), "".join(pieces))

    async def test_a_long_prompt_is_taken(self) -> None:
        prompt = "Wörter " * 30_000
        async with self.opened(Scenario()) as backend:
            _same(text_of(await collect(backend, call(prompt))), prompt)

    async def test_a_cut_answer_is_an_error_after_its_deltas(self) -> None:
        async with self.opened(Scenario(("one ", "two ", "three"), fault="cut", after=2)) as backend:
            items, error = await failure(backend, call())
        expect(error.code == "cut", f"expected cut: {error.code} ({error})")
        _same(text_of(items), "one two ")
        expect(not any(isinstance(item, Finished) for item in items), "a cut answer was called finished")

    async def test_an_answer_cut_before_its_first_delta_is_an_error(self) -> None:
        async with self.opened(Scenario(("one ", "two "), fault="cut", after=0)) as backend:
            items, error = await failure(backend, call())
        expect(error.code in {"cut", "unreachable"}, f"expected cut or unreachable: {error.code} ({error})")
        _same(text_of(items), "")

    async def test_an_empty_answer_is_an_error(self) -> None:
        async with self.opened(Scenario((), fault="empty")) as backend:
            _, error = await failure(backend, call())
        expect(error.code == "empty", f"expected empty: {error.code} ({error})")

    async def test_errors_have_documented_codes_and_survive_pickling(self) -> None:
        for scenario in (Scenario(("one ", "two"), fault="cut", after=1), Scenario((), fault="empty")):
            async with self.opened(scenario) as backend:
                _, error = await failure(backend, call())
            expect(error.code in CODES, f"unknown code {error.code}")
            copy = pickle.loads(pickle.dumps(error))  # noqa: S301
            same = (copy.to_dict(), copy.provider_request_id) == (error.to_dict(), error.provider_request_id)
            expect(same, f"pickling changed {error.to_dict()} to {copy.to_dict()}")

    async def test_a_call_after_a_failed_one_succeeds(self) -> None:
        async with self.opened(Scenario(("one ", "two"), fault="cut", after=1, times=1)) as backend:
            await failure(backend, call(attempt=1))
            _same(text_of(await collect(backend, call(attempt=2))), "one two")

    async def test_cancelling_a_call_that_hangs_returns_promptly_and_disconnects(self) -> None:
        async with self.opened(Scenario(("one ", "two"), fault="hang")) as backend:
            task = asyncio.create_task(collect(backend, call()))
            done, _ = await asyncio.wait([task], timeout=0.2)
            expect(not done, "the call was to hang")
            await _cancel(task)
            await self.wait_disconnected()

    async def test_cancelling_a_call_that_stalls_returns_promptly_and_disconnects(self) -> None:
        async with self.opened(Scenario(("one ", "two ", "three"), fault="stall", after=2)) as backend:
            seen = asyncio.Event()
            task = asyncio.create_task(_collect_until(seen, "one two ", backend))
            async with asyncio.timeout(self.answer_s):
                await seen.wait()
            await _cancel(task)
            await self.wait_disconnected()

    async def test_closing_early_disconnects(self) -> None:
        pieces = tuple(f"token{i} " for i in range(5_000))
        async with self.opened(Scenario(pieces)) as backend:
            items = backend.complete(call())
            async for item in items:
                if isinstance(item, TextDelta):
                    break
            async with asyncio.timeout(PROMPT_S):
                await items.aclose()
            await self.wait_disconnected()

    async def test_concurrent_calls_do_not_mix(self) -> None:
        prompts = [f"prompt {i} " * (i + 1) for i in range(30)]
        async with self.opened(Scenario()) as backend:
            answers = await asyncio.gather(*(collect(backend, call(p, job_id=f"job-{p}")) for p in prompts))
        for prompt, items in zip(prompts, answers, strict=True):
            _same(text_of(items), prompt)

    async def test_one_call_that_hangs_does_not_hold_up_others(self) -> None:
        async with self.opened(Scenario(("one ", "two"), fault="hang", times=1)) as backend:
            hanging = asyncio.create_task(collect(backend, call(attempt=1)))
            done, _ = await asyncio.wait([hanging], timeout=0.2)
            expect(not done, "the first call was to hang")
            async with asyncio.timeout(self.answer_s):
                _same(text_of(await collect(backend, call(attempt=2))), "one two")
            await _cancel(hanging)

    async def test_a_backend_that_was_never_called_can_be_closed(self) -> None:
        async with self.opened(Scenario(("one",))) as backend:
            await backend.aclose()


async def _collect_until(seen: asyncio.Event, text: str, backend: Backend) -> None:
    """Read on to the end; set ``seen`` once the answer so far is ``text``."""
    so_far = ""
    async with aclosing(backend.complete(call())) as items:
        async for item in items:
            so_far += text_of([item])
            if so_far == text:
                seen.set()


async def _cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=PROMPT_S)
    expect(done, f"a cancelled call did not return within {PROMPT_S} s")
    expect(task.cancelled(), f"a cancelled call ended otherwise: {task}")


def _same(got: str, wanted: str) -> None:
    if got == wanted:
        return
    at = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), min(len(got), len(wanted)))
    near = slice(max(at - 20, 0), at + 20)
    raise AssertionError(
        f"differs at {at} of {len(wanted)} ({len(got)} came): {got[near]!r}, expected {wanted[near]!r}"
    )
