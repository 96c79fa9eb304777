"""What backends that run a program share: options, JSON lines out of its standard output, and how its end is judged.

The rules for an answer are those of :mod:`.decoding`: only the program's own word makes an answer complete, never its
exit status. A program that ends without that word:

=========================================== ===========
its end                                     code
=========================================== ===========
killed by a signal (out of memory, …)       crashed
after a line of its protocol, or part of it cut
without one, with a status other than 0     crashed
without one, with status 0                  malformed
=========================================== ===========
"""

from __future__ import annotations

import json
import re
import signal
from abc import abstractmethod
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Final, cast

import orjson
from pydantic import Field

from promptmill.errors import BackendError
from promptmill_workers.backends.base import Call, Item
from promptmill_workers.backends.decoding import AnswerDecoder
from promptmill_workers.backends.failures import safe_message
from promptmill_workers.backends.options import Options
from promptmill_workers.programs import Program, ProgramLimits

MIB: Final = 1024 * 1024
MARGIN_S: Final = 60.0
"""How much longer than ``total_s`` the guard lets a program run that the worker did not end."""
_TAIL_CHARS: Final = 300
_TAIL_BYTES: Final = 2000
_ESCAPES: Final = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class ProgramOptions(Options):
    """``options`` that every program has."""

    user_name: str = Field(default="User", min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]+$")
    """The user's name in a conversation of several turns."""
    agent_name: str = Field(default="Assistant", min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]+$")
    """The model's name in it."""
    memory_mb: int | None = Field(default=None, ge=64)
    """Bound on the program's memory; None: no bound."""
    output_mb: int = Field(default=256, gt=0, le=4096)
    """Bound on all that the program writes to standard output; past it the job fails as ``malformed``."""
    grace_s: float = Field(default=0.5, ge=0, le=60)
    """From TERM to KILL when the program is ended."""

    def limits(self, call: Call) -> ProgramLimits:
        """The bounds of one call."""
        return ProgramLimits(
            output_bytes=self.output_mb * MIB,
            memory_bytes=self.memory_mb * MIB if self.memory_mb else None,
            run_s=(call.timeouts.total_s or 24 * 3600.0) + MARGIN_S,
            grace_s=self.grace_s,
        )


class LineDecoder(AnswerDecoder):
    """Push lines, not chunks: ``line`` for each, then ``exited`` once, unless ``done`` came first.

    Lines that are no JSON object are kept as the reason for a failure, and otherwise ignored: programs mix notes of
    their own into their output.
    """

    def __init__(self, name: str, *, secret: str | None = None) -> None:
        super().__init__(secret=secret)
        self._name = name
        self._spoke = False
        self._note = ""

    def line(self, data: bytes) -> list[Item]:
        """The items of one line, without its line end; look at ``failure`` after them."""
        items: list[Item] = []
        if self.done or not data.strip():
            return items
        value = _parse(data)
        if isinstance(value, dict):
            self._spoke = True
            self._value(cast("dict[str, Any]", value), items)
        else:
            self._spoke = self._spoke or data.lstrip().startswith(b"{")
            self._note = data[-_TAIL_BYTES:].decode("utf-8", "replace")
        return items

    def exited(self, status: int | None, stderr: bytes) -> list[Item]:
        """What the program's end completes; look at ``failure`` after it."""
        if not self.done and self.failure is None:
            self._judge(status, _ESCAPES.sub("", stderr[-_TAIL_BYTES:].decode("utf-8", "replace")))
        return self.end()

    def reported(self, code: str, message: str, *, retry_after_s: float | None = None, final: bool = False) -> None:
        """End with an error that the program reported."""
        said = safe_message(message, self._secret) or "no reason given"
        self.failure = BackendError(
            f"{self._name} reported: {said}",
            code=code,
            retryable=False if final else None,
            retry_after_s=retry_after_s,
            provider_request_id=self.request_id,
        )
        self.done = True

    @abstractmethod
    def _value(self, value: dict[str, Any], items: list[Item]) -> None:
        """One line."""

    def _answer(self, value: dict[str, Any], items: list[Item]) -> None:
        self._value(value, items)

    def _judge(self, status: int | None, stderr: str) -> None:
        """The program ended without its last word: say so."""
        tail = safe_message(self._tail(stderr.strip() or self._note), self._secret)
        because = f": {tail}" if tail else ""
        if status is not None and status < 0:
            self.fail("crashed", f"{self._name} was ended by {_signal(-status)}{because}")
        elif self._spoke:
            self.fail("cut", f"{self._name} ended with status {status} before its answer did{because}")
        elif status:
            self.fail("crashed", f"{self._name} ended with status {status}{because}")
        else:
            self.fail("malformed", f"{self._name} wrote nothing that is an answer{because}")

    def _tail(self, text: str) -> str:
        """The last characters, begun at a word, without the secret: half of it would not be recognised afterwards."""
        if self._secret:
            text = text.replace(self._secret, "***")
        return text if len(text) <= _TAIL_CHARS else text[-_TAIL_CHARS:].partition(" ")[2]


async def decoded(program: Program, decoder: LineDecoder) -> AsyncGenerator[Item, None]:
    """The items of a program's answer.

    Returns as soon as the program said its last word, which may be before it ends: leaving its context ends it.

    Raises
    ------
    BackendError
        After the items that precede it.
    """
    async with aclosing(program.lines()) as lines:
        async for line in lines:
            for item in decoder.line(line):
                yield item
            if decoder.done:
                break
    for item in decoder.exited(program.status, program.stderr_tail):
        yield item
    if decoder.failure is not None:
        raise decoder.failure


def refuse(field: str, message: str) -> BackendError:
    """For a request that the program cannot serve; ``message`` gives advice."""
    return BackendError(f"{field}: {message}", code="bad_request", field=field)


def _parse(data: bytes) -> Any:
    """Parsed JSON, or None. What is not UTF-8 becomes U+FFFD; escaped lone surrogates, which orjson refuses, stay."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        try:
            return json.loads(data.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            return None


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
