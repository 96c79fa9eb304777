"""From what providers and networks do wrong to the codes of :class:`~promptmill.errors.BackendError`.

HTTP statuses:

====================== ==================== ===========================================================================
status                 code                 why
====================== ==================== ===========================================================================
401, 403               auth                 the key is wrong or may not use this model
402                    auth                 the account may not (billing); the same request will not succeed by itself
413                    context_too_long     too large for this server; another model may take it
400 to 422, the rest   bad_request          or context_too_long, auth, refused where the body says so
408, 409, 425          overloaded           the provider gave up, or was busy with the same thing: later may succeed
429                    rate_limited         ``retry_after_s`` from ``Retry-After`` or Google's ``RetryInfo``; final
                                            where the quota is used up
502, 520 to 527        unreachable          a gateway answered, the provider behind it did not
500, 503, 504, 529 …   overloaded           the provider is there and failed; later may succeed
3xx                    bad_request          ``api_url`` is wrong: redirects are not followed
====================== ==================== ===========================================================================

Network: a connection that took longer than ``connect_s`` is ``timeout_connect``; refused, unknown name and TLS trouble
are ``unreachable``, and so is a connection that breaks before the answer's head (whether the provider worked on the
request is then unknown); one that breaks in the answer is ``cut``.

Messages are at most 500 characters, without control characters, and without anything that looks like a key.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final, cast

import aiohttp
import orjson

from promptmill.errors import BackendError
from promptmill.text import clean_text

MESSAGE_CHARS: Final = 500
MAX_RETRY_AFTER_S: Final = 24 * 3600.0

_BY_STATUS: Final = {
    401: "auth",
    402: "auth",
    403: "auth",
    408: "overloaded",
    409: "overloaded",
    413: "context_too_long",
    425: "overloaded",
    429: "rate_limited",
    502: "unreachable",
    **dict.fromkeys(range(520, 528), "unreachable"),
}
# Types and codes of error objects: OpenAI's, Anthropic's, what vLLM, llama.cpp and Ollama send in their place, and
# Google's statuses (https://ai.google.dev/gemini-api/docs/troubleshooting) and reasons.
_BY_TYPE: Final = {
    "aborted": "overloaded",
    "api_error": "overloaded",
    "api_key_invalid": "auth",
    "api_key_service_blocked": "auth",
    "authentication_error": "auth",
    "billing_disabled": "auth",
    "billing_error": "auth",
    "content_filter": "refused",
    "content_policy_violation": "refused",
    "context_length_exceeded": "context_too_long",
    "deadline_exceeded": "overloaded",
    "exceed_context_size_error": "context_too_long",
    "failed_precondition": "bad_request",
    "insufficient_quota": "rate_limited",
    "internal": "overloaded",
    "internal_error": "overloaded",
    "internal_server_error": "overloaded",
    "internalservererror": "overloaded",
    "invalid_api_key": "auth",
    "invalid_argument": "bad_request",
    "invalid_request_error": "bad_request",
    "badrequesterror": "bad_request",
    "model_not_found": "bad_request",
    "not_found": "bad_request",
    "not_found_error": "bad_request",
    "overloaded_error": "overloaded",
    "permission_denied": "auth",
    "permission_error": "auth",
    "rate_limit_error": "rate_limited",
    "rate_limit_exceeded": "rate_limited",
    "request_too_large": "context_too_long",
    "requests": "rate_limited",
    "resource_exhausted": "rate_limited",
    "tokens": "rate_limited",
    "server_error": "overloaded",
    "service_unavailable": "overloaded",
    "timeout_error": "overloaded",
    "unauthenticated": "auth",
    "unavailable": "overloaded",
    "unavailable_error": "overloaded",
}
_TOO_LONG: Final = re.compile(
    r"context[ _](?:length|size|window|limit)|prompt is too long|input is too long|too many (?:input )?tokens"
    r"|maximum context|reduce the length|exceeds? the (?:maximum|max) (?:number of )?tokens",
    re.IGNORECASE,
)
_KEY_LIKE: Final = re.compile(
    r"\b(?:sk|rk|pk|gsk|xai|key)[-_][\w*.\-]{6,}|\bAIza[\w\-]{10,}|(?<=\bbearer )[\w*.\-]{6,}", re.IGNORECASE
)
_DURATION: Final = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)s")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]+")


@dataclass(frozen=True, slots=True)
class ProviderError:
    """An error as the provider words it.

    ``kinds`` are its reason, code, type and status in words, lower case, the most exact first; ``status`` is a code in
    numbers. ``final`` says that the quota is used up, so that the same request fails again today.
    """

    message: str = ""
    kinds: tuple[str, ...] = ()
    status: int | None = None
    retry_after_s: float | None = None
    final: bool = False
    request_id: str | None = None

    @property
    def code(self) -> str:
        """Our code for an error object that came without an HTTP status of its own."""
        if self.too_long:
            return "context_too_long"
        if self.named:
            return self.named
        return _status_code(self.status) if self.status and self.status >= 400 else "crashed"

    @property
    def named(self) -> str | None:
        """Our code for the first of ``kinds`` that has one."""
        return next((_BY_TYPE[kind] for kind in self.kinds if kind in _BY_TYPE), None)

    @property
    def too_long(self) -> bool:
        """Whether it says that the prompt does not fit the model."""
        named = {_BY_TYPE.get(kind) for kind in self.kinds}
        return "context_too_long" in named or bool(_TOO_LONG.search(self.message) and "rate_limited" not in named)


def error_object(value: Any) -> ProviderError | None:
    """The error in a parsed body or event, in any of the usual forms; None where there is none.

    Forms: ``{"error": {"message", "type", "code"}}``, ``{"error": "text"}``, ``{"detail": …}`` (FastAPI, Open WebUI),
    ``{"object": "error", "message", "type", "code"}`` (vLLM), ``[{"error": {"message", "status", "details"}}]``
    (Google).
    """
    if isinstance(value, list) and len(cast("list[Any]", value)) == 1:
        value = cast("list[Any]", value)[0]
    if not isinstance(value, dict):
        return None
    data = cast("dict[str, Any]", value)
    error: Any = data.get("error")
    if error is None and (data.get("object") == "error" or data.get("type") == "error"):
        error = data
    if error is None and "detail" in data and "choices" not in data:
        error = data["detail"]
    if not error:
        return None
    found = _fields(cast("dict[str, Any]", error)) if isinstance(error, dict) else ProviderError(_worded(error))
    request_id = data.get("request_id")
    return replace(found, request_id=request_id) if isinstance(request_id, str) else found


def _fields(error: dict[str, Any]) -> ProviderError:
    message = error.get("message") or error.get("detail") or error.get("error") or ""
    # Google's: https://cloud.google.com/apis/design/errors#error_details
    details = [cast("dict[str, Any]", part) for part in _list(error.get("details")) if isinstance(part, dict)]
    words = [part.get("reason") for part in details] + [error.get(name) for name in ("code", "type", "status")]
    kinds = tuple(word.lower() for word in words if isinstance(word, str))
    number = error.get("code", error.get("status"))
    violated = [cast("dict[str, Any]", v) for d in details for v in _list(d.get("violations")) if isinstance(v, dict)]
    return ProviderError(
        message=_worded(message),
        kinds=kinds,
        status=number if isinstance(number, int) else None,
        retry_after_s=next((s for part in details if (s := _duration_s(part.get("retryDelay"))) is not None), None),
        final="insufficient_quota" in kinds or any("perday" in str(v.get("quotaId")).lower() for v in violated),
    )


def _list(value: Any) -> list[Any]:
    return cast("list[Any]", value) if isinstance(value, list) else []


def _worded(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _duration_s(value: Any) -> float | None:
    """Protobuf's Duration in JSON: ``"37s"``, ``"1.5s"``."""
    found = _DURATION.fullmatch(value) if isinstance(value, str) else None
    return min(float(found[1]), MAX_RETRY_AFTER_S) if found else None


