"""Flower at our broker: started with our Celery app, read only, with a login, and on our own address.

What it shows comes from the workers: see :mod:`promptmill_workers.task_events` and :mod:`promptmill_workers.remote`.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterable
from typing import Any, Final, cast

from flower.api.tasks import GetQueueLengths
from flower.app import Flower
from flower.options import options
from flower.urls import settings as flower_settings
from flower.views import BaseHandler, monitor
from flower.views.broker import BrokerView
from tornado.httpserver import HTTPServer
from tornado.ioloop import IOLoop
from tornado.web import ErrorHandler, authenticated, url

from promptmill.enqueue import broker_queue, make_app
from promptmill.queues import queues_of
from promptmill.settings import LOOPBACK, Settings

logger = logging.getLogger(__name__)

MAX_TASKS: Final = 10_000
"""How many jobs it remembers; the oldest are forgotten."""
_INSPECT_MS: Final = 3_000.0
_OFFLINE_KEPT_S: Final = 600
_COLUMNS: Final = "uuid,state,kwargs,result,exception,received,runtime,worker"


class _Metrics(monitor.Metrics):
    """Flower gives its metrics to anybody, and they name the workers."""

    get: Any = authenticated(monitor.Metrics.get)


class _AllQueues(BaseHandler):
    """Flower lists the queues that a worker serves; those that nobody serves are the ones to know of."""

    def get_active_queue_names(self) -> list[str]:
        served: list[str] = cast("Any", super()).get_active_queue_names()
        ours: list[Any] = cast("Any", self).capp.conf.task_queues
        return sorted({*served, *(queue.name for queue in ours)})


class _Lengths(_AllQueues, GetQueueLengths):
    pass


class _Broker(_AllQueues, BrokerView):
    pass


class _App(Flower):
    """Flower, but for the name under which a page asks for it.

    Without a login a page of another site could have the browser ask here by a name of its own that leads to this
    machine, and read the answer.
    """

    def find_handler(self, request: Any, **arguments: Any) -> Any:
        login = cast("Any", self).options.basic_auth
        if not login and request.host_name not in {*LOOPBACK, "[::1]"}:
            return self.get_handler_delegate(request, ErrorHandler, {"status_code": 403})
        return super().find_handler(request, **arguments)


def make_flower(settings: Settings, families: Iterable[str]) -> Any:
    """The application, not started. Call it in the event loop that it is to run in."""
    app = make_app(settings.queue_url)
    app.conf.update(
        task_queues=[broker_queue(name, settings.queue_url) for family in families for name in queues_of(family)],
        # Newer RabbitMQ refuses queues that are neither exclusive nor durable; Celery's own default is such a queue.
        event_queue_exclusive=True,
        control_queue_exclusive=False,
        control_queue_durable=True,
    )
    chosen = {
        "address": settings.flower_host,
        "port": settings.flower_port,
        "basic_auth": [f"{settings.flower_user}:{settings.flower_password}"] if settings.flower_password else [],
        "read_only": True,
        "persistent": False,
        "db": "",
        "enable_events": True,
        "inspect_timeout": _INSPECT_MS,
        "max_tasks": MAX_TASKS,
        "tasks_columns": _COLUMNS,
        "purge_offline_workers": _OFFLINE_KEPT_S,
        "broker_api": settings.flower_broker_api,
        "url_prefix": "",
    }
    for name, value in chosen.items():
        setattr(options, name, value)
    made: Any = _App(capp=app, options=options, io_loop=IOLoop.current(), **flower_settings)
    # Before Flower's own handlers: the first that fits is taken.
    ours = [url(r"/metrics", _Metrics), url(r"/api/queues/length", _Lengths), url(r"/broker", _Broker)]
    router = made.default_router
    router.rules[:0] = [router.process_rule(rule) for rule in ours]
    return made


async def serve(settings: Settings, families: Iterable[str], listener: socket.socket, stop: asyncio.Event) -> None:
    """Serve on a socket that listens until ``stop`` is set."""
    # A line for each request would hold nothing that we do not know.
    logging.getLogger("tornado.access").setLevel(logging.ERROR)
    made = make_flower(settings, families)
    server = HTTPServer(made)
    listener.setblocking(False)
    server.add_socket(listener)
    # Flower's own start would start the event loop that runs already.
    made.events.start()
    made.started = True
    made.update_workers()
    try:
        await stop.wait()
    finally:
        server.stop()
        made.events.stop()
        made.executor.shutdown(wait=False, cancel_futures=True)
