"""OpenAI's chat completions, as OpenAI-compatible servers and Open WebUI speak them.

Protocol: https://platform.openai.com/docs/api-reference/chat/create (request and answer),
https://platform.openai.com/docs/api-reference/chat-streaming (chunks; with `stream_options.include_usage` every chunk
has `"usage": null` and one more chunk with `"choices": []` precedes `[DONE]`),
https://platform.openai.com/docs/guides/error-codes (errors),
https://docs.openwebui.com/reference/api-endpoints (`/api/chat/completions`, `/api/models`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import count
from typing import Any, ClassVar

from tests.support.simulator.dialect import ApiError, Ask, Dialect, Finish, Usage, dumps, fill, optional

_ids = count(1)
_FINISH = {"stop": "stop", "length": "length", "stop_sequence": "stop", "refusal": "content_filter"}
_TYPES = {429: "requests", 500: "server_error", 503: "server_error", 504: "server_error", 529: "server_error"}
_CODES = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}
_ROLES = {"system", "developer", "user", "assistant", "tool", "function"}


class OpenAIChat(Dialect):
    """One request to `/v1/chat/completions` or `/api/chat/completions`."""

    name: ClassVar[str] = "openai"

    def __init__(self) -> None:
        self.request_id = f"req_{next(_ids):024x}"
        self._id = f"chatcmpl-{next(_ids):024x}"
        self._created = int(time.time())

    def parse(self, body: Mapping[str, Any]) -> Ask:
        model = optional(body, "model", str)
        if not model:
            raise ApiError(400, "you must provide a model parameter")
        messages = optional(body, "messages", list)
        if not messages:
            raise ApiError(400, "[] is too short - 'messages'", param="messages")
        for index, message in enumerate(messages):
            if not isinstance(message, dict) or message.get("role") not in _ROLES:
                raise ApiError(400, f"Invalid value for 'messages[{index}].role'.", param=f"messages[{index}].role")
            _check_images(message.get("content"), index)
        stop = body.get("stop") or ()
        form = _form(optional(body, "response_format", dict, {}))
        options = optional(body, "stream_options", dict, {})
        stream = optional(body, "stream", bool, False)
        if options and not stream:
            raise ApiError(400, "The 'stream_options' parameter is only allowed when 'stream' is enabled.")
        self.ask = Ask(
            model=model,
            stream=stream,
            max_tokens=optional(body, "max_completion_tokens", int, optional(body, "max_tokens", int)),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            wants_json=form != "text",
            include_usage=bool(options.get("include_usage")),
        )
        delta = self._chunk([{"index": 0, "delta": {"content": "@text@"}, "logprobs": None, "finish_reason": None}])
        self.prefix, self.suffix = delta.split(b'"@text@"')
        return fill(self.ask, "", [(message["role"], message.get("content")) for message in messages])

    def authorised(self, headers: Mapping[str, str], query: Mapping[str, str], key: str) -> bool:
        return headers.get("authorization") == f"Bearer {key}"

    def headers(self) -> bytes:
        return f"x-request-id: {self.request_id}\r\nopenai-version: 2020-10-01\r\n".encode()

    def prelude(self, usage: Usage) -> list[bytes]:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [self._chunk([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}])]

    def ending(self, finish: Finish) -> list[bytes]:
        reason = finish.raw or _FINISH[finish.reason]
        events = [self._chunk([{"index": 0, "delta": {}, "logprobs": None, "finish_reason": reason}])]
        if self.ask.include_usage and not finish.omit_usage:
            events.append(self._chunk([], _usage(finish.usage)))
        return [*events, b"data: [DONE]\n\n"]

    def whole(self, text: str, finish: Finish) -> bytes:
        message = {"role": "assistant", "content": text, "refusal": None}
        reason = finish.raw or _FINISH[finish.reason]
        answer: dict[str, Any] = {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created,
            "model": self.ask.model,
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": reason}],
        }
        if not finish.omit_usage:
            answer["usage"] = _usage(finish.usage)
        return dumps(answer)

    def error(self, error: ApiError) -> bytes:
        return dumps(
            {
                "error": {
                    "message": error.message,
                    "type": _TYPES.get(error.status, "invalid_request_error"),
                    "param": error.param,
                    "code": error.code or _CODES.get(error.status),
                }
            }
        )

    def error_event(self, message: str | None, done: bool) -> list[bytes]:
        text = message or "The server had an error while processing your request. Sorry about that!"
        event = b"data: " + self.error(ApiError(500, text)) + b"\n\n"
        return [event, b"data: [DONE]\n\n"] if done else [event]

    def unauthorised(self) -> ApiError:
        return ApiError(401, "Incorrect API key provided.", code="invalid_api_key")

    def context_error(self, message: str | None) -> ApiError:
        text = message or (
            "This model's maximum context length is 8192 tokens. However, your messages resulted in 9999 tokens. "
            "Please reduce the length of the messages."
        )
        return ApiError(400, text, param="messages", code="context_length_exceeded")

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        chunk: dict[str, Any] = {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self.ask.model,
            "choices": choices,
        }
        if self.ask.include_usage:
            chunk["usage"] = usage
        return b"data: " + dumps(chunk) + b"\n\n"


def models(names: list[str]) -> bytes:
    """The body of `GET /v1/models` (https://platform.openai.com/docs/api-reference/models/list)."""
    entries = [{"id": name, "object": "model", "created": 1_700_000_000, "owned_by": "simulator"} for name in names]
    return dumps({"object": "list", "data": entries})


def _form(given: Mapping[str, Any]) -> str:
    form = given.get("type", "text")
    if form not in {"text", "json_object", "json_schema"}:
        raise ApiError(400, f"Invalid value: {form!r}.", param="response_format.type")
    if form == "json_schema":
        described = optional(given, "json_schema", dict, {})
        for name, kind in (("name", str), ("schema", dict)):
            if not isinstance(described.get(name), kind):
                where = f"response_format.json_schema.{name}"
                raise ApiError(400, f"Missing required parameter: '{where}'.", param=where)
    return form


def _check_images(content: Any, index: int) -> None:
    for part in content if isinstance(content, list) else ():
        if not isinstance(part, dict):
            raise ApiError(400, "content parts are objects", param=f"messages[{index}].content")
        if part.get("type") == "image_url":
            image = part.get("image_url")
            url = image.get("url") if isinstance(image, dict) else None
            if not isinstance(url, str) or not url.startswith(("data:image/", "http://", "https://")):
                raise ApiError(400, "Invalid image URL.", param=f"messages[{index}].content", code="invalid_image_url")


def _usage(usage: Usage) -> dict[str, Any]:
    output_tokens = usage.output_tokens + usage.thinking_tokens
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": usage.input_tokens + output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cache_read_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.thinking_tokens},
    }