def stream_error(error: ProviderError, *, request_id: str | None = None, secret: str | None = None) -> BackendError:
    """For an error object inside an answer that began with status 200."""
    said = safe_message(error.message, secret) or (error.kinds[0] if error.kinds else "no reason given")
    return BackendError(
        f"the provider reported: {said}",
        code=error.code,
        retryable=False if error.final else None,
        retry_after_s=error.retry_after_s,
        provider_request_id=request_id or error.request_id,
    )


def status_error(
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    request_id: str | None = None,
    secret: str | None = None,
) -> BackendError:
    """For an answer whose status is not 200. ``headers`` are looked up in lower case."""
    error = _parse(body)
    code = _status_code(status)
    if code in {"bad_request", "overloaded"} and error.too_long:
        code = "context_too_long"
    elif code == "bad_request" and error.named in {"auth", "refused"}:
        code = error.named  # Google answers 400 to a wrong key, Azure to a prompt that its filter holds back
    said = safe_message(error.message, secret)
    if 300 <= status < 400:
        said = "a redirect, which is not followed; correct api_url"
    return BackendError(
        f"the provider answered HTTP {status}" + (f": {said}" if said else ""),
        code=code,
        retryable=False if error.final else None,
        retry_after_s=_either(retry_after_s(headers), error.retry_after_s) if status >= 400 else None,
        provider_request_id=request_id or error.request_id,
    )


