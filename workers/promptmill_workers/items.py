"""What a worker and an isolated backend say to each other, as lines of JSON; no I/O.

The worker writes one :class:`Order` to the child's standard input and closes it. The child answers with one line an
item on standard output, and with one last line, after which it ends:

============================================================================ =================================
line                                                                         stands for
============================================================================ =================================
``{"type":"text","text":…}``                                                 TextDelta
``{"type":"usage","usage":{…},"cost_usd":…}``                                UsageUpdate
``{"type":"restart","reason":…}``                                            StartedAnew
``{"type":"rate","requests":{…},"tokens":{…},…}``                            RateInfo
``{"type":"finished","reason":…,"request_id":…}``                            Finished: the last line
``{"type":"error","code":…,"message":…,"retryable":…,"request_id":…,…}``     BackendError: the last line
============================================================================ =================================

Fields that are None may be left out; unknown fields are ignored. JSON escapes every line end, so a text never breaks a
line, whatever it holds.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Final

import orjson
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from promptmill.contract import JobRequest, Timeouts, Usage
from promptmill.errors import BackendError
from promptmill.rates import RateInfo, RateWindow
from promptmill.settings import ModelConfig
from promptmill.text import clean_text
from promptmill_workers.backends.base import Call, Finished, Item, StartedAnew, TextDelta, UsageUpdate


class Order(BaseModel):
    """One call for a child: which model, the call itself, and the secrets that the model's configuration names."""

    # Options come from TOML, which knows inf and nan; JSON's usual answer to them, null, would change them.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    name: str
    config: ModelConfig
    variables: dict[str, str] = Field(repr=False)
    """Environment variables to set before anything of the backend is imported."""
    job_id: str
    attempt: int
    request: JobRequest = Field(repr=False)
    timeouts: Timeouts

    @classmethod
    def of(cls, name: str, config: ModelConfig, variables: dict[str, str], call: Call) -> Order:
        """``call`` to the model ``name``."""
        # Everything in it was checked when it was made.
        return cls.model_construct(
            name=name,
            config=config,
            variables=variables,
            job_id=call.job_id,
            attempt=call.attempt,
            request=call.request,
            timeouts=call.timeouts,
        )

    def to_json(self) -> bytes:
        """One JSON object. Holds secrets and the prompt: for a pipe only."""
        return self.model_dump_json().encode()

    @property
    def call(self) -> Call:
        """The call, as a backend takes it."""
        return Call(self.job_id, self.attempt, self.request, self.timeouts)


def encode_item(item: Item) -> bytes:
    """One line, its end included. A lone surrogate in a text, which no backend may send, becomes U+FFFD."""
    if isinstance(item, TextDelta):
        try:
            return _line({"type": "text", "text": item.text})
        except orjson.JSONEncodeError:
            return _line({"type": "text", "text": clean_text(item.text)})
    if isinstance(item, UsageUpdate):
        return _line({"type": "usage", "usage": item.usage.model_dump(), "cost_usd": item.cost_usd})
    if isinstance(item, StartedAnew):
        return _line({"type": "restart", "reason": clean_text(item.reason)})
    if isinstance(item, RateInfo):
        return _line({"type": "rate", **asdict(item)})
    request_id = clean_text(item.provider_request_id) if item.provider_request_id is not None else None
    return _line({"type": "finished", "reason": clean_text(item.reason), "request_id": request_id})


def encode_error(error: BackendError) -> bytes:
    """The line that ends an attempt that failed, its end included."""
    fields: dict[str, Any] = {**error.to_dict(), "request_id": error.provider_request_id}
    cleaned = {k: clean_text(v) if isinstance(v, str) else v for k, v in fields.items()}
    return _line({"type": "error", **cleaned})


def decode_line(line: bytes) -> Item | BackendError:
    """The item or the error that one line (with or without its end) stands for.

    Raises
    ------
    BackendError
        ``malformed``: the line is none of the protocol's.
    """
    try:
        value = orjson.loads(line)
        # The line that comes once a token is not worth a model.
        if value["type"] == "text" and type(value["text"]) is str:
            return TextDelta(value["text"])
        return _ANSWERS[value["type"]].validate_python(value).item()
    except (ValueError, KeyError, TypeError) as err:
        # Nothing of the line itself and nothing of pydantic's message: they may hold the answer, the prompt or a key.
        what = "a line with wrong fields" if isinstance(err, ValidationError) else "a line that is not the protocol's"
        raise BackendError(f"the isolated backend wrote {what} ({len(line)} bytes)", code="malformed") from None


class _Line(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _Usage(_Line):
    usage: Usage
    cost_usd: float | None = None

    def item(self) -> Item:
        return UsageUpdate(self.usage, self.cost_usd)


class _Restart(_Line):
    reason: str

    def item(self) -> Item:
        return StartedAnew(self.reason)


class _Window(_Line):
    limit: int | None = None
    remaining: int | None = None
    reset_s: float | None = None


class _Rate(_Line):
    requests: _Window | None = None
    tokens: _Window | None = None
    input_tokens: _Window | None = None
    output_tokens: _Window | None = None

    def item(self) -> Item:
        windows = (self.requests, self.tokens, self.input_tokens, self.output_tokens)
        return RateInfo(*(RateWindow(w.limit, w.remaining, w.reset_s) if w else None for w in windows))


class _Finished(_Line):
    reason: str
    request_id: str | None = None

    def item(self) -> Item:
        return Finished(self.reason, self.request_id)


class _Error(_Line):
    code: str
    message: str
    retryable: bool
    field: str | None = None
    limit: float | None = None
    retry_after_s: float | None = None
    request_id: str | None = None

    def item(self) -> BackendError:
        fields = self.model_dump(exclude={"request_id", "message", "code"})
        return BackendError(self.message, code=self.code, provider_request_id=self.request_id, **fields)


_ANSWERS: Final[dict[str, TypeAdapter[Any]]] = {
    "usage": TypeAdapter(_Usage),
    "restart": TypeAdapter(_Restart),
    "rate": TypeAdapter(_Rate),
    "finished": TypeAdapter(_Finished),
    "error": TypeAdapter(_Error),
}


def _line(value: dict[str, Any]) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE)
