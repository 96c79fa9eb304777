"""What a reader of a job sees, through the library or as Server-Sent Events, and what must hold of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import aclosing
from itertools import pairwise

import aiohttp
import orjson

from promptmill import AsyncProducer
from promptmill.contract import Done, Event, Progress, Restart, Token, parse_event
from promptmill.reading import Frame
from tests.support.event_source import EventSourceParser

READ_S = 90.0
"""For a whole job and the fault in it, on a busy machine."""


def text_of(events: Sequence[Event]) -> str:
    """What a page shows: the tokens since the last restart."""
    text = ""
    for event in events:
        if isinstance(event, Restart):
            text = ""
        elif isinstance(event, Token):
            text += event.text
    return text


def text_of_frames(frames: Iterable[Frame]) -> str:
    """The same, of what a reader passes on."""
    text = ""
    for frame in frames:
        if frame.type == b"restart":
            text = ""
        elif frame.type == b"token":
            text += orjson.loads(frame.data)["text"]
    return text


def phases(events: Sequence[Event]) -> list[str]:
    """Of its progress, in order."""
    return [e.phase for e in events if isinstance(e, Progress)]


def check_whole(events: Sequence[Event]) -> None:
    """From the first event to the end: each once, in order, without a gap; one end, last; the tokens are the text."""
    assert [e.ends for e in events] == [False] * (len(events) - 1) + [True], [e.type for e in events][-5:]
    ids = [tuple(map(int, (e.id or "0-0").split("-"))) for e in events]
    assert ids[0][1] == 1, ids[0]
    for before, after in pairwise(ids):
        follows = after == (before[0], before[1] + 1) or (after[0] > before[0] and after[1] == 1)
        assert follows, f"{before} and then {after}"
    end = events[-1]
    if isinstance(end, Done):
        assert text_of(events) == end.text


async def collect(
    producer: AsyncProducer, job_id: str, timeout_s: float = READ_S, *, found: list[Event] | None = None
) -> list[Event]:
    """All events of a job, through the library; in ``found`` as they come."""
    found = [] if found is None else found
    async with asyncio.timeout(timeout_s):
        async for event in producer.events(job_id):
            found.append(event)
    return found


async def wait_for_tokens(producer: AsyncProducer, job_id: str, count: int, timeout_s: float = 30) -> None:
    """Until so many token events came."""
    seen = 0
    async with asyncio.timeout(timeout_s), aclosing(producer.events(job_id)) as events:
        async for event in events:
            seen += isinstance(event, Token)
            if seen >= count:
                return


async def follow_sse(
    port: int, job_id: str, timeout_s: float = READ_S, *, found: list[Event] | None = None
) -> list[Event]:
    """All events of a job, over HTTP, as ``EventSource`` does it: it comes back from where it was, after any cut.

    They are in ``found`` as they come.
    """
    parser, found = EventSourceParser(), [] if found is None else found
    async with asyncio.timeout(timeout_s), aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        while not (found and found[-1].ends):
            headers = {"Last-Event-ID": parser.last_event_id} if parser.last_event_id else {}
            try:
                async with session.get(f"http://127.0.0.1:{port}/v1/jobs/{job_id}/stream", headers=headers) as answer:
                    assert answer.status == 200, f"EventSource gives up at {answer.status}"
                    async for chunk in answer.content.iter_any():
                        for message in parser.feed(chunk):
                            found.append(parse_event(message.data, message.last_event_id))
            except aiohttp.ClientError:
                pass
            # What a cut left half is no event.
            parser = EventSourceParser(last_event_id=parser.last_event_id)
            await asyncio.sleep(0.05)
    return found
