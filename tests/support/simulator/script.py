"""What one simulated request gets: the plan, its compact spec in a model name, and the text it streams."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

STATUS_FAULTS = {"400": 400, "401": 401, "403": 403, "404": 404, "408": 408, "409": 409, "413": 413, "429": 429} | {
    "500": 500,
    "503": 503,
    "504": 504,
    "529": 529,
}
SILENT_FAULTS = frozenset({"hang", "hang_headers"})
MIDSTREAM_FAULTS = frozenset({"stall", "cut", "reset", "truncated", "error_event", "malformed"})
FAULTS = frozenset(STATUS_FAULTS) | SILENT_FAULTS | MIDSTREAM_FAULTS | {"empty", "refusal", "context", "split"}

# Every character that str.splitlines() takes for a line end and that JSON allows unescaped in a string, the ones it
# demands escaped (\v, \f, \x1c), letters of two, three and four bytes, a surrogate pair whose halves travel in two
# deltas, and a half that never finds its other half.
NASTY_PIECES = (
    "naïve ",
    "日本語 ",
    "line\u2028sep ",
    "para\u2029sep ",
    "nel\u0085 ",
    "vt\x0bff\x0cfs\x1c ",
    "data: [DONE]\n\nevent: error\r\n",
    "👩‍🚀 ",
    "pair \ud83d",
    "\ude00 ",
    "lone \ud800",
    " end",
)


class PlanError(ValueError):
    """A plan or spec that the simulator cannot play; the message names the field."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer to one request. All times are in seconds, all counts in tokens (one delta is one token).

    Text, first match wins: `chunks` (the exact deltas); `text`, cut every `chars` characters or after each word;
    `echo` (the last user message's text, cut like `text`); `fault="split"` (`NASTY_PIECES`); else `tokens` words
    `"tok0 "`, `"tok1 "`, …, or with `stamp` `"<time.monotonic_ns()> "`, read when the delta is written.

    Pace: nothing for `first` seconds, then `rate` tokens a second (0: as fast as the reader takes them). `wire` cuts
    the response body every `wire` bytes, each cut piece an HTTP chunk and a write of its own.

    End: `finish` replaces the reason in the provider's own words. `usage` has `input_tokens`, `output_tokens`,
    `cache_read_tokens`, `cache_write_tokens`, `thinking_tokens` (output beside `output_tokens`), each reported as the
    provider's field of that meaning; `omit_usage` reports none (as servers that ignore `stream_options` do).

    Fault: one of `FAULTS`. `after` is the number of tokens before a fault in mid-stream (default: half of them;
    `refusal`: 0). With `times`, the first `times` requests of one `key` (default: the model name as sent) get the fault
    and the later ones succeed. `retry_after` becomes the header of an error status. `message` replaces its text.
    `done` sends `[DONE]` behind OpenAI's error event, as vLLM does.

    `model` limits a queued plan to requests for that model name.
    """

    text: str | None = None
    chunks: tuple[str, ...] | None = None
    chars: int | None = None
    echo: bool = False
    tokens: int = 20
    stamp: bool = False
    rate: float = 0.0
    first: float = 0.0
    wire: int | None = None
    finish: str | None = None
    usage: Mapping[str, int] | None = None
    omit_usage: bool = False
    fault: str | None = None
    after: int | None = None
    times: int | None = None
    key: str | None = None
    retry_after: float | None = None
    message: str | None = None
    done: bool = False
    model: str | None = None

    def __post_init__(self) -> None:
        if self.fault is not None and self.fault not in FAULTS:
            raise PlanError(f"fault: unknown {self.fault!r}; known: {', '.join(sorted(FAULTS))}")
        for name in ("tokens", "rate", "first", "after", "times", "retry_after"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise PlanError(f"{name}: {value} is negative")
        for name in ("chars", "wire"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PlanError(f"{name}: {value} is below 1")
        if not all(isinstance(piece, str) for piece in (self.text or "", *(self.chunks or ()))):
            raise PlanError("text, chunks: not strings")
        unknown = set(self.usage or ()) - _USAGE_KEYS
        if unknown:
            raise PlanError(f"usage: unknown {sorted(unknown)}; known: {sorted(_USAGE_KEYS)}")

    def healthy(self) -> Plan:
        """The same plan without its fault: what `times` leads to."""
        return replace(self, fault=None, after=None, times=None, retry_after=None, message=None)

    def pieces(self, user_text: str = "") -> Sequence[str]:
        """The deltas that this plan streams when nothing limits or breaks it (`stamp`: placeholders)."""
        if self.fault == "empty":
            return ()
        if self.chunks is not None:
            return self.chunks
        text = user_text if self.echo and self.text is None else self.text
        if text is not None:
            if self.chars is not None:
                return [text[i : i + self.chars] for i in range(0, len(text), self.chars)]
            return re.findall(r"\S+\s*|\s+", text)
        if self.fault == "split":
            return NASTY_PIECES
        return words(self.tokens)

    def expected_text(self, user_text: str = "") -> str:
        """The text that a correct client stores for the complete answer.

        Surrogate halves sent in two deltas are joined; one without its other half is U+FFFD.
        """
        return well_formed("".join(self.pieces(user_text)))


_USAGE_KEYS = frozenset({"input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens", "thinking_tokens"})
_FIELD_NAMES = frozenset(field.name for field in fields(Plan))


def well_formed(text: str) -> str:
    """`text` with surrogate pairs joined and lone surrogates replaced by U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


@lru_cache(maxsize=64)
def words(count: int) -> tuple[str, ...]:
    """The deterministic deltas `"tok0 "`, `"tok1 "`, … (`count` of them)."""
    return tuple(f"tok{i} " for i in range(count))


def _flag(value: str) -> bool:
    if value not in {"0", "1"}:
        raise ValueError(value)
    return value == "1"


_SPEC: dict[str, Callable[[str], Any]] = (
    dict.fromkeys(("text", "finish", "fault", "key", "message"), unquote)
    | dict.fromkeys(("chars", "tokens", "wire", "after", "times"), int)
    | dict.fromkeys(("rate", "first", "retry_after"), float)
    | dict.fromkeys(("echo", "stamp", "omit_usage", "done"), _flag)
)
_SPEC_USAGE = {
    "input": "input_tokens",
    "output": "output_tokens",
    "cache_read": "cache_read_tokens",
    "cache_write": "cache_write_tokens",
    "thinking": "thinking_tokens",
}


def plan_from_model(model: str, base: Plan) -> Plan | None:
    """The plan in a model name such as `sim:tokens=100,rate=50,fault=cut,after=10`, on top of `base`.

    Text values are percent-encoded where they hold a comma. Also known: `input`, `output`, `cache_read`,
    `cache_write`, `thinking` (usage).

    Returns:
        None when the name holds no spec (`sim`, `llama3.2:1b`).

    Raises:
        PlanError: an unknown key or a value of the wrong type.
    """
    _, colon, spec = model.partition(":")
    if not colon or "=" not in spec:
        return None
    changes: dict[str, Any] = {}
    usage: dict[str, int] = {}
    for item in spec.split(","):
        name, _, value = item.partition("=")
        try:
            if name in _SPEC_USAGE:
                usage[_SPEC_USAGE[name]] = int(value)
            else:
                changes[name] = _SPEC[name](value)
        except KeyError:
            raise PlanError(f"model spec: unknown {name!r}; known: {', '.join((*_SPEC, *_SPEC_USAGE))}") from None
        except ValueError:
            raise PlanError(f"model spec: {name}={value!r} has the wrong type") from None
    if usage:
        changes["usage"] = usage
    return replace(base, **changes)


def plan_from_mapping(given: Mapping[str, Any]) -> Plan:
    """A plan from parsed JSON or keyword arguments, fields as in `Plan`.

    Raises:
        PlanError: an unknown field, or a value that `Plan` refuses.
    """
    unknown = set(given) - _FIELD_NAMES
    if unknown:
        raise PlanError(f"plan: unknown {sorted(unknown)}; known: {sorted(_FIELD_NAMES)}")
    changes = dict(given)
    if changes.get("chunks") is not None:
        changes["chunks"] = tuple(changes["chunks"])
    if changes.get("fault") is not None:
        changes["fault"] = str(changes["fault"])
    try:
        return Plan(**changes)
    except TypeError as error:
        raise PlanError(f"plan: {error}") from error


def limited(
    pieces: Sequence[str], max_tokens: int | None, stop: Sequence[str]
) -> tuple[Sequence[str], str, str | None]:
    """Apply a request's `max_tokens` and stop sequences.

    Returns:
        The deltas left, why the text ends (`stop`, `length` or `stop_sequence`), and the sequence that matched.
    """
    finish, matched = "stop", None
    if max_tokens is not None and len(pieces) > max_tokens:
        pieces, finish = pieces[:max_tokens], "length"
    if stop:
        text = "".join(pieces)
        found = sorted((text.index(item), item) for item in stop if item and item in text)
        if found:
            end, matched = found[0]
            finish = "stop_sequence"
            pieces = _head(pieces, end)
    return pieces, finish, matched


def _head(pieces: Sequence[str], length: int) -> list[str]:
    head: list[str] = []
    for piece in pieces:
        if length <= 0:
            break
        head.append(piece[:length])
        length -= len(piece)
    return head
