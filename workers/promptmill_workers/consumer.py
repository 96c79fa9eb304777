"""Celery's side of a worker process: it brings messages, on a pool of threads that wait.

The only module of the workers that knows Celery. One thin task: it carries a job's id to the engine's event loop and
waits there. Nothing is prefetched, so a message waits in the broker until a slot is free for it. Messages are not
acknowledged at all on Redis: one that dies with its worker is sent again by the sweep, and kombu's bookkeeping of
unacknowledged messages costs more than the rest of a job's way through Celery.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, Final

from celery import signals
from celery.worker import WorkController
from celery.worker.request import Request
from kombu.entity import Queue

from promptmill.enqueue import make_app
from promptmill.queues import TASK_NAME, queues_of
from promptmill.settings import Settings
from promptmill_workers.engine import Engine

logger = logging.getLogger(__name__)

_JOIN_TIMEOUT_S: Final = 5.0


class _Hint(Request):
    """A message that nobody waits to hear of: kombu would still ask Redis to forget what it never noted."""

    acknowledged = True


class Consumer:
    """A Celery worker in a thread of its own; ``on_ready`` is called there once it consumes."""

    def __init__(self, engine: Engine, settings: Settings, on_ready: Callable[[], None]) -> None:
        self._queues = queues_of(engine.family)
        self._app = self._make_app(engine, settings, self._queues)
        self._on_ready = on_ready
        self._controller: Any = WorkController(
            app=self._app,
            hostname=engine.worker_id,
            pool_cls="threads",
            concurrency=settings.concurrency,
            loglevel=settings.log_level.upper(),
            queues=",".join(self._queues),
            without_heartbeat=True,
            without_mingle=True,
            without_gossip=True,
            ready_callback=self._ready,
        )
        self._thread = threading.Thread(target=self._run, name="celery", daemon=True)
        self.failed = False

    @staticmethod
    def _make_app(engine: Engine, settings: Settings, queues: tuple[str, ...]) -> Any:
        app = make_app(settings.queue_url)
        # On AMQP the bound on unacknowledged messages is the only one there is.
        unacknowledged = not settings.queue_url.startswith("amqp")
        app.conf.update(
            task_queues=[Queue(name, routing_key=name, no_ack=unacknowledged) for name in queues],
            task_acks_late=False,
            worker_disable_prefetch=True,
            worker_prefetch_multiplier=1,
            worker_hijack_root_logger=False,
            worker_send_task_events=False,
            worker_cancel_long_running_tasks_on_connection_loss=False,
            broker_connection_max_retries=None,
        )

        @app.task(name=TASK_NAME, bind=True, ignore_result=True, Request=_Hint if unacknowledged else Request)
        def complete(task: Any, job_id: str) -> None:  # pyright: ignore[reportUnusedFunction]
            delivery: dict[str, Any] = task.request.delivery_info or {}
            engine.serve(job_id, delivery.get("routing_key") or queues[0])

        return app

    def start(self) -> None:
        """Begin to consume."""
        self._thread.start()

    def _run(self) -> None:
        self._controller.start()
        # Celery's start() returns both when it was stopped and when it gave up.
        self.failed = bool(self._controller.exitcode)

    def _ready(self, consumer: Any) -> None:
        worker_ready: Any = signals.worker_ready
        worker_ready.send(sender=consumer)  # Flower and other listeners expect what Celery's own worker says
        self._on_ready()

    def pause(self) -> None:
        """Take no more messages. Returns at once; a message already popped may still arrive."""
        consumer = self._controller.consumer
        for queue in self._queues:
            consumer.call_soon(consumer.cancel_task_queue, queue)

    def stop(self) -> bool:
        """End the thread, when no job runs any more; True where it ended in time. Blocks: call it from a thread."""
        self._controller.stop()
        self._thread.join(_JOIN_TIMEOUT_S)
        return not self._thread.is_alive()

    @property
    def alive(self) -> bool:
        """False once Celery gave up or was stopped."""
        return self._thread.is_alive()
