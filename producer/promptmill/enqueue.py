"""Sending a job's message. The only module of the producer that knows Celery.

A message is a hint: it carries the job's id and nothing else. Losing one delays a job until the sweep sends it again;
doubling one does nothing, because only one claim succeeds.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from amqp.exceptions import ChannelError
from celery import Celery
from kombu.exceptions import KombuError, OperationalError

from promptmill.queues import QUEUES, TASK_NAME

logger = logging.getLogger(__name__)


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
        task_default_queue=QUEUES[0],
        worker_enable_remote_control=True,
    )
    return app


class Enqueuer:
    """Sends messages from one thread of its own, so that an event loop never waits for the broker."""

    def __init__(self, broker_url: str) -> None:
        self._app: Any = make_app(broker_url)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="promptmill-enqueue")

    async def send(self, messages: Sequence[tuple[str, str]]) -> int:
        """Send ``(job id, queue)`` pairs; answers how many the broker took.

        A broker that does not answer is no error: the jobs exist, and the sweep sends their messages when it is back.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._send, messages)

    def _send(self, messages: Sequence[tuple[str, str]]) -> int:
        sent = 0
        try:
            with self._app.producer_or_acquire() as producer:
                for job_id, queue in messages:
                    self._app.send_task(
                        TASK_NAME, args=(job_id,), queue=queue, producer=producer, retry=False, ignore_result=True
                    )
                    sent += 1
        except (KombuError, OperationalError, OSError) as err:
            logger.warning("broker unavailable, %d messages left to the sweep: %s", len(messages) - sent, err)
        return sent

    async def depth(self, queue: str) -> int | None:
        """How many messages wait in a queue; None where the broker does not say."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._depth, queue)

    def _depth(self, queue: str) -> int | None:
        try:
            with self._app.connection_or_acquire() as connection:
                declared: Any = connection.default_channel.queue_declare(queue=queue, passive=True)
                return int(declared.message_count)
        except (KombuError, OperationalError, OSError, ChannelError) as err:
            # A queue that no one declared yet is empty, not broken.
            return 0 if isinstance(err, ChannelError) else None

    async def aclose(self) -> None:
        """Wait for what is being sent, then close the connections."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self._app.close)
        self._thread.shutdown(wait=False)
