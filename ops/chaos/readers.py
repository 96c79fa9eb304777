"""Readers: over HTTP from relay and gateway, and in this process. They leave, come back, and note what they see."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Final

import orjson
from ops.chaos.ledger import Ledger, essence
from ops.chaos.plan import Reading
from tests.support.web import request

from promptmill import AsyncProducer
from promptmill.contract import END_TYPES
from promptmill.errors import NotFound, PromptmillError

_BACK_S: Final = 0.1
"""How soon a reader comes back whose server went away; browsers take a second."""

Seen = tuple[str | None, dict[str, Any]]


class Reader:
    """One reader of one job, through all of its connections, to the job's end."""

    def __init__(
        self,
        name: str,
        job_id: str,
        reading: Reading,
        *,
        ledger: Ledger,
        producer: AsyncProducer,
        ports: dict[str, int],
    ) -> None:
        self.name = name
        self._job_id = job_id
        self._reading = reading
        self._ledger = ledger
        self._producer = producer
        self._ports = ports
        self._how = "late" if reading.late else reading.how
        self._last: str | None = None
        self._ended = False

    async def run(self) -> None:
        """Read until the end event."""
        self._ledger.write("reads", reader=self.name, job=self._job_id, how=self._how)
        await asyncio.sleep(self._reading.joins_s)
        for events in (*self._reading.leaves_after, None):
            await self._read(events)
            if self._ended:
                return
            self._ledger.write("left", reader=self.name, why="its own wish")
            await asyncio.sleep(self._reading.away_s)

    async def _read(self, events_max: int | None) -> None:
        """Read some events, or all; come back wherever the stream ends early."""
        left = events_max
        while not self._ended and left != 0:
            why = "the stream ended"
            try:
                async with aclosing(self._open()) as stream:
                    async for event_id, event in stream:
                        self._saw(event_id, event)
                        left = None if left is None else left - 1
                        if self._ended or left == 0:
                            return
            except NotFound:
                self._refused(404)
            except (PromptmillError, OSError, EOFError) as err:
                # EOFError is asyncio's IncompleteReadError too, and OSError is TimeoutError.
                why = f"{type(err).__name__}: {err}"
            self._ledger.write("left", reader=self.name, why=why)
            await asyncio.sleep(_BACK_S)

    def _refused(self, status: int) -> None:
        self._ledger.write("refused", reader=self.name, job=self._job_id, status=status)
        self._ended = True

    def _saw(self, event_id: str | None, event: dict[str, Any]) -> None:
        self._last = event_id or self._last
        self._ended = event["type"] in END_TYPES
        self._ledger.write("event", reader=self.name, job=self._job_id, id=event_id, **essence(event))

    def _open(self) -> AsyncGenerator[Seen, None]:
        return self._library() if self._reading.how == "library" else self._http(self._ports[self._reading.how])

    async def _library(self) -> AsyncGenerator[Seen, None]:
        async with aclosing(self._producer.events(self._job_id, self._last)) as events:
            async for event in events:
                yield event.id, event.model_dump(mode="json")

    async def _http(self, port: int) -> AsyncGenerator[Seen, None]:
        headers = {"Last-Event-ID": self._last} if self._last else {}
        async with request(port, f"/v1/jobs/{self._job_id}/stream", headers=headers) as answer:
            if answer.status != 200:
                # Not even 204, which says that nothing is behind our last id: that was no end.
                self._refused(answer.status)
                return
            last = ""
            while not answer.ended:
                for message in answer.events.feed(await answer.read_chunk()):
                    # An event without an id of its own leaves the last one as it was.
                    own = message.last_event_id if message.last_event_id != last else None
                    last = message.last_event_id
                    yield own or None, orjson.loads(message.data)
