"""What ``batch run`` and ``batch submit`` are told."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, TypedDict, get_args, get_type_hints

import typer
from pydantic import JsonValue

from promptmill.batch.files.format import FormatName
from promptmill.batch.files.formats import FORMATS, FormatOptions
from promptmill.batch.models import BatchHead
from promptmill.errors import BadRequest

from .attachments import read_json

InputArgument = Annotated[
    str, typer.Argument(metavar="FILE", help="The lines: a file, or `-` for standard input.", show_default=False)
]


class LineOptions(TypedDict):
    """The options of both commands."""

    failures: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where failed lines go (default: RESULTS.failed.jsonl).")
    ]
    form: Annotated[
        str | None, typer.Option("--format", metavar="NAME", help=f"{', '.join(FORMATS)} (default: seen by the lines).")
    ]
    template: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="The prompt of a row: 'Summarise: {column}'. A text line is {text}."),
    ]
    id_column: Annotated[str | None, typer.Option(metavar="NAME", help="The column with the rows' ids.")]
    ignore_field: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A field of the lines to drop; may be given again.")
    ]
    model: Annotated[str | None, typer.Option("--model", "-m", help="A model, whatever the lines say.")]
    role: Annotated[str | None, typer.Option(help="A role, whatever the lines say.")]
    slot: Annotated[str | None, typer.Option(help="A slot of the role.")]
    system: Annotated[str | None, typer.Option(help="The system prompt, whatever the lines say.")]
    max_tokens: Annotated[int | None, typer.Option(min=1, help="The most tokens of an answer, likewise.")]
    temperature: Annotated[float | None, typer.Option(help="The sampling temperature, likewise.")]
    json_schema: Annotated[Path | None, typer.Option(help="A file with the JSON Schema of the answers, likewise.")]
    user: Annotated[str, typer.Option(help="Whose batch it is.")]
    name: Annotated[str | None, typer.Option(help="What to call it; shown by `batch list`.")]
    dedupe: Annotated[bool, typer.Option("--dedupe", help="Run equal lines once.")]
    cache: Annotated[bool, typer.Option("--cache", help="Take answers that were given to equal requests before.")]
    sample: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Only N lines, spread over the file, into files of their own."),
    ]
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out lines that are wrong; they are reported.")]
    max_cost: Annotated[
        float | None, typer.Option(min=0, metavar="USD", help="Refuse what must cost more; cancel what does.")
    ]
    expires: Annotated[
        float | None, typer.Option(min=1, metavar="SECONDS", help="Lines that have not ended by then expire.")
    ]
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="In the place of earlier results; an unfinished run of the same goes on."),
    ]


_DEFAULTS: Final[dict[str, Any]] = {"user": "default"}
Command = Callable[..., None]


def with_line_options(command: Command) -> Command:
    """The command with its ``**lines`` written out: typer reads signatures, and two of them would drift apart."""

    @functools.wraps(command)
    def call(*args: Any, **given: Any) -> None:
        command(*args, **given)

    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
    shared = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=_DEFAULTS.get(name, False if get_args(hint)[0] is bool else None),
            annotation=hint,
        )
        for name, hint in get_type_hints(LineOptions, include_extras=True).items()
    ]
    parameters = [*own[:2], *shared, *own[2:]]
    call.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess, reportAttributeAccessIssue]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """What to run, and how. ``request`` are fields that win over those of the lines."""

    input: str
    form: FormatOptions = field(default_factory=FormatOptions)
    request: dict[str, Any] = field(default_factory=dict[str, Any])
    user: str = "default"
    name: str | None = None
    dedupe: bool = False
    sample: int | None = None
    skip_bad: bool = False
    max_cost_usd: float | None = None
    expires_s: float | None = None

    @classmethod
    def of(cls, file: str, lines: LineOptions) -> BatchOptions:
        """What was given on the command line. Raises BadRequest."""
        form = lines["form"]
        known: FormatName | None = next((known for known in FORMATS if known == form), None)
        if form is not None and known is None:
            raise BadRequest(f"--format: one of {', '.join(FORMATS)}, not {form!r}", field="format")
        ignored = frozenset(lines["ignore_field"] or ())
        return cls(
            input=file,
            form=FormatOptions(known, lines["template"], lines["id_column"], ignored),
            request=_request_fields(lines),
            user=lines["user"],
            name=lines["name"],
            dedupe=lines["dedupe"],
            sample=lines["sample"],
            skip_bad=lines["skip_bad"],
            max_cost_usd=lines["max_cost"],
            expires_s=lines["expires"],
        )

    @property
    def overrides(self) -> dict[str, Any]:
        """The fields that every request of the batch has."""
        return {**self.request, "user": self.user}

    def deciding(self) -> dict[str, JsonValue]:
        """All that decides what is asked, under the names that the user knows. Two runs that differ in it differ."""
        given: dict[str, JsonValue] = {
            "--format": self.form.name,
            "--template": self.form.template,
            "--id-column": self.form.id_column,
            "--ignore-field": ", ".join(sorted(self.form.ignored)) or None,
            "--user": self.user,
            "--name": self.name,
            "--dedupe": self.dedupe or None,
            "--sample": self.sample,
            "--skip-bad": self.skip_bad or None,
            "--expires": self.expires_s,
        }
        for name, value in self.request.items():
            given["--json-schema" if name == "response_format" else f"--{name.replace('_', '-')}"] = value
        return {name: value for name, value in given.items() if value is not None}

    def head(self, chunk_lines: int, form: str) -> BatchHead:
        """The batch's head. Raises BadRequest."""
        notes: dict[str, JsonValue] = {"format": form, "input": self.input[-200:]}
        return BatchHead(
            user=self.user,
            name=self.name,
            expires_s=self.expires_s,
            max_cost_usd=self.max_cost_usd,
            chunk_lines=chunk_lines,
            options=notes,
        )


def _request_fields(lines: LineOptions) -> dict[str, Any]:
    if lines["slot"] and not lines["role"]:
        raise BadRequest("--slot needs --role", field="slot")
    fields: dict[str, Any] = {
        "system": lines["system"],
        "model": lines["model"],
        "role": lines["role"],
        "slot": lines["slot"],
        "max_tokens": lines["max_tokens"],
        "temperature": lines["temperature"],
        "cache": lines["cache"] or None,
    }
    if lines["json_schema"] is not None:
        schema = read_json(lines["json_schema"], "--json-schema")
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    return {name: value for name, value in fields.items() if value is not None}
