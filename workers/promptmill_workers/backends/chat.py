"""OpenAI's chat completions, as every backend that speaks them makes its request; their answer is ``openai_stream``'s.

Protocol: https://platform.openai.com/docs/api-reference/chat/create and …/chat-streaming.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any, Final, Literal
from urllib.parse import urlsplit

import httpx
import orjson
from httpx_aiohttp import AiohttpTransport
from pydantic import Field

from promptmill.contract import ImagePart, JobRequest, Message, ResponseFormat
from promptmill.errors import BackendError, ConfigError
from promptmill.settings import ModelConfig
from promptmill_workers.backends import http
from promptmill_workers.backends.base import Call, Item
from promptmill_workers.backends.failures import status_error, transport_error
from promptmill_workers.backends.openai_stream import ChatDecoder
from promptmill_workers.backends.options import Options, secret_for_call
from promptmill_workers.backends.rate_headers import rate_info
from promptmill_workers.backends.sse import SseTooLongError

_ERROR_BYTES: Final = 256 * 1024
_ERROR_BODY_S: Final = 5.0
_SERVERS_OWN: Final = frozenset({"model", "messages", "stream"})
_HEADERS: Final = {
    "accept": "text/event-stream, application/json",
    # Compressed streams cost more than they save, and some servers hold tokens back to fill a block.
    "accept-encoding": "identity",
    "content-type": "application/json",
    "user-agent": "promptmill",
}


class ChatOptions(Options):
    """``options`` that every such backend has."""

    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Fields added to each request as they are; they win over ours, except ``model``, ``messages`` and ``stream``."""


class ChatCompletions:
    """A base for backends: one model at one address. Opens its share of the connection pool at the first call.

    ``url`` is the whole address that is asked. ``max_tokens_field`` names the field for ``max_tokens``;
    ``thinking_in_total`` says that usage counts the tokens of a model's thinking in ``total_tokens`` only; ``strict``
    asks for OpenAI's strict schemas.

    Raises
    ------
    ConfigError
        ``extra_body`` sets a field that is not its to set.
    """

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        options: ChatOptions,
        *,
        url: str,
        max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens",
        include_usage: bool = True,
        thinking_in_total: bool = False,
        strict: bool = False,
    ) -> None:
        clash = _SERVERS_OWN & options.extra_body.keys()
        if clash:
            key = f"models.{name}.options.extra_body"
            raise ConfigError(f"{key}: cannot set {', '.join(sorted(clash))}", field=key)
        self._name = name
        self._config = config
        self._extra = options.extra_body
        self._url = httpx.URL(url)
        self._address = urlsplit(url).netloc.rpartition("@")[2]
        self._max_tokens_field = max_tokens_field
        self._include_usage = include_usage
        self._thinking_in_total = thinking_in_total
        self._strict = strict
        self._lease = http.Lease(url)
        self._transport: httpx.AsyncBaseTransport | None = None

    async def complete(self, call: Call) -> AsyncGenerator[Item, None]:
        """See :class:`~promptmill_workers.backends.base.Backend`."""
        self.check(call.request)
        secret = secret_for_call(self._name, self._config)
        async with self._answer(call, secret) as response, aclosing(http.body_chunks(response)) as chunks:
            rate = rate_info(response.headers)
            if rate is not None:
                yield rate
            if response.status_code != 200:
                raise await self._refusal(response, secret)
            decoder = ChatDecoder(
                request_id=_request_id(response), secret=secret, thinking_in_total=self._thinking_in_total
            )
            async with aclosing(http.decoded(chunks, decoder, address=self._address)) as batches:
                async for batch in batches:
                    for item in batch:
                        yield item

    async def aclose(self) -> None:
        """Give up the share in the pool."""
        self._transport = None
        await self._lease.aclose()

    def check(self, request: JobRequest) -> None:
        """Raise ``bad_request`` for what this provider is known to refuse; here nothing."""

    def headers(self) -> Mapping[str, str]:
        """Headers of this call beside ours; here none."""
        return {}

    @asynccontextmanager
    async def _answer(self, call: Call, secret: str | None) -> AsyncGenerator[httpx.Response]:
        """The answer, whatever its status, its body unread. Closed on the way out."""
        headers = dict(_HEADERS)
        if secret:
            headers["authorization"] = f"Bearer {secret}"
        headers.update(self.headers())
        request = httpx.Request(
            "POST",
            self._url,
            content=orjson.dumps(self._body(call.request)),
            headers=headers,
            extensions={"timeout": http.timeouts(call.timeouts.connect_s).as_dict()},
        )
        try:
            # Below httpx's client: its redirects, cookies and hooks are unwanted here and cost as much as the rest.
            response = await self._open().handle_async_request(request)
        except http.TRANSPORT_ERRORS as err:
            raise transport_error(err, address=self._address, answered=False) from err
        try:
            yield response
        finally:
            await response.aclose()

    def _open(self) -> httpx.AsyncBaseTransport:
        if self._transport is None:
            # Never closed itself: the session that it is given is everybody's.
            self._transport = AiohttpTransport(
                verify=self._lease.context,
                client=self._lease.session(),
                proxy=httpx.Proxy(self._lease.proxy) if self._lease.proxy else None,
            )
        return self._transport

    def _body(self, request: JobRequest) -> dict[str, Any]:
        messages = [{"role": "system", "content": request.system}] if request.system else []
        body: dict[str, Any] = {
            "model": self._config.model_name,
            "messages": [*messages, *(_message(m) for m in request.messages)],
            "stream": True,
        }
        if self._include_usage:
            body["stream_options"] = {"include_usage": True}
        if request.max_tokens is not None:
            body[self._max_tokens_field] = request.max_tokens
        if request.temperature is not None:
            body["temperature"] = request.temperature
        if request.stop:
            body["stop"] = request.stop
        if request.response_format:
            body["response_format"] = self._response_format(request.response_format)
        return body | self._extra

    def _response_format(self, form: ResponseFormat) -> dict[str, Any]:
        if form.json_schema is None:
            return {"type": "json_object"}
        described: dict[str, Any] = {"name": form.name, "schema": form.json_schema}
        if self._strict:
            described["strict"] = True
        return {"type": "json_schema", "json_schema": described}

    async def _refusal(self, response: httpx.Response, secret: str | None) -> BackendError:
        body = b""
        try:
            # Bounded in time: the status says enough, and a body that never ends would pass for a silent model.
            async with asyncio.timeout(_ERROR_BODY_S):
                body = await http.read_bounded(http.body_chunks(response), _ERROR_BYTES)
        except (*http.TRANSPORT_ERRORS, SseTooLongError):
            body = b""
        return status_error(
            response.status_code, response.headers, body, request_id=_request_id(response), secret=secret
        )


def _request_id(response: httpx.Response) -> str | None:
    return response.headers.get("x-request-id") or response.headers.get("request-id")


def _message(message: Message) -> dict[str, Any]:
    if isinstance(message.content, str):
        return {"role": message.role, "content": message.content}
    parts: list[dict[str, Any]] = []
    for part in message.content:
        if isinstance(part, ImagePart):
            url = part.url or f"data:{part.media_type};base64,{part.data}"
            parts.append({"type": "image_url", "image_url": {"url": url}})
        else:
            parts.append({"type": "text", "text": part.text})
    return {"role": message.role, "content": parts}
