"""Anthropic's Messages API, and servers that speak it.

The SDK makes the request (its headers, its errors); the stream is read here: of the CPU that a streamed token takes
with the SDK's own reader, building a pydantic model for each event is a large part.

Facts about the SDK (anthropic 2.12) that the code relies on: it is built on ``httpx2``; the key travels as
``Authorization: Bearer``; ``temperature`` is no argument any more and goes into ``extra_body``; a client that gets
``api_key`` looks at no credential in the environment, and one that gets ``base_url`` not at ``ANTHROPIC_BASE_URL``. It
does read ``ANTHROPIC_CUSTOM_HEADERS``.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from typing import Any, Final
from urllib.parse import urlsplit

import httpx2
from anthropic import APIConnectionError, APIStatusError, AsyncAnthropic
from anthropic.resources.messages import AsyncMessages
from httpx_aiohttp.httpx2 import AiohttpTransport
from pydantic import Field

from promptmill.contract import ImagePart, JobRequest, Message, ResponseFormat
from promptmill.errors import BackendError, ConfigError
from promptmill.settings import ModelConfig
from promptmill_workers.backends import http
from promptmill_workers.backends.anthropic_stream import MessagesDecoder
from promptmill_workers.backends.base import Call, Item
from promptmill_workers.backends.failures import status_error, transport_error
from promptmill_workers.backends.options import Options, parse_options, secret_for_call, with_default_key
from promptmill_workers.backends.rate_headers import rate_info

DEFAULT_URL: Final = "https://api.anthropic.com"
DEFAULT_KEY_ENV: Final = "ANTHROPIC_API_KEY"
_ERRORS: Final[http.TransportErrors] = (
    *http.TRANSPORT_ERRORS,
    httpx2.HTTPError,
    httpx2.InvalidURL,
    httpx2.StreamError,
)


class AnthropicOptions(Options):
    """``options`` of an ``anthropic_api`` model."""

    max_tokens: int = Field(default=4096, gt=0)
    """The API demands a bound; this one where the request gives none."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Fields added to each request as they are (``thinking``, ``top_k``, …)."""


