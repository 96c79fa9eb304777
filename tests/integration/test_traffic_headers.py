"""What backends tell of a provider's limits: before the first token, and before a refusal's error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import pytest

from promptmill.rates import RateInfo, RateWindow
from promptmill.settings import ModelConfig
from promptmill_workers.backends.anthropic_api import AnthropicApi
from promptmill_workers.backends.base import Backend, Finished, TextDelta
from promptmill_workers.backends.local_openai import LocalOpenAI
from promptmill_workers.testing import call, collect, failure

CHAT = (
    b'data: {"choices":[{"index":0,"delta":{"content":"hi"}}]}\n\n'
    b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
)
MESSAGES = (
    b'event: message_start\ndata: {"type":"message_start","message":{"id":"m","usage":{"input_tokens":1}}}\n\n'
    b'event: content_block_start\ndata: {"type":"content_block_start","index":0,'
    b'"content_block":{"type":"text","text":""}}\n\n'
    b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
    b'"delta":{"type":"text_delta","text":"hi"}}\n\n'
    b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn"},'
    b'"usage":{"output_tokens":1}}\n\nevent: message_stop\ndata: {"type":"message_stop"}\n\n'
)
OPENAI = b"x-ratelimit-limit-requests: 60\r\nx-ratelimit-remaining-requests: 0\r\nx-ratelimit-reset-requests: 1m2s\r\n"
ANTHROPIC = (
    b"date: Sun, 22 Nov 2026 12:00:00 GMT\r\nanthropic-ratelimit-requests-limit: 60\r\n"
    b"anthropic-ratelimit-requests-remaining: 0\r\nanthropic-ratelimit-requests-reset: 2026-11-22T12:01:02Z\r\n"
)
TOLD = RateInfo(requests=RateWindow(60, 0, 62.0))


def chat(url: str) -> Backend:
    return LocalOpenAI("chat", ModelConfig(type="local_openai", model_name="m", api_url=url + "/v1"))


def messages(url: str) -> Backend:
    return AnthropicApi("messages", ModelConfig(type="anthropic_api", model_name="m", api_url=url))


@asynccontextmanager
async def answering(
    make: Callable[[str], Backend], status: int, headers: bytes, body: bytes
) -> AsyncGenerator[Backend]:
    """A backend whose provider says this to whatever it is asked."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(x[15:]) for x in head.lower().split(b"\r\n") if x.startswith(b"content-length:"))
        await reader.readexactly(length)
        kind = b"content-type: " + (b"text/event-stream" if status == 200 else b"application/json")
        writer.write(b"HTTP/1.1 %d x\r\nconnection: close\r\n%s\r\n%s\r\n%s" % (status, kind, headers, body))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        backend = make(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        try:
            yield backend
        finally:
            await backend.aclose()


@pytest.mark.parametrize(("make", "headers", "body"), [(chat, OPENAI, CHAT), (messages, ANTHROPIC, MESSAGES)])
async def test_limits_come_before_the_first_token(make: Callable[[str], Backend], headers: bytes, body: bytes) -> None:
    async with answering(make, 200, headers, body) as backend:
        items = await collect(backend, call())
    assert items[0] == TOLD
    assert TextDelta("hi") in items
    assert isinstance(items[-1], Finished)


@pytest.mark.parametrize(("make", "body"), [(chat, CHAT), (messages, MESSAGES)])
async def test_an_answer_that_tells_no_limits_has_no_such_item(make: Callable[[str], Backend], body: bytes) -> None:
    async with answering(make, 200, b"x-request-id: r\r\n", body) as backend:
        items = await collect(backend, call())
    assert not any(isinstance(item, RateInfo) for item in items)


@pytest.mark.parametrize(("make", "headers"), [(chat, OPENAI), (messages, ANTHROPIC)])
async def test_a_refusal_tells_limits_before_it_fails(make: Callable[[str], Backend], headers: bytes) -> None:
    body = b'{"type":"error","error":{"type":"rate_limit_error","message":"slow down"}}'
    async with answering(make, 429, headers + b"retry-after: 7\r\n", body) as backend:
        items, error = await failure(backend, call())
    assert items == [TOLD]
    assert (error.code, error.retry_after_s) == ("rate_limited", 7.0)
    assert "slow down" in error.message
