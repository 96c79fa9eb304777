"""An answer of OpenAI's chat completions, out of bytes; no I/O.

Protocol: https://platform.openai.com/docs/api-reference/chat-streaming. Usage comes in a last chunk with
``choices: []``; the end is a ``finish_reason``, then ``[DONE]``.
"""

from __future__ import annotations

from typing import Any, Final, cast

from promptmill.contract import Usage
from promptmill_workers.backends.base import Item, UsageUpdate
from promptmill_workers.backends.decoding import NOTHING, REFUSED, AnswerDecoder, count, joined
from promptmill_workers.backends.failures import error_object

_FILTERED: Final = "content_filter"
"""The reason of an answer that a filter ended; Google appends its own word: ``content_filter: SAFETY``."""
_REASONS: Final = {
    "max_tokens": "length",
    "end_turn": "stop",
    "eos_token": "stop",
    "eos": "stop",
}


class ChatDecoder(AnswerDecoder):
    """``chat.completion.chunk`` events, or one ``chat.completion`` from a server that ignored ``stream``.

    ``thinking_in_total`` says that ``total_tokens`` alone counts the tokens of the model's thinking (Google's).
    """

    def __init__(
        self, *, request_id: str | None = None, secret: str | None = None, thinking_in_total: bool = False
    ) -> None:
        super().__init__(request_id=request_id, secret=secret)
        self._thinking_in_total = thinking_in_total

    def _is_end(self, data: bytes) -> bool:
        return data == b"[DONE]"

    def _value(self, value: dict[str, Any], items: list[Item]) -> None:
        choices = value.get("choices")
        if choices and not value.get("error"):
            self._choice(choices, "delta", items)
        elif error := error_object(value):
            self.error(error)
            return
        if usage := value.get("usage"):
            self._usage(usage, items)
        if self.request_id is None and isinstance(value.get("id"), str):
            self.request_id = value["id"]

    def _answer(self, value: dict[str, Any], items: list[Item]) -> None:
        if not value.get("choices"):
            self.fail("malformed", "the provider's answer has no choices")
            return
        if self.request_id is None and isinstance(value.get("id"), str):
            self.request_id = value["id"]
        self._choice(value["choices"], "message", items)
        self._usage(value.get("usage"), items)
        # Unlike a stream, a JSON object that parses was not cut.
        self.reason = self.reason or "stop"

    def _choice(self, choices: Any, part: str, items: list[Item]) -> None:
        try:
            choice = choices[0]
            message: Any = choice.get(part) or NOTHING
            text = message.get("content")
            reason = choice.get("finish_reason")
            refusal = message.get("refusal")
        except (AttributeError, IndexError, KeyError, TypeError):
            self.fail("malformed", "the provider sent a choice of another form")
            return
        if text:
            self.text(text if isinstance(text, str) else joined(text), items)
        if refusal:
            self.refusal += str(refusal)
        if reason:
            reason = str(reason)
            self.reason = REFUSED if reason.startswith(_FILTERED) else _REASONS.get(reason, reason)

    def _usage(self, value: Any, items: list[Item]) -> None:
        if not isinstance(value, dict):
            return
        usage = cast("dict[str, Any]", value)
        details: Any = usage.get("prompt_tokens_details")
        cached = count(details.get("cached_tokens")) if isinstance(details, dict) else 0  # pyright: ignore[reportUnknownMemberType]
        asked, said = count(usage.get("prompt_tokens")), count(usage.get("completion_tokens"))
        if self._thinking_in_total:
            said = max(said, count(usage.get("total_tokens")) - asked)
        counted = Usage(
            # OpenAI counts cached tokens among the prompt's; ours are apart, so that each is priced once.
            input_tokens=max(asked - cached, 0),
            output_tokens=said,
            cache_read_tokens=cached,
        )
        items.append(UsageUpdate(counted))
