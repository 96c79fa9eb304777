"""``promptmill batch status|watch|results|cancel|retry-failed|list``: batches without their files."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Annotated, TypeVar

import orjson
import typer

from promptmill.batch import BatchClient
from promptmill.batch.files.format import Format
from promptmill.batch.files.formats import FORMATS, output_format
from promptmill.batch.files.outcomes import answer_of, error_of
from promptmill.batch.files.writing import LineFile
from promptmill.batch.models import BatchResult, BatchStatus
from promptmill.errors import BadRequest
from promptmill.settings import Settings
from promptmill.traffic import Traffic
from promptmill.up.signals import stop_on_signals

from . import exits
from .batch_progress import View, display, dollars
from .batch_sync import Patience
from .common import ConfigOption, DataDirOption, JsonOption, client_settings, open_producer, unless_asked
from .output import note, out, out_json, printable, show_time, table

BatchId = Annotated[str, typer.Argument(metavar="ID", help="The batch's id.")]

_FLUSH_LINES = 200

T = TypeVar("T")


def _ask(config: Path | None, data_dir: Path | None, act: Callable[[BatchClient], Awaitable[T]]) -> T:
    async def work(settings: Settings) -> T:
        async with open_producer(settings) as producer:
            return await act(producer.batches)

    return asyncio.run(work(client_settings(config, data_dir)))


def status(
    batch_id: BatchId, *, as_json: JsonOption = False, config: ConfigOption = None, data_dir: DataDirOption = None
) -> None:
    """Show a batch as it stands now."""
    _show(_ask(config, data_dir, lambda batches: batches.status(batch_id)), as_json=as_json)


def cancel(
    batch_id: BatchId, *, as_json: JsonOption = False, config: ConfigOption = None, data_dir: DataDirOption = None
) -> None:
    """End a batch: what did not begin never runs, what runs is stopped. Answers that are there stay."""
    _show(_ask(config, data_dir, lambda batches: batches.cancel(batch_id)), as_json=as_json)


def retry_failed(
    batch_id: BatchId, *, as_json: JsonOption = False, config: ConfigOption = None, data_dir: DataDirOption = None
) -> None:
    """Run the lines of a batch that failed or expired again, as a batch of its own; again, it names the same one."""
    new_id = _ask(config, data_dir, lambda batches: batches.retry_failed(batch_id))
    if as_json:
        out_json({"id": new_id, "retry_of": batch_id})
    else:
        out(new_id)
        note(f"`promptmill batch results {new_id} --follow` brings the answers")


def list_(
    *,
    user: Annotated[str | None, typer.Option(help="Only this user's.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many at most.")] = 20,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """List batches, newest first. --json writes {"batches": […]}."""
    found = _ask(config, data_dir, lambda batches: batches.list(user, limit))
    if as_json:
        out_json({"batches": [_data(one) for one in found]})
    elif not found:
        out("no batches")
    else:
        head = ("ID", "STATE", "NAME", "USER", "DONE", "LINES", "FAILED", "COST", "CREATED")
        out(printable(table([head, *(_row(one) for one in found)])))


def _row(one: BatchStatus) -> tuple[str, ...]:
    total = str(one.total) if one.total is not None else f"{one.uploaded_lines}…"
    done, failed = str(one.done), str(one.failed + one.expired)
    return (
        one.id,
        one.state,
        one.name or "-",
        one.user,
        done,
        total,
        failed,
        dollars(one),
        show_time(one.created_at),
    )


def _data(one: BatchStatus) -> dict[str, object]:
    return {**one.model_dump(mode="json"), "done": one.done}


def _show(one: BatchStatus, *, as_json: bool) -> None:
    if as_json:
        out_json(_data(one))
        return
    view = View()
    view.take(one)
    fields = {
        "id": one.id,
        "state": one.state,
        "name": one.name,
        "user": one.user,
        "done": view.head(),
        **dict(view.details()),
        "retry of": one.retry_of,
        "created": show_time(one.created_at),
        "ended": show_time(one.ended_at) if one.ended_at else None,
        "expires": show_time(one.expires_at) if one.expires_at and not one.ended else None,
    }
    out(printable("\n".join(f"{name:<10}{value}" for name, value in fields.items() if value is not None)))


# -- following ----------------------------------------------------------------------------------------------------


def watch(
    batch_id: BatchId, *, as_json: JsonOption = False, config: ConfigOption = None, data_dir: DataDirOption = None
) -> None:
    """Follow a batch to its end. Ctrl-C stops watching, the batch goes on."""
    raise typer.Exit(asyncio.run(_watch(client_settings(config, data_dir), batch_id, as_json=as_json)))


async def _watch(settings: Settings, batch_id: str, *, as_json: bool) -> int:
    shown = display(as_json=as_json)
    view = View()

    async def follow() -> BatchStatus:
        async with open_producer(settings) as producer:
            one = await producer.batches.status(batch_id)
            traffic = Traffic(await producer.store(), "batch-watch")
            patience = Patience(shown, view)
            while not one.ended:
                view.take(one)
                view.held = await patience.ask(traffic.cooldowns)
                shown.show(view)
                known = one
                one = await patience.ask(lambda: producer.batches.wait_change(batch_id, known, 1.0))  # noqa: B023 - awaited
            return one

    with stop_on_signals() as stop, shown:
        ended = await unless_asked(stop, follow())
        if ended is None:
            shown.tell("interrupted", f"stopped watching; batch {batch_id} goes on", id=batch_id)
            return exits.INTERRUPTED
        view.take(ended)
        shown.tell("end", f"{ended.state}: {view.line()}", **_data(ended))
    if ended.state == "cancelled":
        return exits.CANCELLED
    return exits.OK if ended.succeeded == ended.done else exits.FAILED


def results(
    batch_id: BatchId,
    *,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where to write (default: standard output).")
    ] = None,
    form: Annotated[
        str | None, typer.Option("--format", metavar="NAME", help=f"{', '.join(FORMATS)} (default: as the lines were).")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Wait for more until the batch has ended.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="In the place of what the file holds.")] = False,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Write the answers that are there, failures among them, one a line, in the order in which the lines ended."""
    if form is not None:
        output_format(form)
    settings = client_settings(config, data_dir)
    if output is None:
        raise typer.Exit(asyncio.run(_results(settings, batch_id, form, _to_stdout, follow=follow)))
    file = LineFile(output)
    try:
        file.open()
        if file.size and not overwrite:
            raise BadRequest(f"{output} exists; choose another file, or --overwrite", field="output")
        file.empty()
        raise typer.Exit(
            asyncio.run(_results(settings, batch_id, form, lambda lines: _to_file(file, lines), follow=follow))
        )
    finally:
        file.close()


