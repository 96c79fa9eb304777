"""A scripted backend without a provider: for tests, and for trying the path without a key.

It answers with ``options.text``, or with the last user message. ``max_tokens`` counts its chunks, ``stop`` cuts its
text, and usage counts words.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from typing import Annotated, Final

from pydantic import AfterValidator, Field

from promptmill.contract import JobRequest, Usage
from promptmill.errors import CODES, BackendError
from promptmill.settings import ModelConfig
from promptmill.text import clean_text
from promptmill_workers.backends.base import Call, Finished, Item, TextDelta, UsageUpdate
from promptmill_workers.backends.options import Options, parse_options

_WORDS: Final = re.compile(r"\S+\s*|\s+")
_WAITING: Final = frozenset({"hang", "stall"})


def _known_fault(fault: str) -> str:
    if fault not in CODES and fault not in _WAITING:
        raise ValueError(f"unknown fault {fault!r}: an error code, hang or stall")
    return fault


class EchoOptions(Options):
    """``options`` of an ``echo`` model."""

    text: Annotated[str, AfterValidator(clean_text)] | None = None
    """The answer; None echoes the last user message."""
    repeat: int = Field(default=1, ge=0, le=1_000_000)
    """How many times the text is said; 0 makes an empty answer, which is an error."""
    chunk_chars: int | None = Field(default=None, gt=0)
    """Characters a chunk; None is a word (with the space behind it) a chunk."""
    tokens_per_s: float = Field(default=0, ge=0, allow_inf_nan=False)
    """Chunks a second; 0 is as fast as they are taken."""
    first_token_s: float = Field(default=0, ge=0, allow_inf_nan=False)
    """The wait before the first chunk."""
    fault: Annotated[str, AfterValidator(_known_fault)] | None = None
    """An error code to fail with; ``hang`` waits for ever before the first chunk, ``stall`` after ``fault_after``."""
    fault_after: int = Field(default=0, ge=0)
    """Chunks before the fault (all of them where there are fewer)."""
    times: int | None = Field(default=None, ge=0)
    """Only the first so many attempts of a job fail; None: all."""


class Echo:
    """See the module. Holds nothing open."""

    def __init__(self, name: str, config: ModelConfig) -> None:
        self._options = parse_options(EchoOptions, name, config)

    async def complete(self, call: Call) -> AsyncGenerator[Item, None]:
        """See :class:`~promptmill_workers.backends.base.Backend`."""
        options = self._options
        fault = options.fault if options.times is None or call.attempt <= options.times else None
        chunks, reason = self._chunks(call.request)
        loop = asyncio.get_running_loop()
        due = loop.time() + options.first_token_s
        if fault == "hang":
            await loop.create_future()
        if options.first_token_s:
            await asyncio.sleep(options.first_token_s)
        for index, chunk in enumerate(chunks):
            if fault and index >= options.fault_after:
                break
            if options.tokens_per_s:
                # From the start, not from the last chunk: a late wake-up must not slow the whole answer.
                await asyncio.sleep(due + index / options.tokens_per_s - loop.time())
            else:
                await asyncio.sleep(0)
            yield TextDelta(chunk)
        if fault == "stall":
            await loop.create_future()
        if fault:
            raise BackendError(f"echo was told to fail with {fault}", code=fault)
        if not chunks:
            raise BackendError("echo was told to say nothing", code="empty")
        yield UsageUpdate(_usage(call.request, chunks))
        yield Finished(reason, f"echo-{call.job_id}-{call.attempt}")

    async def aclose(self) -> None:
        """Nothing to close."""

    def _chunks(self, request: JobRequest) -> tuple[list[str], str]:
        options = self._options
        text = (request.messages[-1].text if options.text is None else options.text) * options.repeat
        reason = "stop"
        ends = [at for at in (text.find(stop) for stop in request.stop or ()) if at >= 0]
        if ends:
            text, reason = text[: min(ends)], "stop_sequence"
        if options.chunk_chars:
            size = options.chunk_chars
            chunks = [text[i : i + size] for i in range(0, len(text), size)]
        else:
            chunks = _WORDS.findall(text)
        if request.max_tokens is not None and len(chunks) > request.max_tokens:
            chunks, reason = chunks[: request.max_tokens], "length"
        return chunks, reason


def _usage(request: JobRequest, chunks: list[str]) -> Usage:
    said = [request.system or "", *(m.text for m in request.messages)]
    return Usage(input_tokens=sum(len(text.split()) for text in said), output_tokens=len("".join(chunks).split()))
