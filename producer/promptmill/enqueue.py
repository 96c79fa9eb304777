"""Sending a job's message. The only module of the producer that knows Celery.

A message is a hint: it carries the job's id and nothing else. Losing one delays a job until the sweep sends it again;
doubling one does nothing, because only one claim succeeds.

On Redis a queue is a list. On RabbitMQ it is a quorum queue, and a message counts as sent once the broker confirmed it.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import logging
import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from amqp.exceptions import AMQPError, ChannelError, PreconditionFailed
from celery import Celery
from kombu.entity import Queue
from kombu.exceptions import KombuError
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from promptmill.addresses import kombu_address, kombu_tls
from promptmill.queues import API_FAMILY, TASK_NAME, queues_of
from promptmill.store.connection import reason

logger = logging.getLogger(__name__)

CONNECT_S: Final = 3.0
ANSWER_S: Final = 3.0
SKIP_S: Final = 3.0
"""How long messages are left to the sweep after the broker failed."""
STALE_S: Final = 1.0
"""A connection that broke while it was idle fails sooner than that."""
_OLDEST: Final = 3
"""How many of a queue's oldest messages are looked at: one may be of a job that was claimed by another message."""
UNCONFIRMED_MAX: Final = 500
"""How many messages go to RabbitMQ before their confirmations are waited for: each wait costs one write to its disk."""

BROKER_ERRORS: Final = (KombuError, AMQPError, RedisError, OSError)
"""What kombu's transports for Redis and AMQP raise; only some of it comes wrapped as kombu's own."""

T = TypeVar("T")


def make_app(broker_url: str) -> Any:
    """A Celery app with what producers and workers must agree on. It never becomes the process's current app."""
    broker, options = broker_address(broker_url)
    app: Any = Celery("promptmill", broker=broker, set_as_current=False)
    app.conf.update(
        accept_content=["json"],
        broker_connection_retry_on_startup=True,
        broker_transport_options={
            "socket_connect_timeout": 5,
            "socket_timeout": 10,
            "queue_order_strategy": "priority",
            **options,
        },
        broker_use_ssl=kombu_tls(broker_url),
        task_ignore_result=True,
        task_serializer="json",
        task_default_queue=queues_of(API_FAMILY)[0],
        worker_enable_remote_control=True,
    )
    # Messages go to a queue by its name: no exchange of ours, and no binding to one.
    app.amqp.default_exchange = None
    return app


def broker_address(broker_url: str) -> tuple[str, dict[str, Any]]:
    """The address as kombu reads it, and the transport options that it needs beside."""
    address, options = kombu_address(broker_url)
    if "sentinel_kwargs" in options:
        # redis-py would try one that is down ten times before it asks the next.
        options["sentinel_kwargs"]["retry"] = Retry(NoBackoff(), 0)
    return address, options


def is_amqp(broker_url: str) -> bool:
    """Whether the broker is RabbitMQ, and no Redis."""
    return broker_url.startswith("amqp")


def broker_queue(name: str, broker_url: str) -> Any:
    """A queue as everybody declares it who touches it: RabbitMQ refuses a second declaration that differs."""
    if is_amqp(broker_url):
        # Newer RabbitMQ throws a message away that came back 20 times. Here each says only that a slot was gone.
        arguments = {"x-queue-type": "quorum", "x-delivery-limit": 1_000_000}
        return Queue(name, routing_key=name, durable=True, queue_arguments=arguments)
    # Nobody acknowledges messages on Redis: kombu would keep a copy of each for that.
    return Queue(name, routing_key=name, no_ack=True)


def foreign_queue(err: BaseException) -> tuple[str, str] | None:
    """What is wrong and what to do where a queue exists with other properties than ours; else None."""
    if not isinstance(err, PreconditionFailed) or "inequivalent arg" not in str(err):
        return None
    found = re.search(r"for queue '([^']+)'", str(err))
    name = found[1] if found else "of that name"
    return (
        f"the broker has a queue {name} with other properties than promptmill's ({err})",
        f"delete it there (`rabbitmqctl delete_queue {name}`): no job is lost with it, their messages are sent again",
    )


class Confirms:
    """Which of the messages sent on one channel RabbitMQ has taken."""

    def __init__(self, channel: Any) -> None:
        self.channel = channel
        self._last = 0
        self._open: set[int] = set()
        self._refused = False
        channel.confirm_select()
        channel.events["basic_ack"].add(self._taken)
        channel.events["basic_nack"].add(self._not_taken)

    def _taken(self, tag: int, multiple: bool) -> None:
        self._open -= {other for other in self._open if other <= tag} if multiple else {tag}

    def _not_taken(self, tag: int, multiple: bool) -> None:
        self._refused = True
        self._taken(tag, multiple)

    def sent(self) -> None:
        """One more message is on its way."""
        self._last += 1
        self._open.add(self._last)

    def wait(self, timeout_s: float) -> None:
        """Until all are taken. Raises one of :data:`BROKER_ERRORS` where one is not."""
        deadline = time.monotonic() + timeout_s
        while self._open:
            # Zero would not wait but only look; less than zero is refused.
            self.channel.connection.drain_events(timeout=max(deadline - time.monotonic(), 0.001))
        if self._refused:
            self._refused = False
            raise KombuError("the broker refused a message")


@dataclass(frozen=True, slots=True)
class Peek:
    """A queue of the broker: how many messages wait, and the jobs of the oldest ones; RabbitMQ does not show those."""

    messages: int
    oldest: tuple[str, ...] = ()


def _job_of(message: bytes) -> str:
    """The job whose id a message in Redis carries."""
    args, *_ = json.loads(base64.b64decode(json.loads(message)["body"]))
    return str(args[0])


