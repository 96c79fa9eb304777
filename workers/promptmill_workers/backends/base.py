"""What a backend is: one async generator that turns a call into items.

A backend knows its provider's protocol and nothing else: no Celery, no Redis, no other backend. It raises
:class:`~promptmill.errors.BackendError` with the code that fits, and it never retries by itself: whether to try again
is the runner's decision, because only the runner knows whether a token went out.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from promptmill.contract import JobRequest, Timeouts, Usage
from promptmill.rates import RateInfo


@dataclass(frozen=True, slots=True)
class Call:
    """One attempt: what to ask for and how long it may take.

    ``timeouts`` has every bound set. The backend enforces ``connect_s``; the runner enforces ``first_token_s``,
    ``idle_s`` and ``total_s`` by cancelling the generator, which must then close its connection or program.
    """

    job_id: str
    attempt: int
    request: JobRequest
    timeouts: Timeouts


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of the answer, as the provider sent it; never empty, never with a lone surrogate."""

    text: str


@dataclass(frozen=True, slots=True)
class UsageUpdate:
    """What the provider has counted so far; a later one replaces an earlier one. May come before the first token.

    ``cost_usd`` is what the provider itself says that the attempt cost; None where it says nothing.
    """

    usage: Usage
    cost_usd: float | None = None


@dataclass(frozen=True, slots=True)
class StartedAnew:
    """The text so far is void, the next deltas begin the answer again: readers get a ``restart`` event."""

    reason: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The provider said that the answer is complete: always the last item, and only then is an attempt a success.

    ``reason`` is ``stop``, ``length``, ``stop_sequence`` or the provider's own word where it is none of these.
    """

    reason: str
    provider_request_id: str | None = None


Item = TextDelta | UsageUpdate | StartedAnew | RateInfo | Finished
"""What a backend yields. :class:`~promptmill.rates.RateInfo`, where the provider tells its limits, comes first: before
the first token, and before the error of a request that was refused."""


class Backend(Protocol):
    """One model of the registry, ready to be called many times at once in one event loop.

    Built in the worker as ``factory(name, config)`` with ``config`` a :class:`promptmill.settings.ModelConfig`; the
    factory raises :class:`~promptmill.errors.ConfigError` where the configuration cannot work. Connections are made at
    the first call, in the event loop that calls.
    """

    def complete(self, call: Call) -> AsyncGenerator[Item, None]:
        """The answer, item by item.

        Ends with :class:`Finished`, or raises. Raises :class:`~promptmill.errors.BackendError` with one of
        ``timeout_connect``, ``unreachable``, ``auth``, ``bad_request``, ``rate_limited`` (with ``retry_after_s`` where
        the provider gave one), ``overloaded``, ``context_too_long``, ``refused``, ``cut`` (the stream ended without its
        end), ``empty`` (it ended properly without any text), ``malformed``, ``crashed``, ``auth_expired`` (a
        login that a person must renew). Closing the generator early closes the provider's connection, or ends the
        program and all that it started, before it returns.
        """
        ...

    async def aclose(self) -> None:
        """Close every connection. Nothing is called afterwards."""
        ...
