"""What ``claude --print --output-format stream-json --include-partial-messages`` writes, out of lines; no I/O.

Seen with 2.1: ``stream_event`` holds an event of the Messages API; ``assistant`` a whole message, of the model
``<synthetic>`` where the program itself speaks (then with ``error``, a word for what went wrong); ``result`` is the
last word. It has ``is_error``, ``subtype`` ("success" also with an error), ``result`` (the answer, or the error in
words), ``api_error_status``, ``stop_reason``, ``usage``, ``total_cost_usd``. Other types are ignored.

- Success is ``is_error: false`` alone, and not where the program answered in the model's stead.
- The deltas are compared with ``result``: what is missing at the end is added, another text starts the answer anew.
- At ``stop_reason: max_tokens`` the answer is over. The program would go on asking, three times, each time for the
  rest, and then call it an error.
"""

from __future__ import annotations

import re
import time
from typing import Any, Final, cast

from promptmill.contract import Usage
from promptmill.text import clean_text
from promptmill_workers.backends.base import Item, StartedAnew, TextDelta, UsageUpdate
from promptmill_workers.backends.decoding import NOTHING, REFUSED, count
from promptmill_workers.backends.failures import MAX_RETRY_AFTER_S, ProviderError
from promptmill_workers.backends.program_lines import LineDecoder

_SYNTHETIC: Final = "<synthetic>"
_REASONS: Final = {"end_turn": "stop", "stop_sequence": "stop_sequence", "refusal": REFUSED}
_FULL: Final = frozenset({"max_tokens", "model_context_window_exceeded"})
_USAGE: Final = {
    "input_tokens": "input_tokens",
    "output_tokens": "output_tokens",
    "cache_read_input_tokens": "cache_read_tokens",
    "cache_creation_input_tokens": "cache_write_tokens",
}
# Words of the program for what went wrong, as the API's own, which have a code.
_KINDS: Final = {
    "authentication_failed": "authentication_error",
    "oauth_org_not_allowed": "permission_error",
    "billing_error": "billing_error",
    "rate_limit": "rate_limit_error",
    "overloaded": "overloaded_error",
    "model_not_found": "not_found_error",
    "server_error": "api_error",
    "invalid_request": "invalid_request_error",
}
_LOGIN: Final = re.compile(
    r"/login|not logged in|token[^.]{0,40}(?:expired|revoked)|(?:expired|revoked)[^.]{0,40}token", re.IGNORECASE
)
_LOST: Final = re.compile(
    r"connection to the api was lost|ECONNRESET|socket (?:hang up|connection)|stream ended", re.IGNORECASE
)
_UNREACHED: Final = re.compile(
    r"unable to connect|ConnectionRefused|FailedToOpenSocket|ENOTFOUND|ECONNREFUSED|EAI_AGAIN|certificate",
    re.IGNORECASE,
)
# Without a status the text is all there is: an error event in mid-stream comes as "API Error: Overloaded".
_WORDS: Final = (
    (re.compile(r"json parse error|unexpected token|malformed", re.IGNORECASE), "malformed"),
    (re.compile(r"rate.?limit", re.IGNORECASE), "rate_limited"),
    (re.compile(r"overloaded|internal server error|timed out|timeout", re.IGNORECASE), "overloaded"),
)


