"""OpenAI's batch lines for chat completions: ``{"custom_id", "method", "url", "body"}``, and its output lines."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, cast

from promptmill.batch.files.format import (
    Fields,
    FormatName,
    Parsed,
    given,
    joined_system,
    json_object,
    line_id,
    not_supported,
)
from promptmill.batch.files.records import Input, Record
from promptmill.contract import ErrorInfo, Job, Usage
from promptmill.errors import BadRequest

CHAT: Final = "/v1/chat/completions"
RESPONSES: Final = "/v1/responses"

NO_EFFECT: Final = frozenset(
    {
        "user",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
        "stream_options",
    }
)
"""Fields that say nothing of the answer's text."""
NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    "n": (1,),
    "stream": (False,),
    "top_p": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logprobs": (False,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
}
_MESSAGE_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {"annotations": ([],), "tool_calls": ([],)}
_DATA_URL: Final = re.compile(r"data:(image/[\w.+-]+);base64,", re.ASCII)
_REASONS: Final = {"stop_sequence": "stop"}


class OpenAIChat:
    """Lines of OpenAI's Batch API whose ``url`` is ``/v1/chat/completions``."""

    name: FormatName = "openai"
    provider_names = True
    id_key = "custom_id"

    def __init__(self, ignored: frozenset[str] = frozenset()) -> None:
        self._ignored = ignored

    def records(self, source: Input, limit_bytes: int) -> Iterator[Record]:
        """Every line."""
        return source.lines(limit_bytes)

    def parse(self, record: Record) -> Parsed:
        """A line. Raises BadRequest."""
        custom_id, body = batch_line(record, CHAT, self._ignored)
        system, messages = _messages(body.need("messages"), body)
        fields = given(
            messages=messages,
            system=system,
            model=body.take("model"),
            max_tokens=body.take("max_completion_tokens", "max_tokens"),
            temperature=body.take("temperature"),
            stop=body.take("stop"),
            response_format=text_format(body.take("response_format")),
            metadata=body.take("metadata"),
        )
        finish(body)
        return Parsed(custom_id, fields)

    def answer(self, line_id: str, job: Job, usage: Usage, cost_usd: float | None) -> dict[str, Any]:
        """A line of the output file."""
        del cost_usd
        message = {"role": "assistant", "content": job.text or "", "refusal": None}
        reason = _REASONS.get(job.finish_reason or "stop", job.finish_reason or "stop")
        asked = usage.input_tokens + usage.cache_read_tokens + usage.cache_write_tokens
        body = {
            "id": f"chatcmpl-{job.id}",
            "object": "chat.completion",
            "created": int(job.created_at.timestamp()),
            "model": job.model,
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": reason}],
            "usage": {
                "prompt_tokens": asked,
                "completion_tokens": usage.output_tokens,
                "total_tokens": asked + usage.output_tokens,
                "prompt_tokens_details": {"cached_tokens": usage.cache_read_tokens},
            },
        }
        return output_line(line_id, job, body)

    def failure(self, line_id: str, error: ErrorInfo, job: Job | None) -> dict[str, Any]:
        """A line of the error file."""
        return error_line(line_id, error, job)


def batch_line(record: Record, url: str, ignored: frozenset[str]) -> tuple[str, Fields]:
    """The id and the body of a line for ``url``. Raises BadRequest."""
    line = Fields(json_object(record), "")
    custom_id = line_id(line.need("custom_id"), "custom_id")
    method, asked = line.take("method"), line.take("url")
    if method not in {None, "POST"}:
        raise BadRequest(f"method: POST is needed, not {str(method)[:40]!r}", field="method")
    if asked not in {None, url}:
        raise BadRequest(f"url: {str(asked)[:80]!r}, where the first line has {url}", field="url")
    body = Fields(line.need("body"), "body", ignored)
    line.end()
    return custom_id, body


def finish(body: Fields) -> None:
    """See that nothing is left of a body that would have a meaning."""
    body.drop(NO_EFFECT)
    body.drop_neutral(NEUTRAL)
    body.end()


def text_format(value: Any) -> Any:
    """A response format; None for plain text, which needs none."""
    if not isinstance(value, dict):
        return value
    fields = cast("dict[str, Any]", value)
    return None if fields.get("type") == "text" else fields


def output_line(custom_id: str, job: Job, body: dict[str, Any]) -> dict[str, Any]:
    """The frame of an answer in OpenAI's output file."""
    response = {"status_code": 200, "request_id": job.id, "body": body}
    return {"id": f"batch_req_{job.id}", "custom_id": custom_id, "response": response, "error": None}


def error_line(custom_id: str, error: ErrorInfo, job: Job | None) -> dict[str, Any]:
    """The frame of an error in OpenAI's error file."""
    about = {"code": error.code, "message": error.message}
    request_id = f"batch_req_{job.id}" if job else None
    return {"id": request_id, "custom_id": custom_id, "response": None, "error": about}


def _messages(value: Any, body: Fields) -> tuple[str | None, list[dict[str, Any]]]:
    if not isinstance(value, list) or not value:
        raise BadRequest(f"{body.name('messages')}: a list with a message is needed", field=body.name("messages"))
    system: list[str] = []
    messages: list[dict[str, Any]] = []
    for number, item in enumerate(cast("list[Any]", value)):
        place = f"{body.name('messages')}.{number}"
        message = Fields(item, place, body.ignored)
        role, content = message.need("role"), message.need("content")
        if role in {"system", "developer"} and not messages:
            system.append(only_text(parts(content, f"{place}.content"), place))
        elif role in {"user", "assistant"}:
            messages.append({"role": role, "content": parts(content, f"{place}.content")})
        else:
            where = " behind the first other message" if role in {"system", "developer"} else ""
            raise not_supported(f"the role {str(role)[:40]!r}{where}", f"{place}.role")
        message.drop_neutral(_MESSAGE_NEUTRAL)
        message.end()
    return joined_system(system), messages


def only_text(content: str | list[dict[str, Any]], place: str) -> str:
    """The text of a content that must have nothing else in it."""
    if isinstance(content, str):
        return content
    if any(part["type"] != "text" for part in content):
        raise not_supported("a picture in a system message", place)
    return "".join(part["text"] for part in content)


def parts(content: Any, place: str) -> str | list[dict[str, Any]]:
    """A message's content as ours: text, or parts. Both of OpenAI's interfaces' parts are known."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRequest(f"{place}: text or a list of parts is needed", field=place)
    return [_part(item, f"{place}.{number}") for number, item in enumerate(cast("list[Any]", content))]


def _part(item: Any, place: str) -> dict[str, Any]:
    part = Fields(item, place)
    kind = part.need("type")
    if kind in {"text", "input_text", "output_text"}:
        made: dict[str, Any] = {"type": "text", "text": part.need("text")}
        part.drop_neutral({"annotations": ([],), "logprobs": ([],)})
    elif kind in {"image_url", "input_image"}:
        image = part.need("image_url")
        if isinstance(image, dict):
            inner = Fields(image, f"{place}.image_url")
            image = inner.need("url")
            inner.drop(frozenset({"detail"}))
            inner.end()
        made = _image(image, place)
        part.drop(frozenset({"detail"}))
    else:
        raise not_supported(f"a part of type {str(kind)[:40]!r}", place)
    part.end()
    return made


def _image(url: Any, place: str) -> dict[str, Any]:
    if not isinstance(url, str):
        raise BadRequest(f"{place}.image_url: an address is needed", field=f"{place}.image_url")
    if found := _DATA_URL.match(url):
        return {"type": "image", "media_type": found[1], "data": url[found.end() :]}
    return {"type": "image", "url": url}