async def _results(
    settings: Settings, batch_id: str, form: str | None, write: Callable[[list[bytes]], bool], *, follow: bool
) -> int:
    async def read() -> int:
        async with open_producer(settings) as producer:
            one = await producer.batches.status(batch_id)
            written_as = output_format(form or str(one.options.get("format", "simple")))
            async with aclosing(_pages(producer.batches, batch_id, follow=follow)) as pages:
                async for page in pages:
                    if not write([_line(written_as, result) for result in page]):
                        break
        return exits.OK

    with stop_on_signals() as stop:
        code = await unless_asked(stop, read())
    return exits.INTERRUPTED if code is None else code


async def _pages(batches: BatchClient, batch_id: str, *, follow: bool) -> AsyncGenerator[list[BatchResult]]:
    offset = 0
    known: BatchStatus | None = None
    while True:
        page, offset = await batches.results(batch_id, offset)
        if page:
            yield page
        elif not follow or (known is not None and known.ended):
            return
        else:
            known = await batches.wait_change(batch_id, known)


def _line(form: Format, result: BatchResult) -> bytes:
    error = error_of(result)
    if error is None and result.job is not None:
        return orjson.dumps(answer_of(form, result, result.job))
    return orjson.dumps(form.failure(result.id, error, result.job)) if error else b"{}"


def _to_file(file: LineFile, lines: list[bytes]) -> bool:
    for line in lines:
        file.add(line)
    file.flush()
    return True


def _to_stdout(lines: list[bytes]) -> bool:
    """False where nobody reads any more, as behind `| head`."""
    try:
        sys.stdout.buffer.write(b"".join(line + b"\n" for line in lines))
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        # The interpreter flushes once more at its exit, and would complain there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True
