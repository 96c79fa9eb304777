"""Connections to providers: one pool a backend, aiohttp underneath.

httpx's interface over aiohttp's transport takes a third of the CPU per streamed chunk that httpx's own takes.

What is set here and why:

- No limit on connections: the worker's concurrency is the limit, and a pool's own limit (aiohttp: 100) would make the
  101st stream wait in silence.
- No read timeout: the runner owns ``first_token_s``, ``idle_s`` and ``total_s`` and cancels.
- No cookies are kept: what a provider sets for one job must not travel with another user's.
- No redirects are followed: a request that carries a key goes to the configured address only.
- ``HTTP_PROXY``, ``HTTPS_PROXY``, ``ALL_PROXY`` and ``NO_PROXY`` are honoured, read when the pool is made, except for
  loopback addresses, where a model server on this machine is meant. ``SSL_CERT_FILE`` and ``SSL_CERT_DIR`` are
  honoured. ``~/.netrc`` is not read.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from functools import lru_cache
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Final, Protocol, cast
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import httpx
from httpx_aiohttp import AiohttpTransport

from promptmill.settings import LOOPBACK
from promptmill_workers.backends.base import Item
from promptmill_workers.backends.decoding import AnswerDecoder
from promptmill_workers.backends.failures import transport_error
from promptmill_workers.backends.sse import SseTooLongError

KEEPALIVE_S: Final = 15.0
DRAIN_S: Final = 0.25
"""How long to wait for the body's end after the protocol's own end, so that the connection can be used again."""

TransportErrors = tuple[type[Exception], ...]
TRANSPORT_ERRORS: Final[TransportErrors] = (
    httpx.HTTPError,
    httpx.InvalidURL,
    httpx.StreamError,
    aiohttp.ClientError,
    OSError,
)
"""What a request or a read can raise besides cancellation; httpx-aiohttp lets some of aiohttp's own through."""


@lru_cache(maxsize=1)
def _verifying_context() -> ssl.SSLContext:
    # Once a process: reading the certificates takes tens of milliseconds and some megabytes.
    return httpx.create_ssl_context()


def proxy_for(url: str) -> str | None:
    """The proxy that the environment names for ``url``, or None; never one for a loopback address."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if host in LOOPBACK or host.startswith("127.") or proxy_bypass(host):
        return None
    proxies = getproxies()
    return proxies.get(parts.scheme) or proxies.get("all")


def ssl_context_for(url: str) -> ssl.SSLContext:
    """A context that verifies against the known authorities; for plain HTTP one that knows none, so nothing passes."""
    if url.startswith("http://") and proxy_for(url) is None:
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    return _verifying_context()


def open_session(context: ssl.SSLContext) -> aiohttp.ClientSession:
    """The pool itself. Call it in the event loop that will use it."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S, ssl=context)
    return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False)


def no_cookies() -> CookieJar:
    """A jar that takes nothing."""
    return CookieJar(DefaultCookiePolicy(allowed_domains=[]))


def open_transport(url: str) -> httpx.AsyncBaseTransport:
    """A pool for requests to ``url``'s host. Call it in the event loop that will use it; close it there."""
    context = ssl_context_for(url)
    proxy = proxy_for(url)
    return AiohttpTransport(
        verify=context, client=lambda: open_session(context), proxy=httpx.Proxy(proxy) if proxy else None
    )


def timeouts(connect_s: float | None) -> httpx.Timeout:
    """``connect_s`` bounds name lookup, connecting and TLS together; nothing else is bounded here."""
    # aiohttp's transport takes `pool` for the whole of these and `connect` for one address's attempt.
    return httpx.Timeout(None, connect=connect_s, pool=connect_s)


class Body(Protocol):
    """A response of httpx or of httpx2."""

    @property
    def headers(self) -> Mapping[str, str]: ...

    def aiter_raw(self) -> AsyncIterator[bytes]: ...

    def aiter_bytes(self) -> AsyncIterator[bytes]: ...


def body_chunks(response: Body) -> AsyncGenerator[bytes, None]:
    """The body as it comes, decompressed where the provider compressed it although it was asked not to."""
    chunks = response.aiter_bytes() if "content-encoding" in response.headers else response.aiter_raw()
    return cast("AsyncGenerator[bytes, None]", chunks)  # both are generators, declared as iterators


async def decoded(
    chunks: AsyncGenerator[bytes, None],
    decoder: AnswerDecoder,
    *,
    address: str,
    errors: TransportErrors = TRANSPORT_ERRORS,
) -> AsyncGenerator[list[Item], None]:
    """The items of an answer, those of one read together (so that a token costs one generator less).

    Raises
    ------
    BackendError
        After the items that precede it.
    """
    try:
        async for chunk in chunks:
            yield decoder.push(chunk)
            if decoder.done:
                break
    except errors as err:
        # What follows the provider's own end is of no interest, and some servers break off there.
        if not decoder.complete:
            raise transport_error(err, address=address, answered=True, request_id=decoder.request_id) from err
    if decoder.complete:
        await drain(chunks, errors)
    yield decoder.end()
    if decoder.failure is not None:
        raise decoder.failure


async def drain(chunks: AsyncIterator[bytes], errors: TransportErrors = TRANSPORT_ERRORS) -> None:
    """Read to the body's end, for at most ``DRAIN_S``: a connection whose body was not read to its end is closed."""
    try:
        async with asyncio.timeout(DRAIN_S):
            async for _ in chunks:
                pass
    except errors:
        # The answer is complete; only the connection is lost, and the pool finds that out by itself.
        return


async def read_bounded(chunks: AsyncIterator[bytes], limit_bytes: int) -> bytes:
    """All of a body.

    Raises
    ------
    SseTooLongError
        It is longer than ``limit_bytes``.
    """
    parts: list[bytes] = []
    size = 0
    async for chunk in chunks:
        size += len(chunk)
        if size > limit_bytes:
            raise SseTooLongError(f"the answer is over {limit_bytes} bytes")
        parts.append(chunk)
    return b"".join(parts)
