"""OpenAI's batch lines for ``/v1/responses``, and its output lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, cast

from promptmill.batch.files.format import Fields, FormatName, Parsed, given, joined_system, not_supported
from promptmill.batch.files.openai_chat import (
    RESPONSES,
    batch_line,
    error_line,
    finish,
    only_text,
    output_line,
    parts,
    text_format,
)
from promptmill.batch.files.records import Input, Record
from promptmill.contract import ErrorInfo, Job, Usage
from promptmill.errors import BadRequest

_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    "truncation": ("disabled",),
    "background": (False,),
    "include": ([],),
}


class OpenAIResponses:
    """Lines of OpenAI's Batch API whose ``url`` is ``/v1/responses``."""

    name: FormatName = "openai-responses"
    provider_names = True
    id_key = "custom_id"

    def __init__(self, ignored: frozenset[str] = frozenset()) -> None:
        self._ignored = ignored

    def records(self, source: Input, limit_bytes: int) -> Iterator[Record]:
        """Every line."""
        return source.lines(limit_bytes)

    def parse(self, record: Record) -> Parsed:
        """A line. Raises BadRequest."""
        custom_id, body = batch_line(record, RESPONSES, self._ignored)
        instructions = body.take("instructions")
        system, messages = _input(body.need("input"), body)
        fields = given(
            messages=messages,
            system=joined_system([*([instructions] if instructions else []), *system]),
            model=body.take("model"),
            max_tokens=body.take("max_output_tokens"),
            temperature=body.take("temperature"),
            response_format=_format(body.take("text"), body),
            metadata=body.take("metadata"),
        )
        body.drop_neutral(_NEUTRAL)
        finish(body)
        return Parsed(custom_id, fields)

    def answer(self, line_id: str, job: Job, usage: Usage, cost_usd: float | None) -> dict[str, Any]:
        """A line of the output file."""
        del cost_usd
        cut = job.finish_reason == "length"
        asked = usage.input_tokens + usage.cache_read_tokens + usage.cache_write_tokens
        text: dict[str, Any] = {"type": "output_text", "text": job.text or "", "annotations": []}
        status = "incomplete" if cut else "completed"
        message = {"type": "message", "id": f"msg_{job.id}", "status": status, "role": "assistant", "content": [text]}
        body: dict[str, Any] = {
            "id": f"resp_{job.id}",
            "object": "response",
            "created_at": int(job.created_at.timestamp()),
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "error": None,
            "model": job.model,
            "output": [message],
            "usage": {
                "input_tokens": asked,
                "input_tokens_details": {"cached_tokens": usage.cache_read_tokens},
                "output_tokens": usage.output_tokens,
                "total_tokens": asked + usage.output_tokens,
            },
        }
        return output_line(line_id, job, body)

    def failure(self, line_id: str, error: ErrorInfo, job: Job | None) -> dict[str, Any]:
        """A line of the error file."""
        return error_line(line_id, error, job)


def _input(value: Any, body: Fields) -> tuple[list[str], list[dict[str, Any]]]:
    if isinstance(value, str):
        return [], [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise BadRequest(f"{body.name('input')}: text or a list with a message is needed", field=body.name("input"))
    system: list[str] = []
    messages: list[dict[str, Any]] = []
    for number, item in enumerate(cast("list[Any]", value)):
        place = f"{body.name('input')}.{number}"
        message = Fields(item, place, body.ignored)
        if message.take("type") not in {None, "message"}:
            raise not_supported("an item that is no message", place)
        role, content = message.need("role"), parts(message.need("content"), f"{place}.content")
        if role in {"system", "developer"} and not messages:
            system.append(only_text(content, place))
        elif role in {"user", "assistant"}:
            messages.append({"role": role, "content": content})
        else:
            raise not_supported(f"the role {str(role)[:40]!r} at this place", f"{place}.role")
        message.drop(frozenset({"id", "status"}))
        message.end()
    return system, messages


def _format(value: Any, body: Fields) -> Any:
    if value is None:
        return None
    text = Fields(value, body.name("text"), body.ignored)
    wanted = text_format(text.take("format"))
    text.drop_neutral({"verbosity": ("medium",)})
    text.end()
    if not isinstance(wanted, dict):
        return wanted
    fields = cast("dict[str, Any]", wanted)
    if fields.get("type") != "json_schema":
        return fields
    # In this interface name and schema stand beside the type; the request's form has them one level deeper.
    return {"type": "json_schema", "json_schema": {k: v for k, v in fields.items() if k != "type" and v is not None}}
