"""``promptmill job show|stream|cancel|list``."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Annotated

import typer

from promptmill.contract import Job, JobState
from promptmill.settings import Settings
from promptmill.up.signals import stop_on_signals

from . import exits
from .common import ConfigOption, DataDirOption, JsonOption, client_settings, open_producer, unless_asked
from .output import EventPrinter, out, out_json, show_job, show_time, table

app = typer.Typer(no_args_is_help=True, help="Look at jobs, follow them, stop them.")

JobId = Annotated[str, typer.Argument(metavar="ID", help="The job's id.")]


@app.command()
def show(
    job_id: JobId, *, as_json: JsonOption = False, config: ConfigOption = None, data_dir: DataDirOption = None
) -> None:
    """Show a job as it stands now."""

    async def get(settings: Settings) -> Job:
        async with open_producer(settings) as producer:
            return await producer.get(job_id)

    _show(asyncio.run(get(client_settings(config, data_dir))), as_json=as_json)


@app.command()
def stream(
    job_id: JobId,
    *,
    after: Annotated[str | None, typer.Option(metavar="EVENT_ID", help="Only what comes after this event.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Tell progress on standard error.")] = False,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Follow a job from its beginning, or from an event on, to its end. Ctrl-C leaves the job running."""

    async def follow(settings: Settings) -> int:
        printer = EventPrinter(job_id, as_json=as_json, verbose=verbose)

        async def read() -> int:
            async with open_producer(settings) as producer, aclosing(producer.events(job_id, after)) as events:
                async for event in events:
                    printer.show(event)
            return printer.exit_code

        with stop_on_signals() as stop:
            code = await unless_asked(stop, read())
        if code is None:
            printer.break_line()
            return exits.INTERRUPTED
        return code

    raise typer.Exit(asyncio.run(follow(client_settings(config, data_dir))))


@app.command()
def cancel(
    job_id: JobId,
    *,
    reason: Annotated[str, typer.Option(help="Told to the job's readers.")] = "cancelled at the terminal",
    as_json: JsonOption = False,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """End a job. One that has ended stays as it is."""

    async def end(settings: Settings) -> Job:
        async with open_producer(settings) as producer:
            return await producer.cancel(job_id, reason)

    _show(asyncio.run(end(client_settings(config, data_dir))), as_json=as_json)


@app.command(name="list")
def list_(
    *,
    user: Annotated[str | None, typer.Option(help="Only this user's jobs.")] = None,
    state: Annotated[str | None, typer.Option(help="Only jobs in this state.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many at most.")] = 20,
    cursor: Annotated[str | None, typer.Option(help="Go on where an earlier list ended.")] = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """List jobs, newest first. --json writes {"jobs": […], "next_cursor": …}."""
    wanted = _state(state)

    async def look(settings: Settings) -> tuple[list[Job], str | None]:
        async with open_producer(settings) as producer:
            page = await producer.list(user=user, state=wanted, limit=limit, cursor=cursor)
            return page.jobs, page.next_cursor

    jobs, next_cursor = asyncio.run(look(client_settings(config, data_dir)))
    if as_json:
        out_json({"jobs": [job.model_dump(mode="json") for job in jobs], "next_cursor": next_cursor})
        return
    if not jobs:
        out("no jobs")
    else:
        rows = [(j.id, j.state, j.user, j.model or "-", show_time(j.created_at)) for j in jobs]
        out(table([("ID", "STATE", "USER", "MODEL", "CREATED"), *rows]))
    if next_cursor:
        out(f"more: --cursor {next_cursor}")


def _state(text: str | None) -> JobState | None:
    states: dict[str, JobState] = {"queued": "queued", "running": "running", "waiting": "waiting"}
    states |= {"succeeded": "succeeded", "failed": "failed", "cancelled": "cancelled", "expired": "expired"}
    if text is not None and text not in states:
        raise typer.BadParameter(f"a state is one of {', '.join(states)}", param_hint="--state")
    return states[text] if text else None


def _show(job: Job, *, as_json: bool) -> None:
    if as_json:
        out_json(job.model_dump(mode="json"))
    else:
        out(show_job(job))
