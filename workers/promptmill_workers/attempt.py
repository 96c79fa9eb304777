"""One attempt: a backend's items become events, a text and a count of tokens."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field

from promptmill.contract import Restart, Usage
from promptmill.errors import BackendError
from promptmill.rates import RateInfo
from promptmill_workers.backends.base import Backend, Call, Finished, StartedAnew, TextDelta, UsageUpdate
from promptmill_workers.backends.structured import check_answer, check_schema
from promptmill_workers.deadlines import Deadlines
from promptmill_workers.joblog import JobLog
from promptmill_workers.writer import Writer


@dataclass(slots=True)
class Progressing:
    """What an attempt has produced so far; whole once ``finished`` is set."""

    parts: list[str] = field(default_factory=list[str])
    usage: Usage | None = None
    cost_usd: float | None = None
    """What the provider says that it cost."""
    rate: RateInfo | None = None
    """What the provider told of its limits."""
    finished: Finished | None = None
    began_at: float = field(default_factory=time.monotonic)
    first_at: float | None = None
    """When the first token came; both by the monotonic clock, in s."""
    cached: bool = False
    """Whether it was not asked for, but kept from an earlier time."""

    @property
    def text(self) -> str:
        """The tokens, joined."""
        return "".join(self.parts)

    @property
    def first_s(self) -> float | None:
        """How long the first token took; None where none came."""
        return None if self.first_at is None else self.first_at - self.began_at

    def note(self, item: UsageUpdate | RateInfo | Finished) -> None:
        """Keep what a backend says beside the text."""
        if isinstance(item, UsageUpdate):
            self.usage, self.cost_usd = item.usage, item.cost_usd
        elif isinstance(item, RateInfo):
            self.rate = item
        else:
            self.finished = item


async def stream(
    backend: Backend,
    call: Call,
    log: JobLog,
    writer: Writer,
    into: Progressing,
    *,
    on_first: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Run one attempt to its end, writing each token to ``log`` as it comes.

    ``into`` holds what came even where this raises, so that a partial text and its usage are kept. ``on_first`` is
    called before the first token is passed on.

    Raises
    ------
    BackendError
        The attempt failed: the backend's own error, one of the timeouts, ``cut``/``empty`` where a backend ended
        without its end or without text, or ``malformed`` where the answer has not the form that was asked for.
    """
    mark = writer.mark
    wanted = call.request.response_format
    async with Deadlines(call.timeouts) as deadlines:
        await check_schema(wanted, call.request.user)
        async with aclosing(backend.complete(call)) as items:
            async for item in items:
                if isinstance(item, TextDelta):
                    if on_first is not None:
                        on_first, told = None, on_first
                        await told()
                    deadlines.touch()
                    into.parts.append(item.text)
                    log.add_text(item.text)
                    writer.pieces += 1
                    mark(log)
                    if log.full:
                        deadlines.hold()
                        await log.wait_for_room()
                        deadlines.touch()
                elif isinstance(item, StartedAnew):
                    into.parts.clear()
                    log.add_event(Restart(reason=item.reason, attempt=call.attempt).to_json())
                    mark(log)
                else:
                    into.note(item)
        if into.finished is None:
            raise BackendError("the answer ended without its end", code="cut")
        if not into.parts:
            raise BackendError("the answer has no text", code="empty")
        if wanted is not None:
            deadlines.hold()  # no token is to come: only the whole attempt's bound counts
            await check_answer(into.text, wanted, call.request.user)
