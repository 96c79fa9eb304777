"""Logs of our processes: one line an event on standard error, for people or as JSON.

Every line that is about a job carries ``job_id``: bound by who serves a job, given as ``extra`` by who looks at many.
No line holds a prompt, an answer or a key. Needs structlog, which the extras of all servers bring.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, Final

import orjson
import structlog

from promptmill.settings import Settings
from promptmill.text import clean_text

bound = structlog.contextvars.bound_contextvars
"""``with bound(job_id=…)``: every line that the block writes, and what it awaits, carries it."""

_EXTRA: Final = ("job_id",)


def set_up_logs(settings: Settings, process: str) -> None:
    """Write this process's lines as the settings say. ``process`` names it: ``worker``, ``gateway``, ``claude-2`` …"""
    logging.captureWarnings(capture=True)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_formatter(settings, process))
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)


def _formatter(settings: Settings, process: str) -> logging.Formatter:
    as_json = settings.log_format == "json"
    first: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(allow=_EXTRA),
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="at"),
    ]
    last: list[Any] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    if as_json:

        def named(_logger: Any, _method: str, event: dict[str, Any]) -> dict[str, Any]:
            return {"process": process, **event}

        last += [named, structlog.processors.format_exc_info, structlog.processors.JSONRenderer(_json)]
    else:
        last.append(_for_people)
    return structlog.stdlib.ProcessorFormatter(foreign_pre_chain=first, processors=last)


def _json(event: dict[str, Any], **_options: Any) -> str:
    try:
        return orjson.dumps(event, default=str).decode()
    except TypeError:
        # A file's name, for one, may hold what is no UTF-8; without this `logging` writes the call's bare arguments.
        return orjson.dumps({name: clean_text(str(value)) for name, value in event.items()}).decode()


def _for_people(_logger: Any, _method: str, event: dict[str, Any]) -> str:
    """The job's id last, where the text does not name it."""
    job_id, text = event.get("job_id"), str(event["event"])
    about = f" [job {job_id}]" if job_id is not None and job_id not in text else ""
    line = f"{event['at'][:23]}Z {event['level'].upper()} {event['logger']}: {text}{about}"
    info = event.get("exc_info")
    # Without the values of variables, which structlog's own form shows: prompts would be among them.
    return line if not info else f"{line}\n{structlog.processors.ExceptionRenderer()(None, '', event)['exception']}"
