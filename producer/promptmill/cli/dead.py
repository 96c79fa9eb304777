"""``promptmill job dead``."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import typer

from promptmill.client.dead import dead_request
from promptmill.contract import Job, JobRequest
from promptmill.errors import BadRequest
from promptmill.settings import Settings

from .common import ConfigOption, DataDirOption, JsonOption, client_settings, open_producer
from .output import out, out_json, show_job, show_time, table

app = typer.Typer(no_args_is_help=True, help="Jobs that were given up because they, or something, ended their workers.")


@app.command(name="list")
def list_(
    *,
    user: Annotated[str | None, typer.Option(help="Only this user's jobs.")] = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """List them, the latest first. They are kept for a week at least."""

    async def look(settings: Settings) -> list[Job]:
        async with open_producer(settings) as producer:
            return await producer.dead_jobs(user)

    jobs = asyncio.run(look(client_settings(config, data_dir)))
    if as_json:
        out_json({"jobs": [job.model_dump(mode="json") for job in jobs]})
    elif not jobs:
        out("no jobs were given up")
    else:
        rows = [(j.id, _code(j), j.user, str(len(j.attempts)), show_time(j.finished_at or j.created_at)) for j in jobs]
        out(table([("ID", "ERROR", "USER", "ATTEMPTS", "GIVEN UP"), *rows]))


@app.command()
def show(
    job_id: Annotated[str, typer.Argument(metavar="ID", help="The job's id.")],
    *,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Show one with all of its attempts and with what was asked."""

    async def look(settings: Settings) -> tuple[JobRequest, Job]:
        async with open_producer(settings) as producer:
            return await dead_request(await producer.store(), job_id), await producer.get(job_id)

    request, job = asyncio.run(look(client_settings(config, data_dir)))
    asked: dict[str, Any] = request.model_dump(mode="json", exclude_none=True)
    if as_json:
        out_json({"job": job.model_dump(mode="json"), "request": asked})
        return
    out(show_job(job))
    rows = [(str(a.attempt), a.model or "-", a.outcome, a.message or "") for a in job.attempts]
    out(table([("ATTEMPT", "MODEL", "OUTCOME", "MESSAGE"), *rows]))
    out_json(asked)


@app.command()
def retry(
    job_ids: Annotated[list[str] | None, typer.Argument(metavar="ID…", help="The jobs' ids.")] = None,
    *,
    everything: Annotated[bool, typer.Option("--all", help="All that were given up.")] = False,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Submit them once more, each as a new job; again, it names the same new jobs."""
    if bool(job_ids) == everything:
        raise BadRequest("give job ids, or --all", field="id")

    async def submit(settings: Settings) -> list[tuple[str, str]]:
        async with open_producer(settings) as producer:
            old = job_ids or [job.id for job in await producer.dead_jobs()]
            return [(job_id, (await producer.retry_dead(job_id)).id) for job_id in old]

    retried = asyncio.run(submit(client_settings(config, data_dir)))
    if as_json:
        out_json({"retried": [{"id": old, "new_id": new} for old, new in retried]})
    else:
        out(table([("ID", "NEW ID"), *retried]) if retried else "no jobs were given up")


def _code(job: Job) -> str:
    return job.error.code if job.error else "-"
