"""The picture that ``promptmill top`` shows: a fleet as tables, with as many columns and rows as fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from promptmill.fleet import Fleet, QueueLook, WorkerLook
from promptmill.usage.report import Sums

from .output import printable

_SIDE_BY_SIDE: Final = 120
"""From this width on there are two columns of tables."""
_BETWEEN: Final = "   "
_SHOWN_MIN: Final = 3
_SHOWN_MAX: Final = 8
_STATES: Final = {"ready": "green", "starting": "yellow", "draining": "yellow", "quarantine": "magenta"}


@dataclass(frozen=True, slots=True)
class _Column:
    """``wide``: it is left out where there are fewer columns of characters."""

    name: str
    number: bool = True
    wide: int = 0


_QUEUES: Final = (
    _Column("queue", number=False),
    _Column("messages"),
    _Column("lines", wide=70),
    _Column("oldest"),
    _Column("workers"),
)
_WORKERS: Final = (
    _Column("worker", number=False),
    _Column("family", number=False),
    _Column("state", number=False),
    _Column("running"),
    _Column("jobs/s"),
    _Column("tokens/s", wide=70),
    _Column("done", wide=90),
    _Column("failed", wide=70),
    _Column("up", wide=90),
)
_SERVERS: Final = (
    _Column("streams", number=False),
    _Column("readers"),
    _Column("events/s"),
    _Column("events", wide=70),
    _Column("up", wide=70),
)
_FAILURES: Final = (_Column("failed in 5 min", number=False), _Column("jobs"))
_MODELS: Final = (
    _Column("today", number=False),
    _Column("attempts"),
    _Column("failed", wide=70),
    _Column("in", wide=70),
    _Column("out"),
    _Column("cost"),
)
_HELD: Final = (
    _Column("held back", number=False),
    _Column("state", number=False),
    _Column("for"),
    _Column("last failure", number=False),
)
_BATCHES: Final = (
    _Column("batch", number=False),
    _Column("state", number=False),
    _Column("done"),
    _Column("failed"),
)

_Row = Sequence[str | Text]


class Picture:
    """A fleet for a console. ``trouble``: why the picture is old; ``hint`` is what stands behind the time."""

    def __init__(self, fleet: Fleet, *, trouble: str | None = None, hint: str = "", fits: bool = False) -> None:
        self._fleet = fleet
        self._trouble = trouble
        self._hint = hint
        self._fits = fits
        """Whether it must fit the console's height; else every row is shown."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        beside = width >= _SIDE_BY_SIDE
        inner = width // 2 - 1 if beside else width
        # A little taller or lower makes no difference: what is below the edge is cut.
        most = max(_SHOWN_MIN, min(_SHOWN_MAX, console.height // 5)) if self._fits else None
        yield from self._head(width)
        left = [
            _table(_QUEUES, map(_queue, self._fleet.queues), inner, most),
            _table(_WORKERS, map(_worker, self._fleet.workers), inner, most),
            _table(_SERVERS, self._servers(), inner, most),
        ]
        right = [
            _table(_FAILURES, ((code, f"{n:,}") for code, n in self._fleet.failures.items()), inner, most),
            _table(_MODELS, self._models(), inner, most),
            _table(_HELD, self._held(), inner, most),
            _table(_BATCHES, self._batches(), inner, most),
        ]
        if not beside:
            yield Group(*filter(None, (*left, *right)))
            return
        grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
        grid.add_column(ratio=1)
        grid.add_column(ratio=1)
        grid.add_row(Group(*filter(None, left)), Group(*filter(None, right)))
        yield grid

    def _head(self, width: int) -> Iterable[RenderableType]:
        fleet = self._fleet
        title = Text.assemble(
            ("promptmill top", "bold"), f"  {printable(fleet.store)}  {fleet.at:%Y-%m-%d %H:%M:%S} UTC"
        )
        if title.cell_len + len(self._hint) <= width:
            title.append(self._hint, "dim")
        yield title
        if self._trouble:
            yield Text(printable(f"as it was then: {self._trouble}"), style="bold red")
        slots = sum(w.concurrency for w in fleet.alive)
        alive = len(fleet.alive)
        facts = (
            ("waiting", f"{fleet.waiting:,}"),
            ("running", f"{fleet.running:,} of {slots:,}"),
            ("workers", f"{alive}" if alive == len(fleet.workers) else f"{alive} of {len(fleet.workers)}"),
            ("jobs/s", _rate(fleet.jobs_per_s)),
            ("tokens/s", _rate(fleet.pieces_per_s)),
            ("readers", f"{fleet.readers:,}"),
            ("batches", f"{fleet.batches:,}"),
            ("given up", f"{fleet.given_up:,}"),
            ("cost today", f"${_dollars(fleet.today.total)}"),
        )
        line = Text()
        for name, value in facts:
            fact = Text.assemble((f"{name} ", "dim"), (value, "bold"))
            if line and line.cell_len + len(_BETWEEN) + fact.cell_len > width:
                yield line
                line = Text()
            line = Text(_BETWEEN).join((line, fact)) if line else fact
        yield line

    def _servers(self) -> Iterable[_Row]:
        for server in self._fleet.servers:
            name = printable(server.id.rpartition("-")[0])
            if server.alive:
                numbers = (f"{server.readers:,}", _rate(server.events_per_s), f"{server.events:,}")
                yield (name, *numbers, _duration(server.up_s))
            else:
                yield (name, Text(f"silent {_duration(server.silent_s)}", "red"), "-", "-", "-")

    def _models(self) -> Iterable[_Row]:
        today = self._fleet.today
        for row in today.rows:
            yield _sums(printable(row.group["model"]) or "-", row.sums)
        if len(today.rows) > 1:
            yield _sums("all", today.total)

    def _held(self) -> Iterable[_Row]:
        for held in self._fleet.held:
            for_s = _duration(held.for_s) if held.for_s else "-"
            yield (printable(held.name), Text(held.state, "red"), for_s, held.code or held.reason)

    def _batches(self) -> Iterable[_Row]:
        for batch in self._fleet.open_batches:
            yield (batch.id, batch.state, f"{batch.ended:,}/{batch.lines:,}", f"{batch.failed:,}")


def _table(columns: Sequence[_Column], rows: Iterable[_Row], width: int, most: int | None) -> Table | None:
    """A table of what fits into ``width``; None where there are no rows."""
    shown = [place for place, column in enumerate(columns) if width >= column.wide]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False, expand=False)
    for place in shown:
        column = columns[place]
        justify = "right" if column.number else "left"
        table.add_column(column.name, justify=justify, no_wrap=True, overflow="ellipsis", min_width=4)
    found = list(rows)
    if not found:
        return None
    for row in found[:most]:
        table.add_row(*(row[place] for place in shown))
    if most is not None and len(found) > most:
        table.add_row(Text(f"and {len(found) - most:,} more", "dim"))
    table.add_row("")
    return table


def _queue(queue: QueueLook) -> _Row:
    waits = queue.messages or queue.lines
    served = Text(str(queue.workers), "red" if waits and not queue.workers else "")
    messages = "?" if queue.messages is None else f"{queue.messages:,}"
    name = queue.family if queue.priority == "interactive" else f"{queue.family} {queue.priority}"
    oldest = "-" if queue.oldest_s is None else _duration(queue.oldest_s)
    return printable(name), messages, f"{queue.lines:,}", oldest, served


def _worker(worker: WorkerLook) -> _Row:
    state = Text(worker.state, _STATES.get(worker.state, ""))
    if not worker.alive:
        state = Text(f"silent {_duration(worker.silent_s)}", "red")
    done = worker.done
    failed = done.ended.get("failed", 0)
    return (
        printable(worker.name),
        printable(worker.family),
        state,
        f"{worker.running:,}/{worker.concurrency:,}",
        _rate(done.jobs_per_s) if worker.alive else "-",
        _rate(done.pieces_per_s) if worker.alive else "-",
        f"{done.ended.get('succeeded', 0):,}",
        Text(f"{failed:,}", "red" if failed else ""),
        _duration(done.up_s),
    )


def _sums(name: str, sums: Sums) -> _Row:
    asked = sums.input_tokens + sums.cache_read_tokens + sums.cache_write_tokens
    numbers = (sums.attempts, sums.failed, asked, sums.output_tokens)
    return (name, *(f"{number:,}" for number in numbers), f"${_dollars(sums)}")


def _dollars(sums: Sums) -> str:
    if sums.unpriced and not sums.cost_nano_usd:
        return "?"
    return f"{sums.cost_usd:,.2f}{'+?' if sums.unpriced else ''}"


def _rate(per_s: float) -> str:
    return f"{per_s:,.0f}" if per_s >= 100 or not per_s else f"{per_s:.1f}"


def _duration(seconds: float) -> str:
    """At most five characters: 45 s, 12 m, 3.4 h, 12 d."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} m"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.0f} d"
