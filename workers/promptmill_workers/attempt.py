"""One attempt: a backend's items become events, a text and a count of tokens."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass, field

from promptmill.contract import Usage
from promptmill.errors import BackendError
from promptmill_workers.backends.base import Backend, Call, Finished, TextDelta, UsageUpdate
from promptmill_workers.deadlines import Deadlines
from promptmill_workers.joblog import JobLog
from promptmill_workers.writer import Writer


@dataclass(slots=True)
class Progressing:
    """What an attempt has produced so far; whole once ``finished`` is set."""

    parts: list[str] = field(default_factory=list[str])
    usage: Usage | None = None
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
        The attempt failed: the backend's own error, one of the timeouts, or ``cut``/``empty`` where a backend ended
        without its end or without text.
    """
    parts, mark = into.parts, writer.mark
    async with Deadlines(call.timeouts) as deadlines, aclosing(backend.complete(call)) as items:
        async for item in items:
            if isinstance(item, TextDelta):
                deadlines.touch()
                parts.append(item.text)
                log.add_text(item.text)
                mark(log)
                if log.full:
                    await log.wait_for_room()
                    deadlines.touch()  # the wait was ours, not the provider's
            elif isinstance(item, UsageUpdate):
                into.usage = item.usage
            else:
                into.finished = item
    if into.finished is None:
        raise BackendError("the answer ended without its end", code="cut")
    if not parts:
        raise BackendError("the answer has no text", code="empty")
