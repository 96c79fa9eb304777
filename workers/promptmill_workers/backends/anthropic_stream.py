"""An answer of Anthropic's Messages API, out of bytes; no I/O.

Protocol: https://platform.claude.com/docs/en/build-with-claude/streaming. Usage comes in ``message_start`` and, as
running totals, in ``message_delta``; the end is a ``stop_reason`` in ``message_delta``, then ``message_stop``. An
``error`` event can come after status 200. Unknown events and deltas (``ping``, thinking, tools) are left out, as the
protocol asks.
"""

from __future__ import annotations

from typing import Any, Final, cast

from promptmill.contract import Usage
from promptmill_workers.backends.base import Item, UsageUpdate
from promptmill_workers.backends.decoding import NOTHING, REFUSED, AnswerDecoder, count, joined
from promptmill_workers.backends.failures import ProviderError, error_object

_REASONS: Final = {
    "end_turn": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "refusal": REFUSED,
}
_USAGE: Final = {
    "input_tokens": "input_tokens",
    "output_tokens": "output_tokens",
    "cache_read_input_tokens": "cache_read_tokens",
    "cache_creation_input_tokens": "cache_write_tokens",
}


class MessagesDecoder(AnswerDecoder):
    """Messages events, or one ``message`` from a server that ignored ``stream``."""

    def __init__(self, *, request_id: str | None = None, secret: str | None = None) -> None:
        super().__init__(request_id=request_id, secret=secret)
        self._counted: dict[str, int] = {}

    def _value(self, value: dict[str, Any], items: list[Item]) -> None:
        kind = value.get("type")
        try:
            if kind == "content_block_delta":
                delta = value["delta"]
                if delta["type"] == "text_delta":
                    self.text(delta["text"], items)
            elif kind == "content_block_start":
                self.text(value["content_block"].get("text") or "", items)
            elif kind == "message_start":
                self._usage(value["message"].get("usage"), items)
            elif kind == "message_delta":
                self._stop(value["delta"])
                self._usage(value.get("usage"), items)
            elif kind == "message_stop":
                self.done = True
            elif kind == "error":
                self.error(error_object(value) or ProviderError())
        except (AttributeError, KeyError, TypeError):
            self.fail("malformed", f"the provider sent a {kind} event of another form")

    def _answer(self, value: dict[str, Any], items: list[Item]) -> None:
        if value.get("type") != "message":
            self.fail("malformed", "the provider's answer is not a message")
            return
        self.text(joined(value.get("content")), items)
        self._stop(value)
        self._usage(value.get("usage"), items)
        self.reason = self.reason or "stop"

    def _stop(self, delta: dict[str, Any]) -> None:
        reason = delta.get("stop_reason")
        if not reason:
            return
        self.reason = _REASONS.get(str(reason), str(reason))
        if self.reason == REFUSED:
            self.refusal = str((delta.get("stop_details") or NOTHING).get("explanation") or "")

    def _usage(self, value: Any, items: list[Item]) -> None:
        if not isinstance(value, dict):
            return
        usage = cast("dict[str, Any]", value)
        # Totals so far; a server may leave out what has not changed.
        self._counted |= {
            ours: count(usage[theirs]) for theirs, ours in _USAGE.items() if usage.get(theirs) is not None
        }
        items.append(UsageUpdate(Usage.model_validate(self._counted)))
