"""The command line's commands, and the one place where errors become a line and an exit code."""

from __future__ import annotations

import sys
import traceback
from importlib import metadata
from typing import Annotated

import typer

from promptmill.errors import PromptmillError

from . import batch, dead, demo, doctor, exits, flower, job, models, output, parts, top, up, usage
from . import run as run_command

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A distributed task queue for LLM completion jobs. `promptmill demo` shows all of it in ten seconds.",
)
app.command()(demo.demo)
app.command()(up.up)
app.command()(run_command.run)
job.app.add_typer(dead.app, name="dead")
app.add_typer(job.app, name="job")
app.add_typer(models.app, name="models")
app.add_typer(usage.app, name="usage")
app.command()(parts.worker)
app.command()(parts.relay)
app.command()(parts.gateway)
app.command()(doctor.doctor)
app.command()(top.top)
app.command()(flower.flower)
app.add_typer(batch.app, name="batch")


def _version(wanted: bool) -> None:
    if wanted:
        output.out(f"promptmill {metadata.version('promptmill')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Tell the version.")
    ] = False,
) -> None:
    del version


def run(arguments: list[str]) -> int:
    """Run one command line. Returns its exit code; no exception leaves it."""
    as_json = "--json" in arguments
    try:
        app(args=arguments, prog_name="promptmill")
    except SystemExit as err:
        return err.code if isinstance(err.code, int) else exits.OK
    except PromptmillError as err:
        output.show_error(err, as_json=as_json)
        return exits.exit_code(err)
    except Exception as err:  # noqa: BLE001 - the outermost frame: a user gets a line, the report gets its place
        place = traceback.extract_tb(err.__traceback__)[-1]
        message = f"{type(err).__name__}: {err} ({place.filename}:{place.lineno}). This is a defect in promptmill"
        output.show_error(PromptmillError(message, code="internal"), as_json=as_json)
        return exits.INTERNAL
    return exits.OK


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
