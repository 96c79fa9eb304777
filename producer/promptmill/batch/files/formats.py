"""Which format an input has: as the user says, else by its first line."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, get_args

from promptmill.batch.files.anthropic_lines import AnthropicLines
from promptmill.batch.files.format import Fields, Format, FormatName, json_object
from promptmill.batch.files.openai_chat import CHAT, RESPONSES, OpenAIChat
from promptmill.batch.files.openai_responses import OpenAIResponses
from promptmill.batch.files.plain_lines import CsvRows, SimpleLines, Template, TextLines
from promptmill.batch.files.records import Input, Record, delimiter_of
from promptmill.errors import BadRequest

FORMATS: Final[tuple[FormatName, ...]] = get_args(FormatName)
_JSON_SUFFIXES: Final = frozenset({".jsonl", ".ndjson", ".json"})
_CSV_SUFFIXES: Final = frozenset({".csv", ".tsv"})
_LOOK_LINES: Final = 1_000


@dataclass(frozen=True, slots=True)
class FormatOptions:
    """What the user says of an input. ``ignored`` are fields of lines to be dropped."""

    name: FormatName | None = None
    template: str | None = None
    id_column: str | None = None
    ignored: frozenset[str] = frozenset()


def format_of(source: Input, options: FormatOptions, limit_bytes: int) -> Format:
    """The format of an input. Raises BadRequest: the input is empty, or the options do not fit what is there."""
    first = next(source.lines(limit_bytes), None)
    if first is None:
        raise BadRequest(f"{source.name} is empty", field="input")
    template = Template(options.template) if options.template is not None else None
    name = options.name or _guess(source, first, template, limit_bytes)
    if template is not None and name not in {"simple", "text", "csv"}:
        raise BadRequest(f"--template does not go with the format {name}", field="template")
    if options.id_column is not None and name not in {"simple", "csv"}:
        raise BadRequest(f"--id-column does not go with the format {name}", field="id_column")
    if name == "csv":
        return _csv(source, template, options.id_column, limit_bytes)
    if name == "text":
        return TextLines(template)
    return _of_json(name, options, template)


def output_format(name: str) -> Format:
    """A format for writing answers alone. Raises BadRequest for a name that there is not."""
    if name == "openai":
        return OpenAIChat()
    if name == "openai-responses":
        return OpenAIResponses()
    if name == "anthropic":
        return AnthropicLines()
    if name in FORMATS:
        return SimpleLines()
    raise BadRequest(f"--format: one of {', '.join(FORMATS)}", field="format")


def _of_json(name: FormatName, options: FormatOptions, template: Template | None) -> Format:
    if name == "openai":
        return OpenAIChat(options.ignored)
    if name == "openai-responses":
        return OpenAIResponses(options.ignored)
    if name == "anthropic":
        return AnthropicLines(options.ignored)
    return SimpleLines(options.ignored, template, options.id_column)


def _guess(source: Input, first: Record, template: Template | None, limit_bytes: int) -> FormatName:
    try:
        return _of_line(json_object(first))
    except BadRequest as err:
        if err.field == "url":
            raise
        problem = err
    if source.suffix in _CSV_SUFFIXES:
        return "csv"
    if source.suffix in _JSON_SUFFIXES:
        return _guess_behind(source, first, problem, limit_bytes)
    if template is not None and set(template.columns) != {"text"}:
        return "csv"
    return "text"


def _guess_behind(source: Input, first: Record, problem: BadRequest, limit_bytes: int) -> FormatName:
    """A broken first line is told among the others, if there are others."""
    for record in islice(source.lines(limit_bytes), _LOOK_LINES):
        try:
            line = json_object(record)
        except BadRequest:
            continue
        return _of_line(line)
    advice = "; one object a line is needed, not an array" if first.raw.startswith(b"[") else ""
    raise BadRequest(f"{source.name}, line {first.number}: {problem.message}{advice}", field="input")


def _of_line(line: dict[str, Any]) -> FormatName:
    if {"params", "custom_id"} <= line.keys():
        return "anthropic"
    if "custom_id" in line and line.keys() & {"body", "url", "method"}:
        return _openai(line)
    return "simple"


def _openai(line: dict[str, Any]) -> FormatName:
    url = Fields(line, "").take("url")
    if url in {None, CHAT}:
        return "openai"
    if url == RESPONSES:
        return "openai-responses"
    known = f"{CHAT} and {RESPONSES} are known"
    raise BadRequest(f"line 1: url: {str(url)[:80]!r} is not supported; {known}", field="url")


def _csv(source: Input, template: Template | None, id_column: str | None, limit_bytes: int) -> CsvRows:
    first = next(source.lines(limit_bytes))
    delimiter = delimiter_of(first.text())
    heading = next(source.rows(limit_bytes, delimiter))
    if heading.row is None or heading.problem is not None:
        raise BadRequest(f"{source.name}, line {heading.number}: {heading.problem}", field="input")
    return CsvRows([name.strip() for name in heading.row], delimiter, template, id_column)
