"""What the providers' streams share: bytes in, items out, and the rules for how an answer ends; no I/O.

A provider's decoder says what one parsed event means (``_value``), what a whole answer in one JSON object means
(``_answer``), and sets ``reason`` when the provider calls the answer finished.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from typing import Any, Final, cast

import orjson

from promptmill.contract.job import TOKENS_MAX
from promptmill.errors import BackendError
from promptmill.text import SurrogateJoiner
from promptmill_workers.backends.base import Finished, Item, TextDelta
from promptmill_workers.backends.failures import ProviderError, error_object, safe_message, stream_error
from promptmill_workers.backends.sse import SseEvent, SseFramer, SseTooLongError

WHOLE_BYTES: Final = 64 * 1024 * 1024
NOTHING: Final[dict[str, Any]] = {}
REFUSED: Final = "(refused)"
"""The ``reason`` of an answer that the provider's filter ended."""


class AnswerDecoder(ABC):
    """Push the body's bytes, get the items that they complete; call ``end`` when the body has ended.

    An error does not come out of ``push``, because items of the same chunk may precede it: it stands in ``failure``,
    and nothing is decoded after it. ``done`` says that nothing more will come (the protocol's own end, or ``failure``).
    ``request_id`` is the one given, else what the body calls itself.
    """

    def __init__(self, *, request_id: str | None = None, secret: str | None = None) -> None:
        self.request_id = request_id
        self.failure: BackendError | None = None
        self.done = False
        self.reason: str | None = None
        self.refusal = ""
        self._secret = secret
        self._framer = SseFramer()
        self._joiner = SurrogateJoiner()
        self._whole: list[bytes] | None = None  # a body that is one JSON value, not a stream
        self._whole_size = 0
        self._begun = False
        self._any_text = False

    @property
    def complete(self) -> bool:
        """Whether the provider said that the answer is whole."""
        return self.failure is None and (self.done or self.reason is not None)

    def push(self, chunk: bytes) -> list[Item]:
        """The items that ``chunk`` completes; look at ``failure`` after them."""
        items: list[Item] = []
        if not self._begun:
            self._begin(chunk)
        if self.done:
            return items
        if self._whole is not None:
            self._keep(self._whole, chunk)
            return items
        try:
            for event in self._framer.push(chunk):
                self._event(event, items)
                if self.done:
                    break
        except SseTooLongError as err:
            self.fail("malformed", str(err))
        return items

    def end(self) -> list[Item]:
        """What the end of the body completes, with :class:`Finished` as the last item unless ``failure`` is set."""
        items: list[Item] = []
        if self.failure is not None:
            return items
        if self._whole is not None:
            self._object(b"".join(self._whole), items)
        elif not self.done:
            for event in self._framer.flush():
                # An event without its blank line: whole, or cut in the middle, which only its JSON can tell.
                if self._is_end(event.data) or _parse(event.data) is not None:
                    self._event(event, items)
        if self.failure is None:
            self._close(items)
        return items

    def text(self, text: str, items: list[Item]) -> None:
        """Add a piece of the answer."""
        text = self._joiner.push(text)
        if text:
            self._any_text = True
            items.append(TextDelta(text))

    def error(self, error: ProviderError) -> None:
        """End with an error that the provider reported."""
        self.failure = stream_error(error, request_id=self.request_id, secret=self._secret)
        self.done = True

    def fail(self, code: str, message: str) -> None:
        """End with an error that we found."""
        self.failure = BackendError(message, code=code, provider_request_id=self.request_id)
        self.done = True

    @abstractmethod
    def _value(self, value: dict[str, Any], items: list[Item]) -> None:
        """One event of the stream."""

    @abstractmethod
    def _answer(self, value: dict[str, Any], items: list[Item]) -> None:
        """A whole answer that came as one JSON object. Error objects do not come here."""

    def _is_end(self, data: bytes) -> bool:
        """Whether an event that need not be JSON is the protocol's end."""
        del data
        return False

    def _begin(self, chunk: bytes) -> None:
        head = chunk.lstrip()
        if not head:
            return
        self._begun = True
        if head.startswith((b"{", b"[")):  # no line of a stream begins like that
            self._whole = []
        elif head.startswith(b"<"):
            self.fail("malformed", "the provider answered with a web page; is api_url right?")

    def _keep(self, whole: list[bytes], chunk: bytes) -> None:
        self._whole_size += len(chunk)
        if self._whole_size > WHOLE_BYTES:
            self.fail("malformed", f"the answer is over {WHOLE_BYTES} bytes")
        else:
            whole.append(chunk)

    def _event(self, event: SseEvent, items: list[Item]) -> None:
        data = event.data
        if self._is_end(data):
            self.done = True
            return
        try:
            value = orjson.loads(data)
        except orjson.JSONDecodeError:
            value = _parse(data)
        if isinstance(value, dict):
            self._value(cast("dict[str, Any]", value), items)
        elif error := error_object(value):
            self.error(error)
        else:
            self.fail("malformed", "the provider sent an event that is not a JSON object")

    def _object(self, body: bytes, items: list[Item]) -> None:
        value = _parse(body)
        if error := error_object(value):
            self.error(error)
        elif not isinstance(value, dict):
            self.fail("malformed", "the provider's answer is not a JSON object")
        else:
            self._answer(cast("dict[str, Any]", value), items)

    def _close(self, items: list[Item]) -> None:
        held = self._joiner.flush()
        if held:
            self._any_text = True
            items.append(TextDelta(held))
        if self.reason == REFUSED or (self.refusal and not self._any_text):
            said = safe_message(self.refusal, self._secret)
            self.fail("refused", "the provider refused to answer" + (f": {said}" if said else ""))
        elif not self.complete:
            self.fail("cut", "the stream ended before the answer did")
        elif not self._any_text:
            self.fail("empty", f"the provider finished ({self.reason or 'stop'}) without any text")
        else:
            items.append(Finished(self.reason or "stop", self.request_id))


def _parse(data: bytes) -> Any:
    """Parsed JSON, or None. The standard library's parser keeps escaped lone surrogates, which orjson refuses."""
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError):
        return None


def joined(content: Any) -> str:
    """Text out of content parts; parts of another type (a model's thinking) are left out."""
    if not isinstance(content, list):
        return ""
    texts: list[str] = []
    for part in cast("list[Any]", content):
        if isinstance(part, dict):
            text = cast("dict[str, Any]", part).get("text")
            if isinstance(text, str):
                texts.append(text)
    return "".join(texts)


def count(value: Any) -> int:
    """A number of tokens; anything that is none counts as 0, and one beyond all bounds as the bound."""
    return min(value, TOKENS_MAX) if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
