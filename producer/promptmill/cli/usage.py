"""``promptmill usage`` and ``promptmill usage verify``."""

from __future__ import annotations

import asyncio
import csv
import io
import sys
from typing import Annotated, Final

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from promptmill.settings import Settings
from promptmill.usage.report import Sums, UsageReport, UsageRow
from promptmill.usage.verify import Verification, verify_usage

from . import exits
from .common import ConfigOption, DataDirOption, JsonOption, client_settings, open_producer
from .output import out, out_json, printable

app = typer.Typer(invoke_without_command=True, help="What was used, in tokens and dollars.")

FromOption = Annotated[
    str | None, typer.Option("--from", metavar="DAY", help="The first day (UTC): 2026-01-31, today, yesterday.")
]
ToOption = Annotated[str | None, typer.Option("--to", metavar="DAY", help="The last day, likewise.")]

_BAR_CHARS: Final = 40
_DIFFERENCES_MAX: Final = 20
_WIDE: Final = 10_000


@app.callback()
def usage(
    context: typer.Context,
    *,
    from_day: FromOption = None,
    to_day: ToOption = None,
    by: Annotated[
        str, typer.Option(metavar="NAMES", help="user, model, backend, role, day; joined with commas.")
    ] = "user,model",
    user: Annotated[str | None, typer.Option(help="Only this user's.")] = None,
    as_json: JsonOption = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Write CSV with a heading.")] = False,
    chart: Annotated[bool, typer.Option("--chart", help="Draw a bar for each group.")] = False,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """What was used from one day through another; today where no day is given."""
    if context.invoked_subcommand is not None:
        return
    if as_json + as_csv + chart > 1:
        raise typer.BadParameter("give one of --json, --csv and --chart", param_hint="--chart")

    async def read(settings: Settings) -> UsageReport:
        async with open_producer(settings) as producer:
            return await producer.usage(from_day, to_day, by, user)

    report = asyncio.run(read(client_settings(config, data_dir)))
    if as_json:
        out_json(report.to_dict())
    elif as_csv:
        out(_csv(report))
    elif not report.rows:
        out("no usage")
    else:
        _print(_chart(report) if chart else _table(report))


@app.command()
def verify(
    *,
    from_day: FromOption = None,
    to_day: ToOption = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Recompute the sums from the ledger's entries, and say whether they match; exit code 1 where they do not."""

    async def look(settings: Settings) -> Verification:
        async with open_producer(settings) as producer:
            return await verify_usage(await producer.store(), from_day, to_day)

    found = asyncio.run(look(client_settings(config, data_dir)))
    if as_json:
        out_json(found.to_dict())
    else:
        out(_said(found))
    raise typer.Exit(exits.OK if found.ok else exits.FAILED)


def _said(found: Verification) -> str:
    span = found.days[0] if len(found.days) == 1 else f"{found.days[0]} to {found.days[-1]}"
    entries = f"{found.entries} {'entry' if found.entries == 1 else 'entries'}"
    if found.ok:
        return f"the sums match the ledger: {span}, {entries}"
    lines = [f"{d.day} {d.field}: {d.found}, but the entries make {d.expected}" for d in found.differences]
    shown = [printable(line) for line in lines[:_DIFFERENCES_MAX]]
    if len(lines) > len(shown):
        shown.append(f"and {len(lines) - len(shown)} more")
    return "\n".join([f"the sums do not match the ledger: {span}, {entries}", *shown])


def _csv(report: UsageReport) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, [*report.by, *Sums().to_dict()], lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.to_dict() for row in report.rows)
    return text.getvalue().removesuffix("\n")


def _print(table: Table) -> None:
    # Into a file or a pipe nothing is wrapped or cut.
    width = None if sys.stdout.isatty() else _WIDE
    Console(width=width, highlight=False, markup=False, emoji=False).print(table)


def _dollars(sums: Sums) -> str:
    if sums.unpriced and not sums.cost_nano_usd:
        return "?"
    return f"{sums.cost_usd:.6f}{'+?' if sums.unpriced else ''}"


def _table(report: UsageReport) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_footer=len(report.rows) > 1, pad_edge=False)
    for position, name in enumerate(report.by):
        table.add_column(name, "total" if position == 0 else "")
    amounts = ("attempts", "failed", "input", "output", "cache read", "cache write", "estimated", "dollars")
    for name, total in zip(amounts, _cells(report.total), strict=True):
        table.add_column(name, total, justify="right")
    for row in report.rows:
        table.add_row(*_names(row), *_cells(row.sums))
    return table


def _cells(sums: Sums) -> list[str]:
    counts = (
        sums.attempts,
        sums.failed,
        sums.input_tokens,
        sums.output_tokens,
        sums.cache_read_tokens,
        sums.cache_write_tokens,
        sums.estimated,
    )
    return [*(str(count) for count in counts), _dollars(sums)]


def _chart(report: UsageReport) -> Table:
    """A bar for each group: dollars, or tokens where nothing has a price."""
    priced = report.total.cost_nano_usd > 0
    amounts = [row.sums.cost_nano_usd if priced else row.sums.tokens for row in report.rows]
    most = max([1, *amounts])
    table = Table.grid(padding=(0, 2, 0, 0))
    for row, amount in zip(report.rows, amounts, strict=True):
        bar = "█" * max(round(amount / most * _BAR_CHARS), 1 if amount else 0)
        label = f"${_dollars(row.sums)}" if priced else f"{row.sums.tokens} tokens"
        table.add_row(" ".join(_names(row)) or "all", bar, label)
    return table


def _names(row: UsageRow) -> list[str]:
    return [printable(name) or "-" for name in row.group.values()]
