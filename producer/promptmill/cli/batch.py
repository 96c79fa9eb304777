"""``promptmill batch``: thousands of lines of a file as one batch, and its answers in another file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Unpack

import typer

from promptmill.errors import BadRequest

from .batch_dry import dry_run
from .batch_look import cancel, list_, results, retry_failed, status, watch
from .batch_options import BatchOptions, InputArgument, LineOptions, with_line_options
from .batch_outputs import Outputs
from .batch_run import run_batch
from .common import ConfigOption, DataDirOption, JsonOption, client_settings

app = typer.Typer(no_args_is_help=True, help="Thousands of prompts from a file, and their answers into another.")


@app.command()
@with_line_options
def run(
    file: InputArgument,
    *,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="RESULTS", help="Where answers go as lines finish.")
    ] = None,
    ordered: Annotated[bool, typer.Option("--ordered", help="Sort the results as the lines are, at the end.")] = False,
    dry: Annotated[bool, typer.Option("--dry-run", help="Check all, estimate tokens and cost, send nothing.")] = False,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    **lines: Unpack[LineOptions],
) -> None:
    """Run every line of a file, and write the answers as they come.

    Interrupted at any moment, the same command goes on where it was, and pays for nothing twice. Ctrl-C stops watching;
    the batch goes on.
    """
    options = BatchOptions.of(file, lines)
    settings = client_settings(config, data_dir)
    if dry:
        raise typer.Exit(dry_run(settings, options, as_json=as_json))
    if output is None:
        raise BadRequest("give --output RESULTS, or --dry-run", field="output")
    outputs = Outputs.of(output, lines["failures"], options.sample, overwrite=lines["overwrite"], ordered=ordered)
    raise typer.Exit(run_batch(settings, options, outputs, as_json=as_json))


@app.command()
@with_line_options
def submit(
    file: InputArgument,
    *,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="RESULTS", help="Where `batch run` is to write the answers.")
    ],
    as_json: JsonOption = False,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    **lines: Unpack[LineOptions],
) -> None:
    """Send every line of a file, say the batch's id, and wait for nothing.

    `batch run` with the same options brings the answers; `batch results ID` reads them without the file.
    """
    options = BatchOptions.of(file, lines)
    outputs = Outputs.of(output, lines["failures"], options.sample, overwrite=lines["overwrite"], ordered=False)
    raise typer.Exit(run_batch(client_settings(config, data_dir), options, outputs, as_json=as_json, collect=False))


app.command()(status)
app.command()(watch)
app.command()(results)
app.command()(cancel)
app.command("retry-failed")(retry_failed)
app.command("list")(list_)
