"""Any server that speaks OpenAI's chat completions: Ollama, vLLM, llama.cpp, LM Studio, Open WebUI, OpenAI itself.

Protocol: https://platform.openai.com/docs/api-reference/chat/create and …/chat-streaming.

``host_type`` openai asks ``{api_url}/chat/completions``, openwebui asks ``{api_url}/api/chat/completions``. An answer
counts as complete with a ``finish_reason`` or with ``[DONE]``; without either it was ``cut``. A server that ignores
``stream`` and answers with one JSON object is understood: its text is taken whole. Reasoning that a server sends beside
the answer (``reasoning_content``) is not part of it and is left out.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from typing import Any, Final, Literal
from urllib.parse import urlsplit, urlunsplit

import httpx
import orjson
from pydantic import Field

from promptmill.contract import ImagePart, JobRequest, Message
from promptmill.errors import BackendError, ConfigError
from promptmill.settings import ModelConfig, read_secret
from promptmill_workers.backends import http
from promptmill_workers.backends.base import Call, Item
from promptmill_workers.backends.failures import status_error, transport_error
from promptmill_workers.backends.openai_stream import ChatDecoder
from promptmill_workers.backends.options import Options, parse_options, secret_for_call
from promptmill_workers.backends.sse import SseTooLongError

_ERROR_BYTES: Final = 256 * 1024
_ERROR_BODY_S: Final = 5.0
_PATHS: Final = {"openai": "/chat/completions", "openwebui": "/api/chat/completions"}
_SERVERS_OWN: Final = frozenset({"model", "messages", "stream"})


_HEADERS: Final = {
    "accept": "text/event-stream, application/json",
    # Compressed streams cost more than they save, and some servers hold tokens back to fill a block.
    "accept-encoding": "identity",
    "content-type": "application/json",
    "user-agent": "promptmill",
}


class LocalOpenAIOptions(Options):
    """``options`` of a ``local_openai`` model."""

    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Fields added to each request as they are; they win over ours, except ``model``, ``messages`` and ``stream``."""
    headers_env: dict[str, str] = Field(default_factory=dict)
    """Further headers: name to the environment variable that holds the value, read at each call."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """OpenAI's reasoning models refuse ``max_tokens``; most local servers know nothing else."""
    include_usage: bool = True
    """Ask for ``stream_options.include_usage``; switch off for servers that refuse unknown fields."""


class LocalOpenAI:
    """See the module. One connection pool, opened at the first call."""

    def __init__(self, name: str, config: ModelConfig) -> None:
        self._name = name
        self._config = config
        self._options = parse_options(LocalOpenAIOptions, name, config)
        clash = _SERVERS_OWN & self._options.extra_body.keys()
        if clash:
            key = f"models.{name}.options.extra_body"
            raise ConfigError(f"{key}: cannot set {', '.join(sorted(clash))}", field=key)
        if not config.api_url or not config.model_name:
            raise ConfigError(f"models.{name}: local_openai needs api_url and model_name", field=f"models.{name}")
        parts = urlsplit(config.api_url)
        path = parts.path.rstrip("/") + _PATHS[config.host_type]
        self._url = httpx.URL(urlunsplit((parts.scheme, parts.netloc, path, parts.query, "")))
        self._address = parts.netloc.rpartition("@")[2]
        http.ssl_context_for(str(self._url))  # read now: the first call must not stop the event loop for it
        self._transport: httpx.AsyncBaseTransport | None = None

    async def complete(self, call: Call) -> AsyncGenerator[Item, None]:
        """See :class:`~promptmill_workers.backends.base.Backend`."""
        secret = secret_for_call(self._name, self._config)
        async with self._answer(call, secret) as response, aclosing(http.body_chunks(response)) as chunks:
            decoder = ChatDecoder(request_id=_request_id(response), secret=secret)
            async with aclosing(http.decoded(chunks, decoder, address=self._address)) as batches:
                async for batch in batches:
                    for item in batch:
                        yield item

    async def aclose(self) -> None:
        """Close every connection."""
        transport, self._transport = self._transport, None
        if transport is not None:
            await transport.aclose()

    @asynccontextmanager
    async def _answer(self, call: Call, secret: str | None) -> AsyncGenerator[httpx.Response]:
        """The answer with status 200, its body unread; anything else is raised. Closed on the way out."""
        headers = dict(_HEADERS)
        if secret:
            headers["authorization"] = f"Bearer {secret}"
        for header, variable in self._options.headers_env.items():
            headers[header] = self._header(variable)
        if self._transport is None:
            self._transport = http.open_transport(str(self._url))
        request = httpx.Request(
            "POST",
            self._url,
            content=orjson.dumps(self._body(call.request)),
            headers=headers,
            extensions={"timeout": http.timeouts(call.timeouts.connect_s).as_dict()},
        )
        try:
            # Below httpx's client: its redirects, cookies and hooks are unwanted here and cost as much as the rest.
            response = await self._transport.handle_async_request(request)
        except http.TRANSPORT_ERRORS as err:
            raise transport_error(err, address=self._address, answered=False) from err
        try:
            if response.status_code != 200:
                raise await self._refusal(response, secret)
            yield response
        finally:
            await response.aclose()

    def _header(self, variable: str) -> str:
        try:
            return read_secret(variable, None) or ""
        except ConfigError as err:
            raise BackendError(f"no header for the model {self._name}: {err.message}", code="auth") from None

    def _body(self, request: JobRequest) -> dict[str, Any]:
        messages = [{"role": "system", "content": request.system}] if request.system else []
        body: dict[str, Any] = {
            "model": self._config.model_name,
            "messages": [*messages, *(_message(m) for m in request.messages)],
            "stream": True,
        }
        if self._options.include_usage:
            body["stream_options"] = {"include_usage": True}
        if request.max_tokens is not None:
            body[self._options.max_tokens_field] = request.max_tokens
        if request.temperature is not None:
            body["temperature"] = request.temperature
        if request.stop:
            body["stop"] = request.stop
        return body | self._options.extra_body

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
    return response.headers.get("x-request-id")


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
