"""The Gemini API's endpoint for OpenAI's chat completions.

Protocol: https://ai.google.dev/gemini-api/docs/openai. What differs from OpenAI's: errors are Google's, as a list of
one; the wait after a 429 stands in the error's details and in no header; no header has a request's id; chunks have no
prelude, and the last one has the reason and the usage; the tokens of thinking are in `total_tokens` only; images are
data addresses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from tests.support.simulator.dialect import ApiError, Ask, Finish, Usage, dumps
from tests.support.simulator.gemini import google_error, too_long, wrong_key
from tests.support.simulator.openai import OpenAIChat

_FINISH = {"stop": "stop", "length": "length", "stop_sequence": "stop", "refusal": "content_filter: SAFETY"}


class GeminiChat(OpenAIChat):
    """One request to `/v1beta/openai/chat/completions`."""

    name: ClassVar[str] = "gemini-chat"

    def parse(self, body: Mapping[str, Any]) -> Ask:
        ask = super().parse(body)
        for message in body["messages"]:
            for part in message["content"] if isinstance(message.get("content"), list) else ():
                if part.get("type") == "image_url" and not part["image_url"]["url"].startswith("data:image/"):
                    raise ApiError(400, "Invalid content part type: image_url without data")
        return ask

    def headers(self) -> bytes:
        return b""

    def error_headers(self, error: ApiError) -> bytes:
        return b""

    def prelude(self, usage: Usage) -> list[bytes]:
        return []

    def ending(self, finish: Finish) -> list[bytes]:
        reason = finish.raw or _FINISH[finish.reason]
        counted = _usage(finish.usage) if self.ask.include_usage and not finish.omit_usage else None
        return [
            self._chunk([{"index": 0, "delta": {"role": "assistant"}, "finish_reason": reason}], counted),
            b"data: [DONE]\n\n",
        ]

    def error(self, error: ApiError) -> bytes:
        return dumps([{"error": google_error(error)}])

    def error_event(self, message: str | None, done: bool) -> list[bytes]:
        text = message or "The model is overloaded. Please try again later."
        return [b"data: " + dumps({"error": google_error(ApiError(503, text))}) + b"\n\n"]

    def unauthorised(self) -> ApiError:
        return wrong_key()

    def context_error(self, message: str | None) -> ApiError:
        return too_long(message)


def _usage(usage: Usage) -> dict[str, Any]:
    counted: dict[str, Any] = {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens + usage.thinking_tokens,
    }
    if usage.cache_read_tokens:
        counted["prompt_tokens_details"] = {"cached_tokens": usage.cache_read_tokens}
    return counted
