"""The scripted backend does as its script says."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from promptmill.settings import ModelConfig
from promptmill_workers.backends import load_backend
from promptmill_workers.backends.base import Backend, Finished, TextDelta, UsageUpdate
from promptmill_workers.testing import call, collect, failure, text_of


def echo(**options: Any) -> Backend:
    return load_backend("echo", ModelConfig(type="echo", options=options))


async def test_it_echoes_the_last_user_message_word_by_word() -> None:
    items = await collect(echo(), call("one two  three"))
    assert [item.text for item in items if isinstance(item, TextDelta)] == ["one ", "two  ", "three"]


async def test_chunks_have_the_size_that_was_asked() -> None:
    items = await collect(echo(text="abcde", chunk_chars=2, repeat=2), call())
    assert [item.text for item in items if isinstance(item, TextDelta)] == ["ab", "cd", "ea", "bc", "de"]


async def test_usage_counts_words_and_is_no_estimate() -> None:
    items = await collect(echo(text="a b c"), call("one two"))
    usage = next(item.usage for item in items if isinstance(item, UsageUpdate))
    assert (usage.input_tokens, usage.output_tokens, usage.estimated) == (2, 3, False)


@pytest.mark.parametrize(
    ("fields", "text", "reason"),
    [({"max_tokens": 2}, "a b ", "length"), ({"stop": ["c", "d"]}, "a b ", "stop_sequence"), ({}, "a b c d", "stop")],
)
async def test_bounds_of_the_request_end_the_answer(fields: dict[str, Any], text: str, reason: str) -> None:
    items = await collect(echo(text="a b c d"), call(**fields))
    last = items[-1]
    assert isinstance(last, Finished)
    assert (text_of(items), last.reason) == (text, reason)


@pytest.mark.parametrize("fault", ["rate_limited", "cut", "malformed", "auth"])
async def test_a_fault_comes_after_its_chunks_and_only_in_the_first_attempts(fault: str) -> None:
    backend = echo(text="a b c", fault=fault, fault_after=2, times=2)
    for attempt in (1, 2):
        items, error = await failure(backend, call(attempt=attempt))
        assert (text_of(items), error.code) == ("a b ", fault)
    assert text_of(await collect(backend, call(attempt=3))) == "a b c"


async def test_saying_nothing_is_an_empty_answer() -> None:
    _, error = await failure(echo(text="x", repeat=0), call())
    assert error.code == "empty"


async def test_the_rate_holds_over_the_whole_answer() -> None:
    loop = asyncio.get_running_loop()
    start = loop.time()
    await collect(echo(text="a b c d e f", tokens_per_s=50, first_token_s=0.05), call())
    # Five gaps of 20 ms after the first chunk.
    assert loop.time() - start >= 0.149


async def test_others_run_between_its_chunks() -> None:
    answers = asyncio.create_task(collect(echo(text="x ", repeat=1000), call()))
    turns = 0
    while not answers.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns >= 1000
