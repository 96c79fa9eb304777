"""Celery's side of a worker process: it brings messages, on a pool of threads that wait.

With :mod:`.remote` and :mod:`.task_events` all of the workers that knows Celery. One thin task: it carries a job's id
to the engine's event loop and waits there. A message waits in the broker until a slot is free for it: a queue for which
there is no room is not consumed. On Redis messages are not acknowledged at all: one that dies with its worker is sent
again by the sweep, and kombu's bookkeeping of unacknowledged messages costs more than the rest of a job's way through
Celery. On RabbitMQ each is acknowledged as soon as its job has a slot.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final

from celery import signals
from celery.concurrency.thread import TaskPool
from celery.exceptions import WorkerShutdown
from celery.worker import WorkController, state
from celery.worker.consumer import Consumer as CeleryConsumer
from celery.worker.request import Request

from promptmill.enqueue import broker_queue, foreign_queue, is_amqp, make_app
from promptmill.queues import TASK_NAME, queues_of
from promptmill.settings import Settings
from promptmill_workers.capacity import Capacity
from promptmill_workers.engine import Engine
from promptmill_workers.remote import answer_only
from promptmill_workers.task_events import TaskEvents

logger = logging.getLogger(__name__)

_JOIN_TIMEOUT_S: Final = 5.0
_PREFETCH: Final = 1
"""How many messages of a queue RabbitMQ sends before the first is acknowledged."""
_LOOK_AGAIN_S: Final = 1.0
_TURNING_POLL_S: Final = 0.2
"""How often it is looked whether the event loop turns."""
_POLL_S: Final = 0.25
"""How long kombu's thread waits in Redis for the next message. It asks for more queues, pauses and ends only then."""
_HELD_BACK_POLL_S: Final = 0.05
"""The same while a queue is not asked for."""
_EXIT_FOREIGN_QUEUE: Final = 1


class _Hint(Request):
    """A message that nobody waits to hear of: kombu would still ask Redis to forget what it never noted."""

    acknowledged = True


class _Pool(TaskPool):
    """Celery's threads, with every message counted from its arrival to its end."""

    capacity: Capacity
    follow: Callable[[], None]
    follow_soon: Callable[[], None]

    def on_apply(self, target: Any, args: Any = None, *others: Any, **options: Any) -> Any:
        """Runs in Celery's own thread, before the next message is asked for or this one is acknowledged."""
        queue = args[2]["delivery_info"]["routing_key"]
        self.capacity.take(queue)
        result: Any = super().on_apply(target, args, *others, **options)
        ended: Future[Any] = result.f
        ended.add_done_callback(lambda _: self._done(queue))
        self.follow()
        return result

    def _done(self, queue: str) -> None:
        self.capacity.give(queue)
        self.follow_soon()


class _Controller(WorkController):
    """Celery's worker, which starts no job without a free slot."""

    capacity: Capacity
    give_back: Callable[[Any], None]

    def _process_task(self, req: Any) -> None:
        # RabbitMQ serves its queues side by side: two may have sent a message for the last slot. On Redis, where
        # nothing can be given back, messages are asked for one at a time.
        if not req.acknowledged and not self.capacity.has_room(req.delivery_info["routing_key"]):
            self.give_back(req)
        else:
            super()._process_task(req)  # pyright: ignore[reportUnknownMemberType]


class _CeleryConsumer(CeleryConsumer):
    """Celery's consumer without what we do not use, and with an end where the broker's queues are not ours."""

    connected: Callable[[], None]

    class Blueprint(CeleryConsumer.Blueprint):
        # Would make 28 queues on RabbitMQ for delays of Celery's.
        default_steps: Any = [  # noqa: RUF012 - as Celery has it
            step for step in CeleryConsumer.Blueprint.default_steps if "delayed_delivery" not in str(step)
        ]

    def on_ready(self) -> None:
        """Called after every connect."""
        super().on_ready()
        self.connected()

    def on_connection_error_after_connected(self, exc: Any) -> None:
        """Celery would try again for ever, and say no more than that the connection was lost."""
        if foreign := foreign_queue(exc):
            logger.critical("this worker ends: %s; %s", *foreign)
            raise WorkerShutdown(_EXIT_FOREIGN_QUEUE)
        super().on_connection_error_after_connected(exc)  # pyright: ignore[reportUnknownMemberType]


