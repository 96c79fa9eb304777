"""Our own lines, plain text, and rows with a template: CSV rows, or JSON objects as rows."""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping
from typing import Any, Final

import orjson

from promptmill.batch.files.format import FormatName, Parsed, json_object, line_id
from promptmill.batch.files.records import Input, Record, parse_row
from promptmill.contract import ErrorInfo, Job, Usage
from promptmill.errors import BadRequest

_OF_THE_BATCH: Final = {
    "user": "a batch belongs to one user: give --user",
    "priority": "jobs of a batch have the priority batch",
    "idempotency_key": "the line's id is its key",
    "cancel_on_disconnect": "a batch runs with or without readers",
}


class Template:
    """Text with ``{column}`` in it; ``{{`` and ``}}`` are braces. Raises BadRequest where it is none."""

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            parsed = list(string.Formatter().parse(text))
        except ValueError as err:
            raise BadRequest(f"--template: {err}", field="template") from None
        for _, column, spec, conversion in parsed:
            if column is not None and (spec or conversion or not column.strip()):
                raise BadRequest(f"--template: {{{column}}}: the name of a column, and no more, is needed")
        self._parts = [(literal, column) for literal, column, _, _ in parsed]
        self.columns = [column for _, column in self._parts if column is not None]
        if not self.columns:
            raise BadRequest("--template names no column: every prompt would be the same", field="template")

    def render(self, row: Mapping[str, str]) -> str:
        """The prompt of a row. Raises BadRequest for a column that it does not have."""
        for column in self.columns:
            if column not in row:
                raise BadRequest(f"{column}: the template's column is not there", field=column)
        return "".join(literal + (row[column] if column is not None else "") for literal, column in self._parts)


class _OwnAnswers:
    """How answers are written where the input is of no provider's form."""

    provider_names = False
    id_key = "id"

    def answer(self, line_id: str, job: Job, usage: Usage, cost_usd: float | None) -> dict[str, Any]:
        """A line of the results."""
        return {
            "id": line_id,
            "text": job.text or "",
            "model": job.model,
            "usage": usage.model_dump(),
            "cost_usd": cost_usd,
            "finish_reason": job.finish_reason,
            "job_id": job.id,
            "attempts": len(job.attempts),
            **({"cached": True} if job.cached else {}),
        }

    def failure(self, line_id: str, error: ErrorInfo, job: Job | None) -> dict[str, Any]:
        """A line that has an error in the place of its text."""
        about = {"code": error.code, "message": error.message, "retryable": error.retryable}
        return {"id": line_id, "error": about, "job_id": job.id if job else None}


class SimpleLines(_OwnAnswers):
    """``{"id", "prompt"}`` or ``{"id", "messages"}``, with other fields of a request; with a template any objects.

    A line without ``id`` (or ``custom_id``) is called by its number in the file.
    """

    name: FormatName = "simple"

    def __init__(
        self, ignored: frozenset[str] = frozenset(), template: Template | None = None, id_column: str | None = None
    ) -> None:
        self._ignored = ignored
        self._template = template
        self._id_columns = (id_column,) if id_column else ("id", "custom_id")

    def records(self, source: Input, limit_bytes: int) -> Iterator[Record]:
        """Every line."""
        return source.lines(limit_bytes)

    def parse(self, record: Record) -> Parsed:
        """A line. Raises BadRequest."""
        data = json_object(record)
        where = next((name for name in self._id_columns if data.get(name) is not None), None)
        own_id = line_id(data[where], where) if where else str(record.number)
        if self._template is not None:
            return Parsed(own_id, {"prompt": self._template.render({k: _text(v) for k, v in data.items()})})
        fields = {k: v for k, v in data.items() if k not in self._id_columns and k not in self._ignored}
        for name in _OF_THE_BATCH.keys() & fields.keys():
            raise BadRequest(f"{name}: {_OF_THE_BATCH[name]}", field=name)
        return Parsed(own_id, fields)


class TextLines(_OwnAnswers):
    """Each line is a prompt, or what stands for ``{text}`` in a template; its id is its number in the file."""

    name: FormatName = "text"

    def __init__(self, template: Template | None = None) -> None:
        self._template = template
        if template is not None and set(template.columns) != {"text"}:
            unknown = next(column for column in template.columns if column != "text")
            raise BadRequest(f"--template: {{{unknown}}} is not there; a line is {{text}}", field="template")

    def records(self, source: Input, limit_bytes: int) -> Iterator[Record]:
        """Every line."""
        return source.lines(limit_bytes)

    def parse(self, record: Record) -> Parsed:
        """A line. Raises BadRequest."""
        text = record.text()
        return Parsed(str(record.number), {"prompt": self._template.render({"text": text}) if self._template else text})


class CsvRows(_OwnAnswers):
    """The rows of a CSV with a heading, each a prompt by the template, or by its column ``prompt``.

    A row's id stands in ``id_column``, else in the column ``id`` or ``custom_id``, else it is the row's line number.
    """

    name: FormatName = "csv"

    def __init__(
        self, columns: list[str], delimiter: str, template: Template | None = None, id_column: str | None = None
    ) -> None:
        self._columns = columns
        self._delimiter = delimiter
        self._template = template or Template("{prompt}")
        names = ", ".join(columns)
        if len(set(columns)) != len(columns):
            raise BadRequest(f"two columns have the same name: {names}", field="input")
        if template is None and "prompt" not in columns:
            raise BadRequest(f"give a --template over the columns {names}", field="template")
        for column in self._template.columns:
            if column not in columns:
                raise BadRequest(f"--template: there is no column {column!r}; there are {names}", field="template")
        if id_column is not None and id_column not in columns:
            raise BadRequest(f"--id-column: there is no column {id_column!r}; there are {names}", field="id_column")
        self._id_column = id_column or next((name for name in ("id", "custom_id") if name in columns), None)

    def records(self, source: Input, limit_bytes: int) -> Iterator[Record]:
        """Every row but the heading."""
        rows = source.rows(limit_bytes, self._delimiter)
        next(rows, None)
        return rows

    def parse(self, record: Record) -> Parsed:
        """A row. Raises BadRequest."""
        text = record.text() if record.row is None or record.problem else ""
        fields = record.row if record.row is not None else parse_row(text, self._delimiter)
        if len(fields) != len(self._columns):
            raise BadRequest(f"the row has {len(fields)} fields, the heading has {len(self._columns)}")
        row = dict(zip(self._columns, fields, strict=True))
        own_id = line_id(row[self._id_column], self._id_column) if self._id_column else str(record.number)
        return Parsed(own_id, {"prompt": self._template.render(row)})


def _text(value: Any) -> str:
    return value if isinstance(value, str) else orjson.dumps(value).decode()
