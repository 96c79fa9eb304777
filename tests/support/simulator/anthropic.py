"""Anthropic's Messages API.

Protocol: https://platform.claude.com/docs/en/api/messages (request and answer),
https://platform.claude.com/docs/en/build-with-claude/streaming (event order; `message_delta` has cumulative usage; an
`error` event can come after a 200), https://platform.claude.com/docs/en/api/errors (types, `request-id`),
https://platform.claude.com/docs/en/api/messages-count-tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import Any, ClassVar

from tests.support.simulator.dialect import ApiError, Ask, Dialect, Finish, Usage, dumps, fill, optional

_ids = count(1)
_STOP = {"stop": "end_turn", "length": "max_tokens", "stop_sequence": "stop_sequence", "refusal": "refusal"}
_MEDIA_TYPES = ("image/jpeg", "image/png", "image/gif", "image/webp")
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def _event(name: str, data: dict[str, Any]) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + dumps({"type": name, **data}) + b"\n\n"


class AnthropicMessages(Dialect):
    """One request to `/v1/messages` or `/v1/messages/count_tokens`."""

    name: ClassVar[str] = "anthropic"
    prefix = (
        b"event: content_block_delta\n"
        b'data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":'
    )
    suffix = b"}}\n\n"

    def __init__(self, *, counting: bool = False) -> None:
        self.request_id = f"req_{next(_ids):024x}"
        self._id = f"msg_{next(_ids):024x}"
        self._counting = counting

    def parse(self, body: Mapping[str, Any]) -> Ask:
        model = optional(body, "model", str)
        if not model:
            raise ApiError(400, "model: Field required")
        max_tokens = optional(body, "max_tokens", int)
        if not self._counting and max_tokens is None:
            raise ApiError(400, "max_tokens: Field required")
        if max_tokens is not None and max_tokens < 1:
            raise ApiError(400, "max_tokens: Input should be greater than or equal to 1")
        messages = optional(body, "messages", list)
        if not messages:
            raise ApiError(400, "messages: at least one message is required")
        for index, message in enumerate(messages):
            _check_message(message, index)
        self.ask = Ask(
            model=model,
            stream=optional(body, "stream", bool, False),
            max_tokens=max_tokens,
            stop=tuple(optional(body, "stop_sequences", list, [])),
            wants_json=_wants_json(optional(body, "output_config", dict, {}).get("format")),
        )
        return fill(self.ask, body.get("system"), [(message["role"], message["content"]) for message in messages])

    def authorised(self, headers: Mapping[str, str], query: Mapping[str, str], key: str) -> bool:
        return headers.get("x-api-key") == key or headers.get("authorization") == f"Bearer {key}"

    def headers(self) -> bytes:
        return f"request-id: {self.request_id}\r\n".encode()

    def prelude(self, usage: Usage) -> list[bytes]:
        message = self._message([], None, None, Usage(usage.input_tokens, 1, *_cache(usage)))
        block = {"index": 0, "content_block": {"type": "text", "text": ""}}
        return [_event("message_start", {"message": message}), _event("content_block_start", block), _event("ping", {})]

    def ending(self, finish: Finish) -> list[bytes]:
        delta: dict[str, Any] = {"stop_reason": finish.raw or _STOP[finish.reason], "stop_sequence": finish.sequence}
        if finish.reason == "refusal":
            delta["stop_details"] = _refusal()
        return [
            _event("content_block_stop", {"index": 0}),
            _event("message_delta", {"delta": delta, "usage": _usage(finish.usage)}),
            _event("message_stop", {}),
        ]

    def whole(self, text: str, finish: Finish) -> bytes:
        content = [{"type": "text", "text": text}] if text else []
        message = self._message(content, finish.raw or _STOP[finish.reason], finish.sequence, finish.usage)
        if finish.reason == "refusal":
            message["stop_details"] = _refusal()
        return dumps(message)

    def error(self, error: ApiError) -> bytes:
        kind = _TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
        return dumps(
            {"type": "error", "error": {"type": kind, "message": error.message}, "request_id": self.request_id}
        )

    def error_event(self, message: str | None, done: bool) -> list[bytes]:
        return [b"event: error\ndata: " + self.error(ApiError(529, message or "Overloaded")) + b"\n\n"]

    def unauthorised(self) -> ApiError:
        return ApiError(401, "invalid x-api-key")

    def context_error(self, message: str | None) -> ApiError:
        return ApiError(400, message or "prompt is too long: 200251 tokens > 200000 maximum")

    def _message(
        self, content: list[dict[str, Any]], stop_reason: str | None, sequence: str | None, usage: Usage
    ) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self.ask.model,
            "content": content,
            "stop_reason": stop_reason,
            "stop_sequence": sequence,
            "usage": _usage(usage),
        }


def _wants_json(form: Any) -> bool:
    """Protocol: https://platform.claude.com/docs/en/build-with-claude/structured-outputs."""
    if form is None:
        return False
    if not isinstance(form, dict) or form.get("type") != "json_schema" or not isinstance(form.get("schema"), dict):
        raise ApiError(400, "output_config.format: Input should be json_schema with a schema")
    return True


def _check_message(message: Any, index: int) -> None:
    if not isinstance(message, dict) or message.get("role") not in {"user", "assistant"}:
        raise ApiError(400, f"messages.{index}.role: Input should be 'user' or 'assistant'")
    content = message.get("content")
    if not isinstance(content, str | list) or not content:
        raise ApiError(400, f"messages.{index}.content: Input should be a non-empty string or list")
    for position, block in enumerate(content if isinstance(content, list) else ()):
        where = f"messages.{index}.content.{position}"
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            raise ApiError(400, f"{where}.type: Field required")
        source = block.get("source")
        kind = source.get("type") if isinstance(source, dict) else None
        if block["type"] == "image" and kind not in {"base64", "url", "file"}:
            raise ApiError(400, f"{where}.image.source: Input should be base64, url or file")
        if kind == "base64" and source.get("media_type") not in _MEDIA_TYPES:
            raise ApiError(400, f"{where}.image.source.base64.media_type: Input should be one of {_MEDIA_TYPES}")


def _cache(usage: Usage) -> tuple[int, int]:
    return usage.cache_read_tokens, usage.cache_write_tokens


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.input_tokens,
        "cache_creation_input_tokens": usage.cache_write_tokens,
        "cache_read_input_tokens": usage.cache_read_tokens,
        "output_tokens": usage.output_tokens + usage.thinking_tokens,
    }


def _refusal() -> dict[str, Any]:
    return {"type": "refusal", "category": None, "explanation": None}
