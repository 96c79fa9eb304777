"""Anthropic's batch lines, ``{"custom_id", "params"}``, and its result lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, cast

from promptmill.batch.files.format import Fields, FormatName, Parsed, given, json_object, line_id, not_supported
from promptmill.batch.files.records import Input, Record
from promptmill.contract import ErrorInfo, Job, Usage
from promptmill.errors import BadRequest

_NO_EFFECT: Final = frozenset({"metadata", "service_tier"})
_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    "stream": (False,),
    "top_p": (1,),
    "tools": ([],),
    "thinking": ({"type": "disabled"},),
}
_CACHE_CONTROL: Final = frozenset({"cache_control"})
"""Says what the provider shall keep, not what it shall answer."""
_BLOCK_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {"citations": ([], {"enabled": False})}
_REASONS: Final = {"stop": "end_turn", "length": "max_tokens"}
_ERROR_TYPES: Final = {
    "bad_request": "invalid_request_error",
    "context_too_long": "invalid_request_error",
    "too_large": "request_too_large",
    "auth": "authentication_error",
    "auth_expired": "authentication_error",
    "unknown_model": "not_found_error",
    "rate_limited": "rate_limit_error",
    "overloaded": "overloaded_error",
}


class AnthropicLines:
    """Lines of Anthropic's Message Batches API."""

    name: FormatName = "anthropic"
    provider_names = True
    id_key = "custom_id"

    def __init__(self, ignored: frozenset[str] = frozenset()) -> None:
        self._ignored = ignored

    def records(self, source: Input, limit_bytes: int) -> Iterator[Record]:
        """Every line."""
        return source.lines(limit_bytes)

    def parse(self, record: Record) -> Parsed:
        """A line. Raises BadRequest."""
        line = Fields(json_object(record), "")
        custom_id = line_id(line.need("custom_id"), "custom_id")
        params = Fields(line.need("params"), "params", self._ignored)
        line.end()
        fields = given(
            messages=_messages(params.need("messages"), params),
            system=_system(params.take("system"), params),
            model=params.take("model"),
            max_tokens=params.take("max_tokens"),
            temperature=params.take("temperature"),
            stop=params.take("stop_sequences") or None,
        )
        params.drop(_NO_EFFECT)
        params.drop_neutral(_NEUTRAL)
        params.end()
        return Parsed(custom_id, fields)

    def answer(self, line_id: str, job: Job, usage: Usage, cost_usd: float | None) -> dict[str, Any]:
        """A line of the results."""
        del cost_usd
        reason = job.finish_reason or "stop"
        message = {
            "id": f"msg_{job.id}",
            "type": "message",
            "role": "assistant",
            "model": job.model,
            "content": [{"type": "text", "text": job.text or ""}],
            "stop_reason": _REASONS.get(reason, reason),
            "stop_sequence": None,
            "usage": {
                "input_tokens": usage.input_tokens,
                "cache_creation_input_tokens": usage.cache_write_tokens,
                "cache_read_input_tokens": usage.cache_read_tokens,
                "output_tokens": usage.output_tokens,
            },
        }
        return {"custom_id": line_id, "result": {"type": "succeeded", "message": message}}

    def failure(self, line_id: str, error: ErrorInfo, job: Job | None) -> dict[str, Any]:
        """A line of the results for one that has no answer."""
        del job
        if error.code == "cancelled":
            result: dict[str, Any] = {"type": "canceled"}
        elif error.code == "expired":
            result = {"type": "expired"}
        else:
            about = {"type": _ERROR_TYPES.get(error.code, "api_error"), "message": f"{error.code}: {error.message}"}
            result = {"type": "errored", "error": {"type": "error", "error": about}}
        return {"custom_id": line_id, "result": result}


def _system(value: Any, params: Fields) -> str | None:
    if value is None or isinstance(value, str):
        return value or None
    place = params.name("system")
    blocks = _blocks(value, place)
    if any(block["type"] != "text" for block in blocks):
        raise not_supported("a picture", place)
    return "\n\n".join(block["text"] for block in blocks) or None


def _messages(value: Any, params: Fields) -> list[dict[str, Any]]:
    place = params.name("messages")
    if not isinstance(value, list) or not value:
        raise BadRequest(f"{place}: a list with a message is needed", field=place)
    messages: list[dict[str, Any]] = []
    for number, item in enumerate(cast("list[Any]", value)):
        message = Fields(item, f"{place}.{number}", params.ignored)
        role, content = message.need("role"), message.need("content")
        if role not in {"user", "assistant"}:
            raise not_supported(f"the role {str(role)[:40]!r}", message.name("role"))
        if not isinstance(content, str):
            content = _blocks(content, message.name("content"))
        messages.append({"role": role, "content": content})
        message.end()
    return messages


def _blocks(value: Any, place: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise BadRequest(f"{place}: text or a list of blocks is needed", field=place)
    return [_block(item, f"{place}.{number}") for number, item in enumerate(cast("list[Any]", value))]


def _block(item: Any, place: str) -> dict[str, Any]:
    block = Fields(item, place)
    kind = block.need("type")
    if kind == "text":
        made: dict[str, Any] = {"type": "text", "text": block.need("text")}
    elif kind == "image":
        made = {"type": "image", **_source(Fields(block.need("source"), f"{place}.source"))}
    else:
        raise not_supported(f"a block of type {str(kind)[:40]!r}", place)
    block.drop(_CACHE_CONTROL)
    block.drop_neutral(_BLOCK_NEUTRAL)
    block.end()
    return made


def _source(source: Fields) -> dict[str, Any]:
    kind = source.need("type")
    if kind == "base64":
        made = {"media_type": source.need("media_type"), "data": source.need("data")}
    elif kind == "url":
        made = {"url": source.need("url")}
    else:
        raise not_supported(f"a picture by {str(kind)[:40]!r}", source.name("type"))
    source.end()
    return made
