"""Google's Gemini API: `generateContent`, `streamGenerateContent` and `countTokens`.

Protocol: https://ai.google.dev/api/generate-content (request, answer, finish reasons; streams are SSE with CRLF when
the query has `alt=sse`), https://ai.google.dev/gemini-api/docs/troubleshooting (errors).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import Any, ClassVar

from tests.support.simulator.dialect import ApiError, Ask, Dialect, Finish, Usage, dumps, fill, optional

_ids = count(1)
_FINISH = {"stop": "STOP", "length": "MAX_TOKENS", "stop_sequence": "STOP", "refusal": "SAFETY"}
_STATUS = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    409: "ABORTED",
    413: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


class GeminiContent(Dialect):
    """One request to `/v1beta/models/{model}:{method}`."""

    name: ClassVar[str] = "gemini"
    line_end: ClassVar[bytes] = b"\r\n"

    def __init__(self, model: str, *, stream: bool, array: bool = False) -> None:
        self.request_id = f"req{next(_ids):020x}"
        self._model = model
        self._stream = stream
        self._array = array

    def parse(self, body: Mapping[str, Any]) -> Ask:
        contents = optional(body, "contents", list)
        if not contents or not all(isinstance(item, dict) and item.get("parts") for item in contents):
            raise ApiError(400, "* GenerateContentRequest.contents: contents is not specified")
        config = optional(body, "generationConfig", dict, {})
        self.ask = Ask(
            model=self._model,
            stream=self._stream,
            max_tokens=optional(config, "maxOutputTokens", int),
            stop=tuple(optional(config, "stopSequences", list, [])),
            wants_json=config.get("responseMimeType") == "application/json",
        )
        content = {"parts": [{"text": "@text@"}], "role": "model"}
        self.prefix, self.suffix = self._event({"candidates": [{"content": content, "index": 0}]}).split(b'"@text@"')
        system = optional(body, "systemInstruction", dict, {}).get("parts")
        return fill(self.ask, system, [(item.get("role", "user"), item["parts"]) for item in contents])

    def authorised(self, headers: Mapping[str, str], query: Mapping[str, str], key: str) -> bool:
        return key in {headers.get("x-goog-api-key"), query.get("key")}

    def headers(self) -> bytes:
        return b""

    def prelude(self, usage: Usage) -> list[bytes]:
        return []

    def ending(self, finish: Finish) -> list[bytes]:
        return [self._event(self._answer("", finish))]

    def whole(self, text: str, finish: Finish) -> bytes:
        answer = self._envelope(self._answer(text, finish))
        return dumps([answer] if self._array else answer)

    def error(self, error: ApiError) -> bytes:
        return dumps({"error": google_error(error)})

    def error_event(self, message: str | None, done: bool) -> list[bytes]:
        text = message or "The model is overloaded. Please try again later."
        return [b"data: " + self.error(ApiError(503, text)) + b"\r\n\r\n"]

    def unauthorised(self) -> ApiError:
        return wrong_key()

    def context_error(self, message: str | None) -> ApiError:
        return too_long(message)

    def _answer(self, text: str, finish: Finish) -> dict[str, Any]:
        candidate: dict[str, Any] = {"finishReason": finish.raw or _FINISH[finish.reason], "index": 0}
        if finish.reason != "refusal":
            candidate["content"] = {"parts": [{"text": text}], "role": "model"}
        answer: dict[str, Any] = {"candidates": [candidate]}
        if not finish.omit_usage:
            usage = finish.usage
            answer["usageMetadata"] = {
                "promptTokenCount": usage.input_tokens,
                "candidatesTokenCount": usage.output_tokens,
                "cachedContentTokenCount": usage.cache_read_tokens,
                "totalTokenCount": usage.input_tokens + usage.output_tokens + usage.thinking_tokens,
            }
            if usage.thinking_tokens:
                answer["usageMetadata"]["thoughtsTokenCount"] = usage.thinking_tokens
        return answer

    def _envelope(self, answer: dict[str, Any]) -> dict[str, Any]:
        return {**answer, "modelVersion": self._model, "responseId": self.request_id}

    def _event(self, answer: dict[str, Any]) -> bytes:
        return b"data: " + dumps(self._envelope(answer)) + b"\r\n\r\n"


def google_error(error: ApiError) -> dict[str, Any]:
    """Google's error object, with the wait as `RetryInfo` (https://cloud.google.com/apis/design/errors)."""
    body: dict[str, Any] = {
        "code": error.status,
        "message": error.message,
        "status": _STATUS.get(error.status, "UNKNOWN"),
    }
    details: list[dict[str, Any]] = []
    if error.code is not None:
        info = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": error.code}
        details.append({**info, "domain": "googleapis.com"})
    if error.retry_after is not None:
        delay = f"{error.retry_after:g}s"
        details.append({"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay})
    return {**body, "details": details} if details else body


def wrong_key() -> ApiError:
    """What Google answers to a wrong or missing key."""
    return ApiError(400, "API key not valid. Please pass a valid API key.", code="API_KEY_INVALID")


def too_long(message: str | None) -> ApiError:
    """What Google answers to a prompt that does not fit the model."""
    text = "The input token count (1048577) exceeds the maximum number of tokens allowed (1048576)."
    return ApiError(400, message or text)
