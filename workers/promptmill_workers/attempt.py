"""One attempt: a backend's items become events, a text and a count of tokens."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final

from promptmill.contract import JobRequest, Restart, Usage
from promptmill.errors import BackendError
from promptmill_workers.backends.base import Backend, Call, Finished, StartedAnew, TextDelta, UsageUpdate
from promptmill_workers.backends.structured import check_answer, check_schema
from promptmill_workers.deadlines import Deadlines
from promptmill_workers.joblog import JobLog
from promptmill_workers.writer import Writer

_BYTES_PER_TOKEN: Final = 4
"""A common rule of thumb for English; only ever used where the provider counted nothing."""


def estimated_usage(request: JobRequest, text: str) -> Usage:
    """A guess for an attempt whose provider did not count, or died before it told; marked as such."""
    asked = len((request.system or "").encode()) + sum(len(m.text.encode()) for m in request.messages)
    return Usage(
        input_tokens=-(-asked // _BYTES_PER_TOKEN),
        output_tokens=-(-len(text.encode()) // _BYTES_PER_TOKEN),
        estimated=True,
    )


@dataclass(slots=True)
class Progressing:
    """What an attempt has produced so far; whole once ``finished`` is set."""

    parts: list[str] = field(default_factory=list[str])
    usage: Usage | None = None
    cost_usd: float | None = None
    """What the provider says that it cost."""
    finished: Finished | None = None

    @property
    def text(self) -> str:
        """The tokens, joined."""
        return "".join(self.parts)


async def stream(backend: Backend, call: Call, log: JobLog, writer: Writer, into: Progressing) -> None:
    """Run one attempt to its end, writing each token to ``log`` as it comes.

    ``into`` holds what came even where this raises, so that a partial text and its usage are kept.

    Raises
    ------
    BackendError
        The attempt failed: the backend's own error, one of the timeouts, ``cut``/``empty`` where a backend ended
        without its end or without text, or ``malformed`` where the answer has not the form that was asked for.
    """
    parts, mark = into.parts, writer.mark
    wanted = call.request.response_format
    async with Deadlines(call.timeouts) as deadlines:
        await check_schema(wanted, call.request.user)
        async with aclosing(backend.complete(call)) as items:
            async for item in items:
                if isinstance(item, TextDelta):
                    deadlines.touch()
                    parts.append(item.text)
                    log.add_text(item.text)
                    mark(log)
                    if log.full:
                        deadlines.hold()
                        await log.wait_for_room()
                        deadlines.touch()
                elif isinstance(item, UsageUpdate):
                    into.usage, into.cost_usd = item.usage, item.cost_usd
                elif isinstance(item, StartedAnew):
                    parts.clear()
                    log.add_event(Restart(reason=item.reason, attempt=call.attempt).to_json())
                    mark(log)
                else:
                    into.finished = item
        if into.finished is None:
            raise BackendError("the answer ended without its end", code="cut")
        if not parts:
            raise BackendError("the answer has no text", code="empty")
        if wanted is not None:
            deadlines.hold()  # no token is to come: only the whole attempt's bound counts
            await check_answer(into.text, wanted, call.request.user)
