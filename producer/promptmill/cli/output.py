"""What commands write: results to standard output, everything else to standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

from promptmill.contract import Cancelled, Done, Error, Event, Job, Progress, Restart, Token
from promptmill.errors import PromptmillError

from . import exits

_CONTROLS: Final = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t\r"}


def out(text: str) -> None:
    """A line to standard output, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """A line to standard error."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def yes(held: bool) -> str:
    """Whether something that was checked is so."""
    return "yes" if held else "NO"


def out_json(data: Any) -> None:
    """One JSON value on one line of standard output."""
    out(json.dumps(data, ensure_ascii=False, separators=(",", ":")))


def show_error(error: PromptmillError, *, as_json: bool) -> None:
    """``error [code]: message``, or ``{"error": {"code": …, "message": …, "retryable": …}}``, to standard error."""
    if as_json:
        note(json.dumps({"error": error.to_dict()}, ensure_ascii=False))
    else:
        note(f"error [{error.code}]: {error.message}")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned columns; the first row is the heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def show_time(moment: datetime | None) -> str:
    """A moment in the terminal's own time zone, to the second."""
    return moment.astimezone().isoformat(" ", "seconds") if moment else "-"


def show_job(job: Job) -> str:
    """A job for people: what is known, one field a line, and its text last."""
    fields: dict[str, Any] = {
        "id": job.id,
        "state": job.state,
        "user": job.user,
        "role": job.role,
        "slot": job.slot,
        "model": job.model,
        "backend": job.backend,
        "attempt": job.attempt or None,
        "created": show_time(job.created_at),
        "started": show_time(job.started_at) if job.started_at else None,
        "finished": show_time(job.finished_at) if job.finished_at else None,
        "finish": job.finish_reason,
        "usage": _usage(job),
        "cost": f"${job.cost_usd:.6f}" if job.cost_usd is not None else None,
        "error": f"{job.error.code}: {job.error.message}" if job.error else None,
        "metadata": json.dumps(job.metadata, ensure_ascii=False) if job.metadata else None,
    }
    lines = [f"{name:<9}{printable(str(value))}" for name, value in fields.items() if value is not None]
    return "\n".join([*lines, *(["", printable(job.text)] if job.text else [])])


def _usage(job: Job) -> str | None:
    if job.usage is None:
        return None
    about = " (estimated)" if job.usage.estimated else ""
    return f"{job.usage.input_tokens} in, {job.usage.output_tokens} out{about}"


def printable(text: str) -> str:
    """``text`` as it is for a file or a pipe; for a terminal without control characters, which could rewrite it."""
    return text.translate(_CONTROLS) if sys.stdout.isatty() else text


class EventPrinter:
    """Shows a job's events as they come and knows how the job ended.

    For people: the tokens, joined, are the text and nothing else on standard output, with a line end behind them where
    the text has none. ``restart`` is told on standard error, and the answer begins again on a new line. With
    ``as_json`` every event is a line: ``{"job_id": …, "id": …, "type": …, …}``.
    """

    def __init__(self, job_id: str, *, as_json: bool, verbose: bool = False) -> None:
        self.exit_code = exits.OK
        self._job_id = job_id
        self._as_json = as_json
        self._verbose = verbose
        self._open_line = False

    def show(self, event: Event) -> None:
        """One event, in order."""
        if isinstance(event, Error):
            self.exit_code = exits.FAILED
        elif isinstance(event, Cancelled):
            self.exit_code = exits.CANCELLED
        if self._as_json:
            out_json({"job_id": self._job_id, "id": event.id, **json.loads(event.to_json())})
        else:
            self._show(event)

    def break_line(self) -> None:
        """End the line that the answer stands on, so that what comes next has its own."""
        if self._open_line:
            out("")
            self._open_line = False

    def _show(self, event: Event) -> None:
        if isinstance(event, Token):
            sys.stdout.write(printable(event.text))
            sys.stdout.flush()
            self._open_line = not event.text.endswith("\n")
        elif isinstance(event, Restart):
            self.break_line()
            note(f"(the answer begins anew: {event.reason})")
        elif isinstance(event, Done):
            self.break_line()
            if self._verbose:
                note(f"(done: {event.model or '?'}, {event.finish_reason or '?'})")
        elif isinstance(event, Error):
            self.break_line()
            note(f"error [{event.code}]: {event.message}")
        elif isinstance(event, Cancelled):
            self.break_line()
            note(f"cancelled: {event.reason}")
        elif isinstance(event, Progress) and self._verbose:
            self.break_line()
            note(f"({event.phase}{f': {event.message}' if event.message else ''})")
