"""What Flower and other monitors of Celery hear of a worker: its jobs, in Celery's own events.

Celery would send events for its messages: several publishes a job, whether anybody listens or not, and nothing of how a
job ended or of batches' lines, which have no messages. These are made from what really happened, many go in one
publish, and only while somebody listens: Flower asks for them every five seconds.

=====================  ==============================================================================================
event                  when
=====================  ==============================================================================================
``task-sent``          with the claim; its time is when the job was queued
``task-received``      the claim, with model, role and priority as ``kwargs``
``task-started``       the same
``task-succeeded``     ``result`` is the model that answered; never the answer
``task-failed``        ``exception`` is the error's code; never its message
``task-revoked``       cancelled (``terminated``), or not begun in time (``expired``)
``task-retried``       it went back to the queue
=====================  ==============================================================================================
"""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import threading
import time
from collections import deque
from collections.abc import Callable
from importlib import metadata
from typing import Any, Final

from promptmill.enqueue import BROKER_ERRORS
from promptmill.errors import StoreUnavailable
from promptmill.queues import TASK_NAME
from promptmill.store import Record, Store

logger = logging.getLogger(__name__)

LISTENED_S: Final = 30.0
"""How long after it was asked for last a worker sends events."""
_EVERY_S: Final = 0.5
_TOGETHER: Final = 500
_WAITING_MAX: Final = 20_000
_PAUSE_S: Final = 2.0
_OFFLINE_S: Final = 1.0
_SOFTWARE: Final = {"sw_ident": "promptmill", "sw_ver": metadata.version("promptmill"), "sw_sys": platform.system()}

Event = tuple[str, dict[str, Any]]


