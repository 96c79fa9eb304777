"""``promptmill run``."""

from __future__ import annotations

import asyncio
import sys
from contextlib import aclosing
from pathlib import Path
from typing import Annotated, Any

import typer

from promptmill.client import AsyncJob
from promptmill.errors import BadRequest, PromptmillError, WaitTimeout
from promptmill.settings import Settings
from promptmill.up.signals import StopRequest, stop_on_signals

from . import exits
from .attachments import image_part, read_json
from .common import CANCEL_WAIT_S, ConfigOption, DataDirOption, JsonOption, client_settings, open_producer, unless_asked
from .output import EventPrinter, note

Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Tell the job's id and progress on standard error.")]


def run(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; `-` or none: read it from standard input.")] = None,
    *,
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="A model of the configuration.")] = None,
    role: Annotated[str | None, typer.Option(help="A role of the configuration.")] = None,
    slot: Annotated[str | None, typer.Option(help="A slot of the role: primary, backup_1 …")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="The most tokens that the answer may have.")] = None,
    temperature: Annotated[float | None, typer.Option(help="The sampling temperature.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be given again.")] = None,
    image: Annotated[
        list[str] | None, typer.Option(help="A picture: a file or an address; may be given again.")
    ] = None,
    json_schema: Annotated[Path | None, typer.Option(help="A file with the JSON Schema of the answer.")] = None,
    timeout: Annotated[
        float | None, typer.Option(min=0.001, metavar="SECONDS", help="Wait no longer than this; the job goes on.")
    ] = None,
    verbose: Verbose = False,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Run one job and stream its answer.

    The answer, and nothing else, goes to standard output; --json writes each event as one line of JSON instead.
    Ctrl-C cancels the job.
    """
    options: dict[str, Any] = {
        "system": system,
        "model": model,
        "role": role,
        "slot": slot,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "stop": stop or None,
        "response_format": _schema(json_schema) if json_schema else None,
    }
    settings = client_settings(config, data_dir)
    text = _prompt(prompt, settings.limits.request_bytes)
    if image:
        parts = [{"type": "text", "text": text}, *(image_part(where, settings.limits.image_bytes) for where in image)]
        options["messages"] = [{"role": "user", "content": parts}]
    else:
        options["prompt"] = text
    code = asyncio.run(_run(settings, options, timeout, as_json=as_json, verbose=verbose))
    raise typer.Exit(code)


def _prompt(argument: str | None, limit: int) -> str:
    if argument is not None and argument != "-":
        return argument
    if argument is None and sys.stdin.isatty():
        raise BadRequest("give a prompt as an argument or on standard input", field="prompt")
    data = sys.stdin.buffer.read(limit + 1)
    if len(data) > limit:
        raise BadRequest(f"standard input has more than {limit} bytes", code="too_large", field="prompt", limit=limit)
    try:
        return data.decode()
    except UnicodeDecodeError as err:
        raise BadRequest(f"standard input is not UTF-8 (byte {err.start})", field="prompt") from None


def _schema(path: Path) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": read_json(path, "--json-schema")}


async def _run(
    settings: Settings, options: dict[str, Any], timeout_s: float | None, *, as_json: bool, verbose: bool
) -> int:
    with stop_on_signals() as stop:
        async with open_producer(settings) as producer:
            submitting = asyncio.create_task(producer.submit(**options))
            job = await unless_asked(stop, _outlived_by(submitting))
            if job is None:
                return await _cancel_submitted(stop, submitting)
            if verbose:
                note(f"(job {job.id})")
            return await _follow(stop, job, EventPrinter(job.id, as_json=as_json, verbose=verbose), timeout_s)


async def _outlived_by(submitting: asyncio.Task[AsyncJob]) -> AsyncJob:
    return await asyncio.shield(submitting)


async def _cancel_submitted(stop: StopRequest, submitting: asyncio.Task[AsyncJob]) -> int:
    """Let the submit end, because only its answer names the job to cancel; a second signal gives up on it."""
    hurried = asyncio.create_task(stop.hurry.wait())
    try:
        await asyncio.wait({submitting, hurried}, timeout=CANCEL_WAIT_S, return_when=asyncio.FIRST_COMPLETED)
        if submitting.done():
            await _cancel(submitting.result())
        else:
            note("interrupted while submitting, so a job may exist: `promptmill job list`")
    finally:
        hurried.cancel()
        submitting.cancel()
        await asyncio.gather(hurried, submitting, return_exceptions=True)
    return exits.INTERRUPTED


async def _follow(stop: StopRequest, job: AsyncJob, printer: EventPrinter, timeout_s: float | None) -> int:
    async def show() -> int:
        async with aclosing(job.events()) as events:
            async for event in events:
                printer.show(event)
        return printer.exit_code

    try:
        code = await unless_asked(stop, show(), timeout_s)
    except TimeoutError:
        printer.break_line()
        raise WaitTimeout(f"no end within {timeout_s:g} s; the job goes on: `promptmill job stream {job.id}`") from None
    if code is not None:
        return code
    printer.break_line()
    await _cancel(job)
    return exits.INTERRUPTED


async def _cancel(job: AsyncJob) -> None:
    try:
        async with asyncio.timeout(CANCEL_WAIT_S):
            await job.cancel("interrupted at the terminal")
    except (PromptmillError, TimeoutError) as err:
        note(f"the job could not be cancelled ({err or 'no answer'}): `promptmill job cancel {job.id}`")
    else:
        note(f"cancelled job {job.id}")
