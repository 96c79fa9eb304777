"""Sending a job's message. The only module of the producer that knows Celery.

A message is a hint: it carries the job's id and nothing else. Losing one delays a job until the sweep sends it again;
doubling one does nothing, because only one claim succeeds.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

from amqp.exceptions import AMQPError, ChannelError
from celery import Celery
from kombu.exceptions import KombuError
from redis.exceptions import RedisError

from promptmill.queues import API_FAMILY, TASK_NAME, queues_of

logger = logging.getLogger(__name__)

CONNECT_S: Final = 3.0
ANSWER_S: Final = 3.0
SKIP_S: Final = 3.0
"""How long messages are left to the sweep after the broker failed."""
STALE_S: Final = 1.0
"""A connection that broke while it was idle fails sooner than that."""

BROKER_ERRORS: Final = (KombuError, AMQPError, RedisError, OSError)
"""What kombu's transports for Redis and AMQP raise; only some of it comes wrapped as kombu's own."""

T = TypeVar("T")


def make_app(broker_url: str) -> Any:
    """A Celery app with what producers and workers must agree on. It never becomes the process's current app."""
    app: Any = Celery("promptmill", broker=broker_url, set_as_current=False)
    app.conf.update(
        accept_content=["json"],
        broker_connection_retry_on_startup=True,
        broker_transport_options={
            "socket_connect_timeout": 5,
            "socket_timeout": 10,
            "queue_order_strategy": "priority",
        },
        task_ignore_result=True,
        task_serializer="json",
        task_default_queue=queues_of(API_FAMILY)[0],
        worker_enable_remote_control=True,
    )
    return app


class Enqueuer:
    """Sends messages from one thread of its own, so that an event loop never waits for the broker.

    After a failure messages are skipped for ``SKIP_S``, then one send tries while the others go on skipping, until the
    broker answers again. So an outage costs one caller some seconds now and then, and the others nothing.
    """

    def __init__(self, broker_url: str) -> None:
        self._app: Any = make_app(broker_url)
        self._app.conf.broker_connection_timeout = CONNECT_S
        self._app.conf.broker_transport_options = {
            **self._app.conf.broker_transport_options,
            "socket_connect_timeout": CONNECT_S,
            "socket_timeout": ANSWER_S,
            # Otherwise kombu sleeps 2 and 4 seconds between attempts to connect, and all senders wait for it.
            "max_retries": 0,
        }
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="promptmill-enqueue")
        self._retry_at: float | None = None
        """On ``time.monotonic``: when to try again; None while the broker answers."""

    async def send(self, messages: Sequence[tuple[str, str]]) -> int:
        """Send ``(job id, queue)`` pairs; answers how many the broker took.

        A broker that does not answer is no error: the jobs exist, and the sweep sends their messages when it is back.
        """
        trying = self._retry_at is not None
        if self._retry_at is not None:
            now = time.monotonic()
            if now < self._retry_at:
                return 0
            self._retry_at = now + CONNECT_S + ANSWER_S
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._send, messages, trying)

    def send_from_thread(self, messages: Sequence[tuple[str, str]]) -> None:
        """As :meth:`send`, for a thread while its event loop stands still; returns when it was tried."""
        self._thread.submit(self._send, messages, False).result()

    def _send(self, messages: Sequence[tuple[str, str]], trying: bool) -> int:
        if self._retry_at is not None and not trying:
            return 0  # the broker went away while this one stood in line
        rest = deque(messages)

        def publish(connection: Any) -> None:
            producer = self._app.amqp.Producer(connection)
            while rest:
                job_id, queue = rest[0]
                self._app.send_task(
                    TASK_NAME, args=(job_id,), queue=queue, producer=producer, retry=False, ignore_result=True
                )
                rest.popleft()

        self._talk(publish)
        return len(messages) - len(rest)

    async def depth(self, queue: str) -> int | None:
        """How many messages wait in a queue; None where the broker does not say."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._depth, queue)

    def _depth(self, queue: str) -> int | None:
        def ask(connection: Any) -> int:
            try:
                return int(connection.default_channel.queue_declare(queue=queue, passive=True).message_count)
            except ChannelError as err:
                if str(getattr(err, "reply_code", None)) != "404":
                    raise
                return 0  # a queue that no one declared yet is empty, not broken

        return self._talk(ask)

    def _talk(self, work: Callable[[Any], T]) -> T | None:
        """Do ``work`` with a connection; None where the broker is away."""
        try:
            with self._app.connection_or_acquire() as connection:
                was_open, began = connection.connected, time.monotonic()
                try:
                    answer = _on(connection, work)
                except BROKER_ERRORS:
                    # What a connection that failed says next may answer an older question.
                    connection.collect()
                    if not was_open or time.monotonic() - began > STALE_S:
                        raise
                    # It broke while it was idle, as after a restart of the broker, which may be back already.
                    answer = _on(connection, work)
        except BROKER_ERRORS as err:
            if self._retry_at is None:
                logger.warning("broker unavailable, messages are left to the sweep: %s", err or type(err).__name__)
            self._retry_at = time.monotonic() + SKIP_S
            return None
        if self._retry_at is not None:
            logger.info("the broker answers again")
            self._retry_at = None
        return answer

    async def aclose(self) -> None:
        """Wait for what is being sent, then close the connections."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self._app.close)
        self._thread.shutdown(wait=False)


def _on(connection: Any, work: Callable[[Any], T]) -> T:
    connection.ensure_connection(max_retries=0, timeout=CONNECT_S)
    if connection.transport.driver_type == "amqp":
        # amqp bounds the handshake only; its read_timeout is no bound, because it reads again after each.
        connection.connection.sock.settimeout(ANSWER_S)
    return work(connection)