def transport_error(err: BaseException, *, address: str, answered: bool, request_id: str | None = None) -> BackendError:
    """For a connection that failed; ``answered`` says whether the answer's head had come; ``address`` is host:port.

    Looks through to aiohttp's own exception: httpx-aiohttp maps a refused connection and a broken one to
    ``ConnectTimeout``.
    """
    code, what, shown = "unreachable", "cannot be reached", err
    if answered:
        code, what = "cut", "closed the connection before the answer's end"
    for cause in _causes(err):
        if isinstance(cause, aiohttp.ConnectionTimeoutError):
            code, what = "timeout_connect", "did not accept the connection in time"
        elif isinstance(cause, aiohttp.ClientConnectorError | aiohttp.ClientHttpProxyError):
            code, what = "unreachable", "cannot be reached"
        elif isinstance(cause, aiohttp.InvalidURL):
            code, what = "bad_request", "is no usable address"
        elif isinstance(cause, aiohttp.ClientResponseError) and not answered:
            code, what = "malformed", "did not answer with HTTP"
        elif isinstance(cause, aiohttp.ServerDisconnectedError | ConnectionError) and not answered:
            what = "closed the connection without an answer"
        elif not isinstance(cause, aiohttp.ClientPayloadError):
            continue
        # The libraries above word it as what they take it for ("Request timed out" for a refused connection).
        shown = cause
        break
    reason = safe_message(str(shown) or type(shown).__name__)
    return BackendError(f"{address} {what} ({reason})", code=code, provider_request_id=request_id)


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """``Retry-After`` (seconds or an HTTP date) or ``retry-after-ms`` as seconds from now; None where unusable."""
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name, "").strip()
        if not value:
            continue
        try:
            seconds = float(value) * scale
        except ValueError:
            try:
                date = parsedate_to_datetime(value)
            except ValueError:
                continue
            seconds = (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
        if not math.isnan(seconds):
            return min(max(seconds, 0.0), MAX_RETRY_AFTER_S)
    return None


def safe_message(text: str, secret: str | None = None) -> str:
    """``text`` without keys and control characters, bounded."""
    # A margin first, so that a huge body is not searched; a key cut at the margin is cut off below.
    text = clean_text(text[: MESSAGE_CHARS * 4])
    if secret:
        text = text.replace(secret, "***")
    text = _CONTROL.sub(" ", _KEY_LIKE.sub("***", text)).strip()
    return text if len(text) <= MESSAGE_CHARS else text[: MESSAGE_CHARS - 1] + "…"


def _status_code(status: int) -> str:
    return _BY_STATUS.get(status) or ("overloaded" if status >= 500 else "bad_request")


def _parse(body: bytes) -> ProviderError:
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        text = body.decode("utf-8", "replace")
        # A proxy's HTML page says nothing that helps.
        return ProviderError("" if text.lstrip().startswith("<") else text)
    return error_object(value) or ProviderError(value.get("message", "") if isinstance(value, dict) else "")  # pyright: ignore[reportUnknownArgumentType, reportUnknownMemberType]


def _either(first: float | None, second: float | None) -> float | None:
    return first if first is not None else second


def _causes(err: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = err
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__
