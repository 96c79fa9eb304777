"""A guess where the provider counted nothing."""

from __future__ import annotations

from math import ceil
from typing import Final

from promptmill.contract import JobRequest, Usage

BYTES_PER_TOKEN: Final = 4.0
"""A common rule of thumb for English; only ever used where nobody counted."""
_LEARNT_ENOUGH: Final = 50
_FORGET_BEYOND: Final = 100_000


class TextSizes:
    """How many bytes of text make a token of a model's output, learnt from answers whose tokens were counted."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[float, float]] = {}

    def learn(self, model: str, tokens: int, text_bytes: int) -> None:
        """Take an answer's count and size into account. The newest 100,000 tokens or so decide."""
        if tokens <= 0 or text_bytes <= 0:
            return
        for name in (model, ""):
            old_tokens, old_bytes = self._seen.get(name, (0.0, 0.0))
            part = 0.5 if old_tokens > _FORGET_BEYOND else 1.0
            self._seen[name] = (old_tokens * part + tokens, old_bytes * part + text_bytes)

    def of(self, model: str) -> float:
        """Bytes a token: of this model, else of all, else the rule of thumb."""
        for name in (model, ""):
            tokens, size = self._seen.get(name, (0.0, 0.0))
            if tokens >= _LEARNT_ENOUGH:
                return size / tokens
        return BYTES_PER_TOKEN


SIZES: Final = TextSizes()
"""What this process has seen. Only estimates depend on it."""


def settled_usage(
    request: JobRequest,
    counted: Usage | None,
    text_bytes: int,
    *,
    whole: bool,
    model: str = "",
    sizes: TextSizes = SIZES,
) -> Usage | None:
    """What an attempt used, from what its provider counted and from the text that came; None where there is neither.

    Of an answer that is not ``whole`` a provider may have counted the beginning only: Anthropic tells the input and the
    first token of the output at the start, all of it at the end. What came says more then, at the size that a token of
    the ``model`` had in whole answers.
    """
    if whole and counted is not None:
        sizes.learn(model, counted.output_tokens, text_bytes)
    if counted is not None and (whole or not text_bytes):
        return counted
    if not text_bytes:
        return None
    guess = estimated_usage(request, text_bytes, sizes.of(model))
    if counted is None:
        return guess
    if counted.output_tokens >= guess.output_tokens:
        return counted
    return counted.model_copy(update={"output_tokens": guess.output_tokens, "estimated": True})


def estimated_usage(request: JobRequest, text_bytes: int, bytes_per_token: float = BYTES_PER_TOKEN) -> Usage:
    """What an answer of ``text_bytes`` to ``request`` may have used, marked as estimated."""
    asked = len((request.system or "").encode()) + sum(len(m.text.encode()) for m in request.messages)
    return Usage(
        input_tokens=ceil(asked / BYTES_PER_TOKEN), output_tokens=ceil(text_bytes / bytes_per_token), estimated=True
    )
