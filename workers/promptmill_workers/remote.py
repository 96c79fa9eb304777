"""What a worker answers to Celery's remote control: questions. Commands it refuses.

A worker owns its signals, its slots and its jobs. Celery's ``shutdown`` would kill it without handing its jobs back,
``pool_grow`` would start threads that no slot is for, ``revoke`` would have it throw a message away while the job
waits for ever. TERM drains a worker, and ``promptmill job cancel`` cancels a job, wherever it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final, cast

from celery.worker.consumer.control import Control
from celery.worker.control import Panel

from promptmill_workers.task_events import TaskEvents

logger = logging.getLogger(__name__)

ASKED: Final = ("ping", "stats", "conf", "registered", "active", "reserved", "scheduled", "revoked", "query_task")
"""What only looks. The lists of what waits are always empty: a message waits in the broker until its slot is free."""
_ADVICE: Final = "workers take no commands: stop one with TERM, and a job with `promptmill job cancel`"

Handler = Callable[..., Any]


def answer_only(consumer: Any, events: TaskEvents | None) -> None:
    """Have Celery's ``consumer`` answer questions and refuse commands. ``events``: None where none are to be sent."""
    known: dict[str, Handler] = cast("Any", Panel).data
    handlers = {name: known[name] if name in ASKED else _refusing(name) for name in known}
    handlers["active_queues"] = _active_queues
    for name in ("enable_events", "heartbeat"):
        handlers[name] = _asked(events)
    handlers["disable_events"] = _not_asked(events)
    for step in consumer.steps:
        if isinstance(step, Control):
            cast("Any", step).box.node.handlers = handlers


def _refusing(name: str) -> Handler:
    def refuse(state: Any, **arguments: Any) -> dict[str, str]:
        del state, arguments
        logger.warning("the remote command %s was refused", name)
        return {"error": _ADVICE}

    return refuse


def _active_queues(state: Any, **arguments: Any) -> list[dict[str, Any]]:
    """Both queues of the family. Celery would leave out those for which there is no slot at the moment."""
    del arguments
    return [dict(queue.as_dict(recurse=True)) for queue in state.app.conf.task_queues]


def _asked(events: TaskEvents | None) -> Handler:
    def asked(state: Any, **arguments: Any) -> dict[str, str]:
        del state, arguments
        if events is None:
            return {"error": "celery_events is off"}
        events.asked()
        return {"ok": "task events are sent for a while"}

    return asked


def _not_asked(events: TaskEvents | None) -> Handler:
    def not_asked(state: Any, **arguments: Any) -> dict[str, str]:
        del state, arguments
        if events is not None:
            events.refused()
        return {"ok": "no task events are sent"}

    return not_asked
