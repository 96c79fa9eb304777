"""The two kinds of broker behind one face: a Redis and a RabbitMQ of its own, apart from the store."""

from __future__ import annotations

from kombu.connection import Connection

from promptmill.enqueue import Enqueuer, broker_queue
from tests.support.rabbit import RabbitServer
from tests.support.store import StoreServer


class Broker:
    """A broker that a test may kill and start again, and whose queues it may look into."""

    def __init__(self, server: StoreServer | RabbitServer) -> None:
        self._server = server
        self.kill = server.kill
        self.start = server.start

    @property
    def url(self) -> str:
        return self._server.url

    @property
    def pid(self) -> int:
        assert self._server.process is not None
        return self._server.process.pid

    def waiting(self, queue: str) -> int:
        """How many messages wait in a queue; 0 where nobody declared it."""
        with Connection(self.url) as connection:
            return int(broker_queue(queue, self.url)(connection.default_channel).queue_declare().message_count)

    def purge(self, queue: str) -> int:
        """Lose the messages of a queue; answers how many."""
        with Connection(self.url) as connection:
            declared = broker_queue(queue, self.url)(connection.default_channel)
            declared.queue_declare()
            return int(declared.purge())

    async def put(self, *messages: tuple[str, str]) -> None:
        """Messages as a producer sends them: job id and queue."""
        sender = Enqueuer(self.url)
        try:
            assert await sender.send(messages) == len(messages)
        finally:
            await sender.aclose()
