"""``promptmill batch run`` and ``batch submit``: an input, a batch, and two files, brought to the end step by step."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from pydantic import JsonValue

from promptmill import keys
from promptmill.batch.files.checking import BadInput
from promptmill.batch.files.formats import output_format
from promptmill.batch.files.records import Input
from promptmill.batch.files.sidecar import Sidecar
from promptmill.batch.files.writing import OutputFiles
from promptmill.batch.models import BatchStatus
from promptmill.client import AsyncProducer
from promptmill.errors import BadRequest, NotFound, Overloaded, PromptmillError
from promptmill.registry import Registry
from promptmill.settings import Settings
from promptmill.traffic import Traffic
from promptmill.up.signals import StopRequest, stop_on_signals

from . import exits
from .batch_options import BatchOptions
from .batch_outputs import Outputs
from .batch_prepare import Prepared, check, check_again, estimate, line_reader, of_line, refuse_over
from .batch_progress import Display, View, display, dollars, duration
from .batch_sync import Collection, Patience, Upload, sort_results
from .common import open_producer, unless_asked
from .output import note, out, out_json

SHOWN_BAD_LINES: Final = 20


class _Interrupted(Exception):
    """A signal came while lines were checked."""


@dataclass(slots=True)
class BatchRun:
    """One run of the command."""

    settings: Settings
    options: BatchOptions
    outputs: Outputs
    source: Input
    display: Display
    stop: StopRequest
    began: float
    collect: bool = True
    """False: only submit."""
    sidecar: Sidecar | None = None
    """What is known of the batch, once it may exist."""

    async def run(self) -> int:
        """To the end. Answers the exit code."""
        self.outputs.check()
        options = {**self.options.deciding(), "--failures": str(self.outputs.failures)}
        known = await self._in_thread(lambda: self.outputs.known(options, self.source))
        if known is not None and known.stage == "complete":
            done = await self._in_thread(lambda: self._complete(known))
            if done is not None:
                return done
        async with open_producer(self.settings) as producer:
            await producer.live.refresh(await producer.store())
            prepared = await self._in_thread(lambda: self._prepare(producer, known))
            view = View(len(prepared.plan))
            self.sidecar = sidecar = known or await self._begin(producer, prepared, options)
            upload = self._upload(producer, prepared, sidecar, view)
            files = OutputFiles(self.outputs.results, self.outputs.failures, prepared.form.id_key)
            try:
                await self._in_thread(lambda: self._open(files, known))
                if sidecar.stage == "new":
                    sidecar.save(self.outputs.sidecar)
                    await upload.create()
                    sidecar.stage = "created"
                    sidecar.save(self.outputs.sidecar)
                self.display.tell("batch", f"batch {sidecar.batch_id}", id=sidecar.batch_id, total=sidecar.total)
                return await self._carry_out(producer, prepared, sidecar, upload, files, view)
            finally:
                files.close()

    # -- the input ----------------------------------------------------------------------------------------------

    def _prepare(self, producer: AsyncProducer, known: Sidecar | None) -> Prepared:
        reader = line_reader(self.source, self.options, self.settings, producer.live.registry)
        if known is not None and known.stage not in {"new", "created"} and not self.options.dedupe:
            return check_again(self.source, reader, self.options, frozenset(known.skipped))
        return check(self.source, reader, self.options, self._seen)

    def _seen(self, lines: int, done_bytes: int) -> None:
        if lines % 256 == 0:
            if self.stop.asked.is_set():
                raise _Interrupted
            self.display.checking(lines, done_bytes, self.source.size)

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        """Read the input while signals are heard; it stops by itself soon after one."""
        return await asyncio.to_thread(work)

    def _complete(self, known: Sidecar) -> int | None:
        """The exit code of a run that was over before; None where lines were taken out of its files since."""
        form = output_format(known.format)
        files = OutputFiles(self.outputs.results, self.outputs.failures, form.id_key)
        try:
            files.open()
            if files.succeeded + files.failed < known.lines:
                return None
            if self.outputs.ordered and not known.ordered:
                reader = line_reader(self.source, self.options, self.settings, Registry.of(self.settings))
                sort_results(files, check_again(self.source, reader, self.options, frozenset(known.skipped)))
                known.ordered = True
                known.save(self.outputs.sidecar)
        finally:
            files.close()
        text = f"complete already: {self._where(files)}"
        self.display.tell("end", text, id=known.batch_id, succeeded=files.succeeded, failed=files.failed)
        return exits.FAILED if files.failed else exits.OK

    # -- the batch ----------------------------------------------------------------------------------------------

    async def _begin(self, producer: AsyncProducer, prepared: Prepared, options: dict[str, JsonValue]) -> Sidecar:
        """A new batch, of which nothing is sent yet. Raises where nothing would answer its lines."""
        plan = prepared.plan
        for bad in plan.bad[:SHOWN_BAD_LINES]:
            self.display.tell("left_out", f"left out: {bad}", line=bad.number, code=bad.code, message=bad.message)
        if len(plan.bad) > SHOWN_BAD_LINES:
            self.display.tell("left_out_more", f"left out: {len(plan.bad)} lines in all", lines=len(plan.bad))
        if self.options.max_cost_usd is not None:
            estimates = await self._in_thread(lambda: estimate(plan, producer.live.registry, self.settings))
            refuse_over(estimates, self.options.max_cost_usd)
        for amounts in plan.choices.values():
            try:
                await producer.batches.check([amounts.example])
            except BadRequest as err:
                raise of_line(err, amounts) from None
        return Sidecar(
            batch_id=keys.new_job_id(),
            input_size=self.source.size,
            input_sha256=self.source.digest(),
            total=len(plan),
            chunk_lines=plan.chunk_lines(),
            format=prepared.form.name,
            options=options,
            skipped=[bad.number for bad in plan.bad],
        )

    def _upload(self, producer: AsyncProducer, prepared: Prepared, sidecar: Sidecar, view: View) -> Upload:
        head = self.options.head(sidecar.chunk_lines, prepared.form.name)
        patience = Patience(self.display, view)
        return Upload(producer.batches, sidecar.batch_id, head, prepared, view, self.display, patience)

    def _open(self, files: OutputFiles, known: Sidecar | None) -> None:
        """Hold the files, and see that no other command was there first."""
        files.results.open()
        if self.outputs.overwrite and known is None:
            files.results.empty()
            if self.outputs.failures.exists():
                files.failures.empty()
        elif (now := Sidecar.load(self.outputs.sidecar)) != known:
            about = f"batch {now.batch_id}" if now else "nothing"
            raise BadRequest(f"{self.outputs.results} now belongs to {about}: run the command again", field="output")
        files.open()

    async def _carry_out(
        self,
        producer: AsyncProducer,
        prepared: Prepared,
        sidecar: Sidecar,
        upload: Upload,
        files: OutputFiles,
        view: View,
    ) -> int:
        traffic = Traffic(await producer.store(), "batch-run")
        collection = Collection(
            producer.batches,
            upload,
            sidecar,
            self.outputs.sidecar,
            files,
            prepared,
            view,
            self.display,
            upload.patience,
            traffic.cooldowns,
            self.options.max_cost_usd,
        )
        try:
            status = await self._both(upload, collection, sidecar)
        except NotFound:
            raise NotFound(
                f"batch {sidecar.batch_id} is no longer in the store; {files.succeeded + files.failed} of "
                f"{sidecar.lines} lines are written. To begin anew, and pay again, delete {self.outputs.sidecar}, and "
                "give --overwrite",
                field="id",
            ) from None
        if status is None:
            return exits.OK
        await collection.finish(ordered=self.outputs.ordered)
        return self._ended(status, files, collection, prepared)

    async def _both(self, upload: Upload, collection: Collection, sidecar: Sidecar) -> BatchStatus | None:
        """Results come while lines are still uploaded."""

        async def up() -> None:
            await upload.run()
            sidecar.stage = "sealed"

        if not self.collect:
            await up()
            sidecar.save(self.outputs.sidecar)
            return None
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(up())
                collecting = tasks.create_task(collection.run())
        except* PromptmillError as group:
            raise _first(group) from None
        return collecting.result()

    # -- the end ------------------------------------------------------------------------------------------------

    def _where(self, files: OutputFiles) -> str:
        text = f"{files.succeeded:,} answers in {self.outputs.results}"
        return f"{text}, {files.failed:,} failures in {self.outputs.failures}" if files.failed else text

    def _ended(self, status: BatchStatus, files: OutputFiles, collection: Collection, prepared: Prepared) -> int:
        seconds = time.monotonic() - self.began
        usage = status.usage
        asked = usage.input_tokens + usage.cache_read_tokens + usage.cache_write_tokens
        lines = [
            f"{status.state}: {self._where(files)}",
            f"{asked:,} tokens in, {usage.output_tokens:,} out, cost {dollars(status)}, {duration(seconds)}",
        ]
        plan = prepared.plan
        if len(plan) < plan.input_lines and status.cost_usd:
            whole = status.cost_usd / len(plan) * plan.input_lines
            lines.append(f"all {plan.input_lines:,} lines would cost about ${whole:,.2f}")
        if status.failed + status.expired:
            lines.append(f"what failed runs again with `promptmill batch retry-failed {status.id}`")
        data = status.model_dump(mode="json", exclude={"options"})
        self.display.tell("end", "\n".join(lines), **{**data, "written": files.succeeded, "failures": files.failed})
        if collection.over_cost:
            message = f"the batch cost {dollars(status)}, over --max-cost {self.options.max_cost_usd:g}"
            raise Overloaded(message, code="budget_exceeded", limit=self.options.max_cost_usd)
        if status.state == "cancelled":
            return exits.CANCELLED
        return exits.FAILED if files.failed else exits.OK


def _first(group: BaseExceptionGroup[PromptmillError]) -> BaseException:
    """One error in the place of a group: the others are what it did to those beside it."""
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return found  # pyright: ignore[reportUnknownVariableType]


def run_batch(
    settings: Settings, options: BatchOptions, outputs: Outputs, *, as_json: bool, collect: bool = True
) -> int:
    """See :class:`BatchRun`. Answers the exit code."""
    began = time.monotonic()

    async def run(source: Input, shown: Display) -> int:
        with stop_on_signals() as stop, shown:
            work = BatchRun(settings, options, outputs, source, shown, stop, began, collect)
            code: int | None = None
            with suppress(_Interrupted):
                code = await unless_asked(stop, work.run())
        if code is None:
            _tell_how_to_go_on(shown, work.sidecar)
            return exits.INTERRUPTED
        if not collect and work.sidecar is not None and not as_json:
            out(work.sidecar.batch_id)
        return code

    with Input.open(options.input) as source:
        shown = display(as_json=as_json)
        try:
            return asyncio.run(run(source, shown))
        except BadInput as err:
            tell_bad_lines(err, as_json=as_json)
            raise


def tell_bad_lines(error: BadInput, *, as_json: bool) -> None:
    """Name the first lines that are wrong."""
    for bad in error.lines[:SHOWN_BAD_LINES]:
        if as_json:
            out_json({"event": "bad_line", "line": bad.number, "code": bad.code, "message": bad.message})
        else:
            note(str(bad))


def _tell_how_to_go_on(shown: Display, sidecar: Sidecar | None) -> None:
    if sidecar is None or sidecar.stage == "new":
        shown.tell("interrupted", "stopped; nothing was sent")
        return
    on = "goes on without you" if sidecar.stage == "sealed" else "runs what was uploaded"
    text = (
        f"stopped watching. Batch {sidecar.batch_id} {on}; the same command goes on here, "
        f"`promptmill batch cancel {sidecar.batch_id}` ends it"
    )
    shown.tell("interrupted", text, id=sidecar.batch_id, stage=sidecar.stage)
