"""What the ``gemini`` program writes, out of lines; no I/O.

``-o stream-json`` (seen with 0.61): ``message`` with ``role: assistant`` and a piece in ``content``; ``error`` with
``severity`` and ``message``; ``result``, the last word, with ``status`` ("success" or "error"), ``error`` and
``stats``. ``init``, the user's own message, tools and unknown types are ignored, and lines that are not JSON too.

``-o text``, for versions without it: the answer itself, notes of the program between its lines. It is complete where
the program ends with status 0 and said something; an API that fails in mid-stream looks the same there.

The program tells neither why an answer ended nor, often, an error's HTTP status: the status is looked for in the
message and in the report that it writes to standard error.
"""

from __future__ import annotations

import codecs
import re
from typing import Any, Final, cast

import orjson

from promptmill.contract import Usage
from promptmill_workers.backends.base import Item, UsageUpdate
from promptmill_workers.backends.decoding import NOTHING, REFUSED, count
from promptmill_workers.backends.failures import ProviderError, error_object
from promptmill_workers.backends.program_lines import LineDecoder

NOISE: Final = re.compile(
    "Loaded cached credentials|Loading extension:|Server '|Listening for|"
    "Model is overloaded|High demand|Retrying|429|quota"
)
"""How notes of the program begin that are no part of an answer (text format only)."""
_JSON: Final = re.compile(r"\{.*\}", re.DOTALL)
_STATUS: Final = re.compile(r"\b(?:status|code)\"?:\s*(4\d\d|5\d\d)\b")
# Messages of the program where the API's own number is lost.
_WORDS: Final = (
    (re.compile(r"api key not valid|api key expired|API_KEY_INVALID|auth method", re.IGNORECASE), "auth"),
    (
        re.compile(r"quota|rate limit|resource.?exhausted|too many requests|try again later", re.IGNORECASE),
        "rate_limited",
    ),
    (re.compile(r"overloaded|high demand|unavailable|internal error", re.IGNORECASE), "overloaded"),
    (re.compile(r"blocked|safety|prohibited", re.IGNORECASE), REFUSED),
    (re.compile(r"empty response|no text", re.IGNORECASE), "empty"),
    (re.compile(r"without a finish reason|\bterminated|socket hang up|aborted|ECONNRESET", re.IGNORECASE), "cut"),
    (re.compile(r"fetch failed|ENOTFOUND|ECONNREFUSED|EAI_AGAIN|certificate", re.IGNORECASE), "unreachable"),
    (re.compile(r"in JSON|unexpected token|malformed", re.IGNORECASE), "malformed"),
)
_KEPT_CHARS: Final = 4000


class GeminiDecoder(LineDecoder):
    """Lines of ``stream-json``. ``max_tokens`` is what was asked for: an answer of that many was cut there."""

    def __init__(self, *, secret: str | None = None, max_tokens: int | None = None) -> None:
        super().__init__("gemini", secret=secret)
        self._max_tokens = max_tokens
        self._error = ""
        self._failed = False

    def exited(self, status: int | None, stderr: bytes) -> list[Item]:
        """See :class:`LineDecoder`; an error that the program reported gets its code here: now its report is whole."""
        if self._failed:
            self._fail(stderr.decode("utf-8", "replace"))
        return super().exited(status, stderr)

    def _value(self, value: dict[str, Any], items: list[Item]) -> None:
        kind = value.get("type")
        try:
            if kind == "message" and value.get("role") == "assistant":
                self.text(value["content"], items)
            elif kind == "error" and value.get("severity") != "warning":
                self._error = str(value["message"])
            elif kind == "init":
                session = value.get("session_id")
                self.request_id = session if isinstance(session, str) else None
            elif kind == "result" and not self._failed:
                self._result(value, items)
        except (AttributeError, KeyError, TypeError):
            self.fail("malformed", f"gemini wrote a {kind} line of another form")

    def _result(self, value: dict[str, Any], items: list[Item]) -> None:
        output = self._usage(value.get("stats"), items)
        if value["status"] == "success":
            self.reason = "length" if self._max_tokens and output >= self._max_tokens else "stop"
            self.done = True
            return
        said = (value.get("error") or NOTHING).get("message")
        self._error = str(said or self._error or value["status"])
        self._failed = True  # its report on standard error follows

    def _usage(self, value: Any, items: list[Item]) -> int:
        stats = cast("dict[str, Any]", value) if isinstance(value, dict) else NOTHING
        asked, cached, output = (count(stats.get(name)) for name in ("input_tokens", "cached", "output_tokens"))
        # What the model thought is only in the total.
        output = max(output, count(stats.get("total_tokens")) - asked)
        if asked or output:
            usage = Usage(input_tokens=max(asked - cached, 0), cache_read_tokens=cached, output_tokens=output)
            items.append(UsageUpdate(usage))
        return output

    def _fail(self, report: str) -> None:
        message = self._error
        found = _api_error(message)
        if found is None:
            number = _STATUS.search(message) or _STATUS.search(report)
            found = ProviderError(message, status=int(number[1]) if number else None)
        code = found.code
        if code in {"crashed", "bad_request"}:
            code = next((name for words, name in _WORDS if words.search(message)), code)
        if code == REFUSED:
            self.refusal, self.reason, self.done = message, REFUSED, True
        elif code == "empty":
            self.fail("empty", f"gemini reported: {message}")
        else:
            self.reported(code, found.message, retry_after_s=found.retry_after_s, final=found.final)


class GeminiTextDecoder(LineDecoder):
    """The answer as plain text."""

    def __init__(self, *, secret: str | None = None) -> None:
        super().__init__("gemini", secret=secret)
        self._owed = ""  # line ends that belong to the answer only if more of it follows
        self._notes = ""

    def line(self, data: bytes) -> list[Item]:
        """The items of one line; its end comes with the next one."""
        items: list[Item] = []
        text = codecs.decode(data, "utf-8", "replace")
        if NOISE.match(text):
            self._notes = (self._notes + "\n" + text)[-_KEPT_CHARS:]
        else:
            self._value({"text": text}, items)
        return items

    def exited(self, status: int | None, stderr: bytes) -> list[Item]:
        """Complete with status 0 and text; what the status and the notes say otherwise."""
        if status == 0 and self._any_text:
            self.reason = "stop"
            return self.end()
        said = "\n".join((self._notes, stderr.decode("utf-8", "replace")))
        if status == 0:
            self.fail("empty", "gemini ended without any text")
        elif status is not None and status > 0:
            code = _code_of_text(said)
            if code is not None:
                self.reported(code, said.strip()[-_KEPT_CHARS:])
            elif self._any_text:
                self._spoke = True
        return super().exited(status, stderr)

    def _value(self, value: dict[str, Any], items: list[Item]) -> None:
        self.text(self._owed + value["text"], items)
        self._owed = "\n"


def _api_error(message: str) -> ProviderError | None:
    """The API's error object where the message holds it: ``[API Error: {"error": {…}}]``."""
    found = _JSON.search(message)
    if found is None:
        return None
    try:
        return error_object(orjson.loads(found[0]))
    except orjson.JSONDecodeError:
        return None


def _code_of_text(said: str) -> str | None:
    number = _STATUS.search(said)
    if number:
        return ProviderError(said, status=int(number[1])).code
    code = next((name for words, name in _WORDS if words.search(said)), None)
    return {REFUSED: "refused"}.get(code, code) if code else None
