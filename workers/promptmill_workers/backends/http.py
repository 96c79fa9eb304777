"""Connections to providers: one pool a process, aiohttp underneath.

All backends of an event loop share one pool (one for each kind of TLS context and each proxy). It is opened at the
first call and closed with the last backend that used it; one that is closed earlier takes nothing from the others.

httpx's interface over aiohttp's transport takes two fifths of the CPU per streamed chunk that httpx's own transport
takes (docs/adr/0012).

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
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Final, Protocol, cast
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import httpx

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


@lru_cache(maxsize=1)
def _plain_context() -> ssl.SSLContext:
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def ssl_context_for(url: str) -> ssl.SSLContext:
    """A context that verifies against the known authorities; for plain HTTP one that knows none, so nothing passes."""
    if url.startswith("http://") and proxy_for(url) is None:
        return _plain_context()
    return _verifying_context()


@dataclass(slots=True)
class _Pool:
    session: aiohttp.ClientSession
    leases: int = 0


_Key = tuple[ssl.SSLContext, str | None]
_pools: Final[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[_Key, _Pool]]] = weakref.WeakKeyDictionary()


class Lease:
    """One backend's share in the pool for ``url``'s host.

    ``context`` and ``proxy`` are those that hold when the lease is made, which reads the certificates: make it before
    the first call, outside of the event loop's way.
    """

    def __init__(self, url: str) -> None:
        self.context = ssl_context_for(url)
        self.proxy = proxy_for(url)
        self._pool: _Pool | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def session(self) -> aiohttp.ClientSession:
        """The shared session of the running event loop; opened where there is none. Never close it yourself."""
        if self._pool is None:
            self._loop = asyncio.get_running_loop()
            pools = _pools.setdefault(self._loop, {})
            key = (self.context, self.proxy)
            if key not in pools:
                pools[key] = _Pool(_open_session(self.context))
            self._pool = pools[key]
            self._pool.leases += 1
        return self._pool.session

    async def aclose(self) -> None:
        """Give the share back; the last one closes every connection, those in use too.

        Call it in the loop of :meth:`session`. The lease can be used again afterwards.
        """
        pool, self._pool = self._pool, None
        if pool is None or self._loop is None:
            return
        pool.leases -= 1
        if pool.leases:
            return
        # Out of the table before the first await: who opens meanwhile gets a pool that is not being closed.
        _pools[self._loop].pop((self.context, self.proxy), None)
        await pool.session.close()


def open_pools() -> int:
    """How many pools the running event loop has open."""
    return len(_pools.get(asyncio.get_running_loop(), {}))


def _open_session(context: ssl.SSLContext) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S, ssl=context)
    return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False)


def no_cookies() -> CookieJar:
    """A jar that takes nothing."""
    return CookieJar(DefaultCookiePolicy(allowed_domains=[]))


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