class ClaudeDecoder(LineDecoder):
    """``renewable``: the credential is a login, so that its refusal is ``auth_expired`` and not ``auth``."""

    def __init__(self, *, secret: str | None = None, renewable: bool = False) -> None:
        super().__init__("claude", secret=secret)
        self._renewable = renewable
        self._said: list[str] = []
        self._answered = False  # the API's answer has begun
        self._stood_in = False  # the program speaks in the model's stead
        self._kind: str | None = None
        self._resets_at: float | None = None

    def text(self, text: str, items: list[Item]) -> None:
        """Add a piece of the answer, and remember it for the comparison."""
        before = len(items)
        super().text(text, items)
        self._said += [item.text for item in items[before:] if isinstance(item, TextDelta)]

    def _value(self, value: dict[str, Any], items: list[Item]) -> None:
        kind = value.get("type")
        try:
            if kind == "stream_event" and not value.get("parent_tool_use_id"):
                self._event_of_api(value["event"], items)
            elif kind == "assistant":
                self._message(value)
            elif kind == "rate_limit_event":
                self._limit(value["rate_limit_info"])
            elif kind == "result":
                self._result(value, items)
        except (AttributeError, KeyError, TypeError):
            self.fail("malformed", f"claude wrote a {kind} line of another form")

    def _event_of_api(self, event: dict[str, Any], items: list[Item]) -> None:
        kind = event.get("type")
        if kind == "content_block_delta":
            delta = event["delta"]
            if delta["type"] == "text_delta":
                self.text(delta["text"], items)
        elif kind == "content_block_start":
            self.text(event["content_block"].get("text") or "", items)
        elif kind == "message_start":
            self._answered = True
        elif kind == "message_delta":
            delta = event["delta"]
            if delta.get("stop_reason") in _FULL:
                self._usage(event.get("usage"), None, items)
                self.reason = "length"
                self.done = True
            elif delta.get("stop_reason") == "refusal":
                self.refusal = str((delta.get("stop_details") or NOTHING).get("explanation") or "")

    def _message(self, value: dict[str, Any]) -> None:
        named = value.get("request_id")
        self.request_id = named if named and isinstance(named, str) else self.request_id
        self._stood_in = value["message"].get("model") == _SYNTHETIC
        self._kind = value.get("error")

    def _limit(self, info: dict[str, Any]) -> None:
        """A subscription's limit: when it is over, in Unix seconds."""
        resets_at = info.get("resetsAt")
        if info.get("status") == "rejected" and isinstance(resets_at, int | float):
            self._resets_at = resets_at

    def _result(self, value: dict[str, Any], items: list[Item]) -> None:
        named = value.get("session_id")
        self.request_id = self.request_id or (named if isinstance(named, str) else None)
        if value["is_error"] is not False:
            self._usage(value.get("usage"), value.get("total_cost_usd"), items)
            self._failed(value)
            return
        whole = value["result"]
        if not isinstance(whole, str):
            raise TypeError(whole)
        if self._stood_in:
            self.reported("bad_request", f"no model was asked, the program answered by itself: {whole}")
            return
        self._reconcile(clean_text(whole), items)
        self._usage(value.get("usage"), value.get("total_cost_usd"), items)
        reason = value.get("stop_reason")
        self.reason = _REASONS.get(str(reason), str(reason)) if reason else "stop"
        self.done = True

    def _reconcile(self, whole: str, items: list[Item]) -> None:
        if held := self._joiner.flush():
            self._any_text = True
            self._said.append(held)
            items.append(TextDelta(held))
        said = "".join(self._said)
        if whole.startswith(said):
            self.text(whole[len(said) :], items)
            return
        items.append(StartedAnew("claude's result differs from what it had streamed"))
        self._any_text = False
        self.text(whole, items)

    def _usage(self, value: Any, cost_usd: Any, items: list[Item]) -> None:
        if not isinstance(value, dict):
            return
        usage = cast("dict[str, Any]", value)
        counted = {ours: count(usage.get(theirs)) for theirs, ours in _USAGE.items()}
        if any(counted.values()):
            cost = float(cost_usd) if isinstance(cost_usd, int | float) else None
            items.append(UsageUpdate(Usage.model_validate(counted), cost_usd=cost))

    def _failed(self, value: dict[str, Any]) -> None:
        message = _worded(value)
        if value.get("stop_reason") == "refusal":
            self.refusal = self.refusal or message
            self.reason = REFUSED
            self.done = True
            return
        status = value.get("api_error_status")
        code = self._code(message, status if isinstance(status, int) else None)
        wait_s = None
        if code == "rate_limited" and self._resets_at is not None:
            wait_s = min(max(self._resets_at - time.time(), 0.0), MAX_RETRY_AFTER_S)
        self.reported(code, message if status is None else f"{message} (HTTP {status})", retry_after_s=wait_s)

    def _code(self, message: str, status: int | None) -> str:
        # The words alone prove nothing beside another status: a refusal may quote what the user wrote.
        worded = status in {None, 401, 403} and bool(_LOGIN.search(message))
        if worded or (status != 403 and (self._kind == "authentication_failed" or status == 401)):
            return "auth_expired" if self._renewable else "auth"
        error = ProviderError(message, (_KINDS.get(self._kind or "", ""),), status)
        if status is not None and self._kind != "billing_error":
            return ProviderError(message, (), status).code
        if _LOST.search(message):
            return "cut" if self._answered else "unreachable"
        if _UNREACHED.search(message):
            return "unreachable"
        found = next((code for words, code in _WORDS if words.search(message)), None)
        return found or error.code


def _worded(value: dict[str, Any]) -> str:
    """The error in words; ``errors`` where the program ended in the middle (``subtype: error_…``)."""
    if isinstance(value.get("result"), str) and value["result"]:
        return cast("str", value["result"])
    errors = value.get("errors")
    said = "; ".join(str(error) for error in cast("list[Any]", errors)) if isinstance(errors, list) else ""
    return said or str(value.get("subtype") or "no reason given")