class Enqueuer:
    """Sends messages from one thread of its own, so that an event loop never waits for the broker.

    After a failure messages are skipped for ``SKIP_S``, then one send tries while the others go on skipping, until the
    broker answers again. So an outage costs one caller some seconds now and then, and the others nothing.
    """

    def __init__(self, broker_url: str) -> None:
        self._broker_url = broker_url
        self._app: Any = make_app(broker_url)
        self._app.conf.broker_connection_timeout = CONNECT_S
        # Nobody would send heartbeats while nothing is sent, and the broker would drop the connection every time.
        self._app.conf.broker_heartbeat = 0
        self._app.conf.broker_transport_options = {
            **self._app.conf.broker_transport_options,
            "socket_connect_timeout": CONNECT_S,
            "socket_timeout": ANSWER_S,
            # Otherwise kombu sleeps 2 and 4 seconds between attempts to connect, and all senders wait for it.
            "max_retries": 0,
        }
        # Not from Celery's pool, which all apps of a process share: who closes one there closes it for the others too.
        self._connection: Any = self._app.connection_for_write()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="promptmill-enqueue")
        self._retry_at: float | None = None
        """On ``time.monotonic``: when to try again; None while the broker answers."""
        self._queues: dict[str, Any] = {}
        self._confirms: Confirms | None = None

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
                batch = list(itertools.islice(rest, UNCONFIRMED_MAX if is_amqp(self._broker_url) else 1))
                self._publish(connection, producer, batch)
                for _ in batch:
                    rest.popleft()

        self._talk(publish)
        return len(messages) - len(rest)

    def _publish(self, connection: Any, producer: Any, batch: Sequence[tuple[str, str]]) -> None:
        confirms = self._confirms_on(connection.default_channel) if is_amqp(self._broker_url) else None
        for job_id, name in batch:
            queue = self._queues.get(name) or self._queues.setdefault(name, broker_queue(name, self._broker_url))
            # Celery's name of the task is the job's own: who looks at it in Flower finds the job by it.
            self._app.send_task(
                TASK_NAME,
                args=(job_id,),
                task_id=job_id,
                queue=queue,
                producer=producer,
                retry=False,
                ignore_result=True,
            )
            if confirms is not None:
                confirms.sent()
        if confirms is not None:
            confirms.wait(ANSWER_S)

    def _confirms_on(self, channel: Any) -> Confirms:
        if self._confirms is None or self._confirms.channel is not channel:
            self._confirms = Confirms(channel)
        return self._confirms

    async def depth(self, queue: str) -> int | None:
        """How many messages wait in a queue; None where the broker does not say."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._depth, queue)

    def _depth(self, queue: str) -> int | None:
        def ask(connection: Any) -> int:
            # A channel of its own: RabbitMQ closes the one that asked for a queue that is not there.
            own = connection.channel() if is_amqp(self._broker_url) else None
            try:
                waiting = int((own or connection.default_channel).queue_declare(queue, passive=True).message_count)
            except ChannelError as err:
                if str(getattr(err, "reply_code", None)) != "404":
                    raise
                waiting = 0  # a queue that no one declared yet is empty, not broken
            if own is not None:
                connection.maybe_close_channel(own)
            return waiting

        return self._talk(ask)

    def _talk(self, work: Callable[[Any], T]) -> T | None:
        """Do ``work`` with the connection; None where the broker is away."""
        connection = self._connection
        try:
            was_open, began = connection.connected, time.monotonic()
            try:
                answer = _on(connection, work)
            except BROKER_ERRORS:
                if not was_open or time.monotonic() - began > STALE_S:
                    raise
                # It broke while it was idle, as after a restart of the broker, which may be back already.
                connection.collect()
                answer = _on(connection, work)
        except BROKER_ERRORS as err:
            # What a connection that failed says next may answer an older question.
            connection.collect()
            if foreign := foreign_queue(err):
                logger.critical("messages wait: %s; %s", *foreign)
            elif self._retry_at is None:
                logger.warning("broker unavailable, messages are left to the sweep: %s", reason(err))
            self._retry_at = time.monotonic() + SKIP_S
            return None
        if self._retry_at is not None:
            logger.info("the broker answers again")
            self._retry_at = None
        return answer

    async def peek(self, queues: Sequence[str]) -> dict[str, Peek] | None:
        """What waits in each of some queues, in one turn; None where the broker does not answer, or failed just now."""
        if self._retry_at is not None and time.monotonic() < self._retry_at:
            return None
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._peek, queues)

    def _peek(self, queues: Sequence[str]) -> dict[str, Peek] | None:
        if is_amqp(self._broker_url):
            counts = {name: self._depth(name) for name in queues}
            return {name: Peek(count) for name, count in counts.items() if count is not None} or None

        def ask(connection: Any) -> list[Any]:
            pipe = connection.default_channel.client.pipeline(transaction=False)
            for name in queues:
                pipe.llen(name)
                pipe.lrange(name, -_OLDEST, -1)  # kombu adds on the left
            return pipe.execute()

        found = self._talk(ask)
        if found is None:
            return None
        pairs = zip(queues, found[::2], found[1::2], strict=True)
        return {name: Peek(int(count), tuple(_job_of(raw) for raw in rows)) for name, count, rows in pairs}

    async def aclose(self) -> None:
        """Wait for what is being sent, then close the connection."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self._connection.release)
        await loop.run_in_executor(self._thread, self._app.close)
        self._thread.shutdown(wait=False)


def _on(connection: Any, work: Callable[[Any], T]) -> T:
    connection.ensure_connection(max_retries=0, timeout=CONNECT_S)
    if connection.transport.driver_type == "amqp":
        # amqp bounds the handshake only; its read_timeout is no bound, because it reads again after each.
        connection.connection.sock.settimeout(ANSWER_S)
    return work(connection)
