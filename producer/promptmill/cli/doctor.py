"""``promptmill doctor``."""

from __future__ import annotations

import asyncio

import typer

from promptmill.doctor import Report, examine

from . import exits
from .common import ConfigOption, DataDirOption, JsonOption
from .output import out, out_json

_MARKS = {"ok": "ok  ", "off": "-   ", "fail": "FAIL"}


def doctor(*, as_json: JsonOption = False, config: ConfigOption = None, data_dir: DataDirOption = None) -> None:
    """Say what is configured, reachable, installed and missing, and what to do about it.

    Exit code 1 where something that is configured does not work.
    """
    report = asyncio.run(examine(config, data_dir))
    if as_json:
        out_json(report.to_dict())
    else:
        _show(report)
    raise typer.Exit(exits.OK if report.ok else exits.FAILED)


def _show(report: Report) -> None:
    group = ""
    for check in report.checks:
        if check.group != group:
            group = check.group
            out(f"{group}")
        out(f"  {_MARKS[check.status]} {check.name}: {check.found}")
        if check.advice:
            out(f"       -> {check.advice}")
    failed = sum(check.status == "fail" for check in report.checks)
    out("")
    out("all that is configured works" if report.ok else f"{failed} of {len(report.checks)} checks failed")
