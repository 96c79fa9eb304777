"""What the providers' protocols share: the seam that the server drives, and JSON as bytes."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import orjson

_SURROGATE = re.compile("[\ud800-\udfff]")


def dumps(value: Any) -> bytes:
    """Compact JSON in UTF-8; surrogates escaped, all else that JSON allows unescaped left so."""
    try:
        return orjson.dumps(value)
    except TypeError:  # orjson refuses surrogates
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        return _SURROGATE.sub(lambda match: f"\\u{ord(match.group()):04x}", text).encode()


class ApiError(Exception):
    """A documented error answer. `param` and `code` are OpenAI's fields; the others ignore them.

    `retry_after` is the wait in seconds that the provider asks for, in its own way.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after


@dataclass(slots=True)
class Ask:
    """What a request asks, whichever protocol it came in."""

    model: str
    stream: bool
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    user_text: str = ""
    characters: int = 0
    images: int = 0
    wants_json: bool = False
    include_usage: bool = False


@dataclass(slots=True)
class Usage:
    """Token counts as the provider reports them."""

    input_tokens: int
    output_tokens: int
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    thinking_tokens: int = 0
    """Output beside `output_tokens`; each provider counts it in its own place."""


@dataclass(slots=True)
class Finish:
    """Why a text ended: `stop`, `length`, `stop_sequence`, `refusal`, or `raw` in the provider's own words."""

    reason: str
    sequence: str | None = None
    raw: str | None = None
    usage: Usage = field(default_factory=lambda: Usage(0, 0))
    omit_usage: bool = False


class Dialect(ABC):
    """One request in one provider's protocol. The server calls `parse` first.

    The body of a stream is `prelude`, one `prefix + <JSON string> + suffix` for each delta, `ending`.
    """

    name: ClassVar[str]
    line_end: ClassVar[bytes] = b"\n"
    prefix: bytes
    suffix: bytes
    ask: Ask
    request_id: str

    @abstractmethod
    def parse(self, body: Mapping[str, Any]) -> Ask:
        """Check the request against the protocol.

        Raises:
            ApiError: what the provider would answer.
        """

    @abstractmethod
    def authorised(self, headers: Mapping[str, str], query: Mapping[str, str], key: str) -> bool:
        """Whether the request carries `key` in one of the places that the provider reads."""

    @abstractmethod
    def headers(self) -> bytes:
        """Response header lines of the provider's own, each with its CRLF."""

    def error_headers(self, error: ApiError) -> bytes:
        """Further header lines of an error status."""
        return b"" if error.retry_after is None else b"retry-after: %g\r\n" % error.retry_after

    @abstractmethod
    def prelude(self, usage: Usage) -> list[bytes]:
        """The SSE events before the first delta."""

    @abstractmethod
    def ending(self, finish: Finish) -> list[bytes]:
        """The SSE events after the last delta of a stream that ends well."""

    @abstractmethod
    def whole(self, text: str, finish: Finish) -> bytes:
        """The body of an answer that is not streamed."""

    @abstractmethod
    def error(self, error: ApiError) -> bytes:
        """The body of an error status."""

    @abstractmethod
    def error_event(self, message: str | None, done: bool) -> list[bytes]:
        """The SSE events of an error in mid-stream."""

    @abstractmethod
    def unauthorised(self) -> ApiError:
        """What the provider answers to a wrong or missing key."""

    @abstractmethod
    def context_error(self, message: str | None) -> ApiError:
        """What the provider answers to a prompt that is too long for the model."""

    def malformed(self) -> bytes:
        """An SSE event whose JSON breaks off in the middle."""
        return self.prefix + b'"brok' + self.line_end * 2


def content_text(content: Any) -> tuple[str, int]:
    """The text and the number of images in a message's content (a string, or typed parts)."""
    if isinstance(content, str):
        return content, 0
    if not isinstance(content, list):
        return "", 0
    texts: list[str] = []
    images = 0
    for part in content:
        if isinstance(part, dict):
            if isinstance(part.get("text"), str):
                texts.append(part["text"])
            elif part.get("type") in {"image_url", "image"} or "inlineData" in part or "fileData" in part:
                images += 1
    return "".join(texts), images


def fill(ask: Ask, system: Any, messages: list[tuple[str, Any]]) -> Ask:
    """Complete `ask` with what its system prompt and `(role, content)` messages hold; returns it."""
    ask.characters = len(content_text(system)[0])
    for role, content in messages:
        text, images = content_text(content)
        ask.characters += len(text)
        ask.images += images
        if role == "user":
            ask.user_text = text
    return ask


def optional(body: Mapping[str, Any], name: str, kind: type, default: Any = None) -> Any:
    """`body[name]`, or `default` when it is absent or null.

    Raises:
        ApiError: 400 when it has another type.
    """
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ApiError(400, f"{name}: expected {kind.__name__}, got {type(value).__name__}", param=name)
    return value