def _events_of(app: Any, engine: Engine) -> TaskEvents:
    counts, running = engine.runner.counts, engine.runner.running
    every_s = engine.settings.heartbeat_s
    events = TaskEvents(app, engine.store, engine.worker_id, every_s, lambda: (len(running), counts.by_state.total()))
    counts.listener = events
    return events


class Consumer:
    """A Celery worker in a thread of its own; ``on_ready`` is called there once it consumes."""

    def __init__(self, engine: Engine, settings: Settings, on_ready: Callable[[], None]) -> None:
        self._queues = queues_of(engine.family)
        self._amqp = is_amqp(settings.queue_url)
        self._app = self._make_app(engine, settings, self._queues)
        self._on_ready = on_ready
        self._controller: Any = _Controller(
            app=self._app,
            hostname=engine.worker_id,
            pool_cls=_Pool,
            consumer_cls=_CeleryConsumer,
            concurrency=settings.concurrency,
            loglevel=settings.log_level.upper(),
            queues=self._queues[0],  # the other one once this is looked at, as after a pause
            without_heartbeat=True,
            without_mingle=True,
            without_gossip=True,
            ready_callback=self._ready,
        )
        self._controller.consumer.initial_prefetch_count = _PREFETCH
        self._controller.consumer.connected = self._connected
        self._events = _events_of(self._app, engine)
        answer_only(self._controller.consumer, self._events if settings.celery_events else None)
        self._capacity = Capacity(settings.concurrency, self._queues[1], settings.batch_share)
        engine.feeding.puller.share(self._capacity, self._look_anew)
        self._controller.capacity, self._controller.give_back = self._capacity, self._give_back
        pool = self._controller.pool
        pool.capacity, pool.follow, pool.follow_soon = self._capacity, self._follow, self._follow_soon
        self._paused = self._following = self._still = False
        self._looking: Any = None
        self._turning = engine.turning
        self._turning.found = lambda: self._controller.consumer.call_soon(self._follow_turning)
        self._returned: list[Any] = []
        self._held_back = True
        """Whether a queue is not consumed; while none is, the end of a job needs no look at the queues."""
        self._thread = threading.Thread(target=self._run, name="celery", daemon=True)
        self.failed = False

    @staticmethod
    def _make_app(engine: Engine, settings: Settings, queues: tuple[str, ...]) -> Any:
        app = make_app(settings.queue_url)
        app.conf.update(
            task_queues=[broker_queue(name, settings.queue_url) for name in queues],
            task_acks_late=False,
            worker_prefetch_multiplier=1,
            worker_enable_prefetch_count_reduction=False,
            worker_hijack_root_logger=False,
            worker_send_task_events=False,
            worker_cancel_long_running_tasks_on_connection_loss=False,
            broker_connection_max_retries=None,
            # Redis that became a replica (a failover), a queue that somebody deleted: Celery otherwise dies of it.
            broker_channel_error_retry=True,
            # Exclusive, it would be locked by a connection of ours that broke and that the broker still believes in;
            # newer RabbitMQ refuses queues that are neither exclusive nor durable.
            control_queue_exclusive=False,
            control_queue_durable=True,
        )
        message = Request if is_amqp(settings.queue_url) else _Hint

        @app.task(name=TASK_NAME, bind=True, ignore_result=True, Request=message)
        def complete(task: Any, job_id: str) -> None:  # pyright: ignore[reportUnusedFunction]
            engine.serve(job_id, task.request.delivery_info["routing_key"])

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

    # -- which queues are consumed ------------------------------------------------------------------------------

    def _connected(self) -> None:
        """It consumes what it consumed before the connection was lost; slots may have become free since."""
        self._returned.clear()  # the broker has given them to others by itself
        self._follow()
        # The timer outlives a connection, or not, as Celery has it: never two of them.
        if self._looking is not None:
            self._looking.cancel()
        timer = self._controller.consumer.timer
        self._looking = timer.call_repeatedly(_TURNING_POLL_S, self._follow_turning)

    def _follow_turning(self) -> None:
        """Consume nothing while the event loop stands still. Only here is it decided, or its end would be missed."""
        if self._still != self._turning.stands_still:
            self._still = not self._still
            logger.warning("the event loop %s", "stands still: no message is taken" if self._still else "turns again")
            self._follow()

    def _give_back(self, request: Any) -> None:
        state.task_ready(request)  # pyright: ignore[reportUnknownMemberType]
        self._returned.append(request.message)
        self._follow()

    def _follow(self) -> None:
        """Consume the queues for which there is room, and no other. Only in Celery's thread.

        While RabbitMQ is asked, messages may arrive and call this again; so after each change all is looked at anew.
        What is selected here also holds after a reconnect, so an error may leave this half done.
        """
        if self._following:
            return
        self._following = True
        try:
            consumer = self._controller.consumer
            batch_waits = self._amqp and self._others_first(consumer)
            while self._change_one(consumer, batch_waits):
                continue
            # Now, as their queue is no longer consumed: it would come straight back.
            while self._returned:
                self._returned.pop().reject_log_error(logger, consumer.connection_errors, requeue=True)
        finally:
            self._following = False
        if not self._amqp:
            channel = consumer.task_consumer.channel
            channel.brpop_timeout = _HELD_BACK_POLL_S if self._held_back else _POLL_S

    def _others_first(self, consumer: Any) -> bool:
        """RabbitMQ serves its queues side by side. The last free slot goes to an interactive job, if one waits."""
        interactive, batch = self._queues
        if self._paused or batch in self._app.amqp.queues.consume_from or self._capacity.free != 1:
            return False
        if not consumer.task_consumer.channel.queue_declare(interactive, passive=True).message_count:
            return False
        consumer.timer.call_after(_LOOK_AGAIN_S, self._follow)
        return True

    def _change_one(self, consumer: Any, batch_waits: bool) -> bool:
        """Begin or cease to consume one queue; False where there is nothing to change."""
        self._held_back = True  # a slot that gets free while we look must have us look again
        queues: Any = self._app.amqp.queues
        none = self._paused or self._still
        wanted = [] if none else [name for name in self._queues if self._capacity.has_room(name)]
        if batch_waits and self._queues[1] in wanted:
            wanted.remove(self._queues[1])
        for position, name in enumerate(self._queues):
            if name in queues.consume_from and name not in wanted:
                self._leave(consumer, name)
                return True
            if name in wanted and name not in queues.consume_from:
                # Redis serves queues in the order in which they were added: the later ones come off and on again.
                for later in self._queues[position + 1 :]:
                    self._leave(consumer, later)
                consumer.task_consumer.add_queue(queues.select_add(queues[name]))
                consumer.task_consumer.consume()
                return True
        self._held_back = len(wanted) < len(self._queues)
        return False

    def _leave(self, consumer: Any, name: str) -> None:
        self._app.amqp.queues.deselect(name)
        consumer.task_consumer.cancel_by_queue(name)

    def _follow_soon(self) -> None:
        """As :meth:`_follow`, from any thread, where something may have changed. Returns at once."""
        if self._held_back and not self._paused:
            self._controller.consumer.call_soon(self._follow)

    def _look_anew(self) -> None:
        """As :meth:`_follow_soon`, where fewer messages may come than before."""
        if not self._paused:
            self._controller.consumer.call_soon(self._follow)

    def pause(self) -> None:
        """Take no more messages. Returns at once; a message already popped may still arrive."""
        self._paused = True
        self._controller.consumer.call_soon(self._follow)

    def stop(self) -> bool:
        """End the thread, when no job runs any more; True where it ended in time. Blocks: call it from a thread."""
        # Its own thread does it: two that read RabbitMQ's answers from one connection wait for ever.
        self._events.stop()
        state.should_stop = 0
        self._controller.consumer.call_soon(lambda: None)  # wakes it, and it looks
        self._thread.join(_JOIN_TIMEOUT_S)
        return not self._thread.is_alive()

    @property
    def alive(self) -> bool:
        """False once Celery gave up or was stopped."""
        # Having given up, it waits for the jobs that run, which may take long, and brings no more meanwhile.
        return self._thread.is_alive() and not self._controller.exitcode