class TaskEvents:
    """Sends from a thread of its own, on a connection of its own. All but the thread runs in the event loop.

    ``doing`` answers how many jobs run now, and how many ended since the worker began.
    """

    def __init__(
        self, app: Any, store: Store, worker_id: str, heartbeat_s: float, doing: Callable[[], tuple[int, int]]
    ) -> None:
        self._app = app
        self._store = store
        self._worker_id = worker_id
        self._heartbeat_s = heartbeat_s
        self._doing = doing
        self._waiting: deque[Event] = deque(maxlen=_WAITING_MAX)
        self._until = 0.0
        self._told_online = False
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._started: dict[str, float] = {}
        self._asking: set[asyncio.Task[None]] = set()

    # -- who listens; from Celery's thread ----------------------------------------------------------------------

    def asked(self) -> None:
        """Somebody listens."""
        if self._stopping:
            return
        self._until = time.monotonic() + LISTENED_S
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="task events", daemon=True)
            self._thread.start()
        self._wake.set()

    def refused(self) -> None:
        """Nobody listens any more."""
        self._until = 0.0

    @property
    def wanted(self) -> bool:
        """Whether somebody listens."""
        return time.monotonic() < self._until

    # -- what happens to jobs; from the event loop --------------------------------------------------------------

    def began(self, record: Record) -> None:
        """A job was claimed here."""
        if not self.wanted:
            return
        now = time.time()
        head = record.head
        self._started[record.job_id] = now
        about = {name: head[name] for name in ("model", "role", "priority") if head.get(name)}
        shared = {"uuid": record.job_id, "name": TASK_NAME, "args": repr((record.job_id,)), "kwargs": repr(about)}
        way = {"retries": 0, "eta": None, "expires": None, "root_id": record.job_id, "parent_id": None}
        queued_at = int(record.st["queued"]) / 1000
        sent = {"queue": record.queue, "exchange": "", "routing_key": record.queue, "timestamp": queued_at}
        self._waiting.append(("task-sent", {**shared, **way, **sent}))
        self._waiting.append(("task-received", {**shared, **way, "timestamp": now}))
        self._waiting.append(("task-started", {"uuid": record.job_id, "timestamp": now}))

    def ended(self, job_id: str, state: str, end: dict[str, Any]) -> None:
        """A job ended here, as ``succeeded`` or ``failed``."""
        began = self._started.pop(job_id, None)
        if not self.wanted:
            return
        now = time.time()
        fields: dict[str, Any] = {"uuid": job_id, "timestamp": now}
        if began is not None:
            fields["runtime"] = round(now - began, 6)
        if state == "succeeded":
            self._waiting.append(("task-succeeded", {**fields, "result": end.get("model") or ""}))
        else:
            self._waiting.append(("task-failed", {**fields, "exception": end["error"]["code"], "traceback": None}))

    def stopped(self, job_id: str) -> None:
        """A job ended here without an end of ours: somebody cancelled it, or it runs elsewhere."""
        began = self._started.pop(job_id, None)
        self._find_out(job_id, ran=began is not None)

    def put_back(self, job_id: str) -> None:
        """A job waits again."""
        self._started.pop(job_id, None)
        if self.wanted:
            self._waiting.append(("task-retried", _requeued(job_id)))

    def passed_over(self, job_id: str) -> None:
        """A job's message came, and it was not to be claimed."""
        self._find_out(job_id, ran=False)

    def _find_out(self, job_id: str, *, ran: bool) -> None:
        if self.wanted:
            task = asyncio.create_task(self._look(job_id, ran=ran), name="task events")
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)

    async def _look(self, job_id: str, *, ran: bool) -> None:
        try:
            record = await self._store.find(job_id)
        except StoreUnavailable as err:
            logger.debug("what became of job %s is not told: %s", job_id, err)
            return
        now = time.time()
        if record is None or record.state in {"succeeded", "failed"}:
            return  # told by who ended it
        if record.state in {"cancelled", "expired"}:
            expired = record.state == "expired"
            if not ran:
                shared = {"uuid": job_id, "name": TASK_NAME, "args": repr((job_id,)), "kwargs": "{}"}
                self._waiting.append(("task-received", {**shared, "timestamp": now}))
            end = {"uuid": job_id, "terminated": not expired, "signum": None, "expired": expired, "timestamp": now}
            self._waiting.append(("task-revoked", end))
        elif ran and record.st.get("worker") != self._worker_id:
            self._waiting.append(("task-retried", _requeued(job_id)))

    # -- the thread ---------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Say that the worker is gone, if anybody listens. Blocks for a second at most."""
        self._stopping, self._until = True, 0.0
        self._wake.set()
        if self._thread is not None:
            self._thread.join(_OFFLINE_S)

    def _run(self) -> None:
        while not self._stopping:
            self._wake.wait()
            self._wake.clear()
            if not self.wanted:
                continue
            try:
                self._send_while_wanted()
            except BROKER_ERRORS as err:
                logger.info("no events for monitors, the broker does not answer: %s", err)
                time.sleep(_PAUSE_S)
                self._wake.set()

    def _send_while_wanted(self) -> None:
        with self._app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=0)
            dispatcher = self._app.events.Dispatcher(
                connection,
                hostname=self._worker_id,
                buffer_while_offline=False,
                buffer_group={"task"},
                buffer_limit=_TOGETHER,
            )
            self._about(dispatcher, "worker-online")
            beat_at = 0.0
            while self.wanted and not self._stopping:
                if time.monotonic() >= beat_at:
                    self._about(dispatcher, "worker-heartbeat")
                    beat_at = time.monotonic() + self._heartbeat_s
                self._send(dispatcher)
                self._wake.wait(_EVERY_S)
                if not self._stopping:
                    self._wake.clear()
            self._send(dispatcher)
            if self._stopping:
                self._about(dispatcher, "worker-offline")
            self._waiting.clear()
            self._started.clear()

    def _send(self, dispatcher: Any) -> None:
        while self._waiting:
            kind, fields = self._waiting.popleft()
            dispatcher.send(kind, **fields)
        dispatcher.flush()

    def _about(self, dispatcher: Any, kind: str) -> None:
        active, processed = self._doing()
        # It counts as gone after twice ``freq``.
        facts = {"freq": max(5 * self._heartbeat_s, 5.0), "loadavg": [round(load, 2) for load in os.getloadavg()]}
        dispatcher.send(kind, active=active, processed=processed, **facts, **_SOFTWARE)


def _requeued(job_id: str) -> dict[str, Any]:
    return {"uuid": job_id, "exception": "requeued", "timestamp": time.time()}