class AnthropicApi:
    """See the module. Opens its share of the connection pool at the first call.

    The key is read at each call. Where neither ``api_key_env`` nor ``api_key_file`` is configured, it is
    ``ANTHROPIC_API_KEY`` for Anthropic's own address, and none for another ``api_url``: a key must not travel to a host
    that it was not meant for.
    """

    def __init__(self, name: str, config: ModelConfig) -> None:
        self._name = name
        self._options = parse_options(AnthropicOptions, name, config)
        if not config.model_name:
            raise ConfigError(f"models.{name}: anthropic_api needs model_name", field=f"models.{name}.model_name")
        self._config = with_default_key(config, DEFAULT_URL, DEFAULT_KEY_ENV)
        self._model = config.model_name
        # The SDK appends /v1/messages.
        self._url = (config.api_url or DEFAULT_URL).removesuffix("/v1")
        self._address = urlsplit(self._url).netloc.rpartition("@")[2]
        self._lease = http.Lease(self._url)
        self._http: httpx2.AsyncClient | None = None
        self._client: AsyncAnthropic | None = None
        self._key: str | None = None

    async def complete(self, call: Call) -> AsyncGenerator[Item, None]:
        """See :class:`~promptmill_workers.backends.base.Backend`."""
        secret = secret_for_call(self._name, self._config)
        async with self._answer(call, secret) as (response, refusal), aclosing(http.body_chunks(response)) as chunks:
            rate = rate_info(response.headers)
            if rate is not None:
                yield rate
            if refusal is not None:
                raise refusal
            decoder = MessagesDecoder(request_id=response.headers.get("request-id"), secret=secret)
            async with aclosing(http.decoded(chunks, decoder, address=self._address, errors=_ERRORS)) as batches:
                async for batch in batches:
                    for item in batch:
                        yield item

    async def aclose(self) -> None:
        """Give up the share in the pool."""
        client, self._http, self._client = self._http, None, None
        if client is not None:
            await client.aclose()
        await self._lease.aclose()

    @asynccontextmanager
    async def _answer(
        self, call: Call, secret: str | None
    ) -> AsyncGenerator[tuple[httpx2.Response, BackendError | None]]:
        """The answer with status 200, its body unread, or one with another and its error. Closed on the way out."""
        # The annotation has its module imported with this one: the SDK would do so here, for a second, in the loop.
        messages: AsyncMessages = self._sdk(secret).messages
        sending = messages.with_streaming_response.create(
            **self._arguments(call.request),
            stream=True,
            timeout=httpx2.Timeout(None, connect=call.timeouts.connect_s, pool=call.timeouts.connect_s),
        )
        try:
            response = await sending.__aenter__()
        except APIStatusError as err:
            answer, refusal = err.response, _refusal(err, secret)
        except (APIConnectionError, *_ERRORS) as err:
            raise transport_error(err, address=self._address, answered=False) from err
        else:
            try:
                yield response.http_response, None
            finally:
                await response.close()
            return
        yield answer, refusal

    def _sdk(self, secret: str | None) -> AsyncAnthropic:
        if self._http is None:
            lease = self._lease
            self._http = httpx2.AsyncClient(
                transport=_Shared(
                    verify=lease.context,
                    client=lease.session(),
                    proxy=httpx2.Proxy(lease.proxy) if lease.proxy else None,
                ),
                headers={"accept-encoding": "identity"},
                cookies=http.no_cookies(),
                trust_env=False,
            )
        if self._client is None or self._key != secret:
            # A server of one's own may want no key, but the SDK insists on something.
            self._client = AsyncAnthropic(
                api_key=secret or "none", base_url=self._url, max_retries=0, http_client=self._http
            )
            self._key = secret
        return self._client

    def _arguments(self, request: JobRequest) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "model": self._model,
            "max_tokens": request.max_tokens or self._options.max_tokens,
            "messages": [_message(m) for m in request.messages],
        }
        if request.system:
            arguments["system"] = request.system
        if request.stop:
            arguments["stop_sequences"] = request.stop
        extra = dict(self._options.extra_body)
        if request.response_format:
            # One object holds the format and what extra_body may set beside it (`effort`).
            beside: dict[str, Any] = extra.pop("output_config", {})
            arguments["output_config"] = {**beside, "format": _output_format(request.response_format)}
        if request.temperature is not None:
            extra["temperature"] = request.temperature
        if extra:
            arguments["extra_body"] = extra
        return arguments


class _Shared(AiohttpTransport):
    """A transport whose session is everybody's: closing the client must not close it."""

    async def aclose(self) -> None:
        return


def _refusal(err: APIStatusError, secret: str | None) -> BackendError:
    response = err.response
    refusal = status_error(
        err.status_code, response.headers, response.content, request_id=err.request_id, secret=secret
    )
    refusal.__cause__ = err
    return refusal


def _output_format(form: ResponseFormat) -> dict[str, Any]:
    """Protocol: https://platform.claude.com/docs/en/build-with-claude/structured-outputs."""
    if form.json_schema is None:
        # The API knows schemas only, and of an object's schema it demands that all properties be named.
        raise BackendError(
            "response_format.type: the Messages API knows no json_object; give a json_schema",
            code="bad_request",
            field="response_format.type",
        )
    return {"type": "json_schema", "schema": form.json_schema}


def _message(message: Message) -> dict[str, Any]:
    if isinstance(message.content, str):
        return {"role": message.role, "content": message.content}
    parts: list[dict[str, Any]] = []
    for part in message.content:
        if not isinstance(part, ImagePart):
            parts.append({"type": "text", "text": part.text})
        elif part.url:
            parts.append({"type": "image", "source": {"type": "url", "url": part.url}})
        else:
            source = {"type": "base64", "media_type": part.media_type, "data": part.data}
            parts.append({"type": "image", "source": source})
    return {"role": message.role, "content": parts}
