"""Who may read and do what: API keys, and signed addresses for readers that cannot send headers.

A browser's ``EventSource`` sends no headers of ours, so the gateway hands out
``/v1/jobs/{id}/stream?expires=UNIX&sig=…``: whoever holds it may read that one job until then, and nothing else.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import math
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Final, Protocol

from promptmill import keys
from promptmill.errors import ConfigError, NotAuthorised, StoreUnavailable
from promptmill.settings import Settings
from promptmill.store import Store
from promptmill.store.connection import store_errors

_RENEW_AFTER_S: Final = 3600.0
# A wrong signature makes us look for a new key, but not so often that guessing costs Redis anything.
_REFRESH_AT_MOST_EVERY_S: Final = 5.0

RawHeaders = Iterable[tuple[bytes, bytes]]


class KeyRing:
    """API keys and the users that they stand for. With none, everybody may do everything (``is_open``).

    Raises
    ------
    ConfigError
        Two users have the same key, so nobody could say whose request it is.
    """

    def __init__(self, keys_by_user: Mapping[str, str]) -> None:
        self._users = [(_digest(key), user) for user, key in keys_by_user.items()]
        if len({digest for digest, _ in self._users}) != len(self._users):
            raise ConfigError("api_keys: two users have the same key", field="api_keys")

    @property
    def is_open(self) -> bool:
        return not self._users

    def user_of(self, key: str) -> str | None:
        """The user of ``key``. Every known key is compared, in constant time, so timing tells nothing about any."""
        given, found = _digest(key), None
        for digest, user in self._users:
            if hmac.compare_digest(digest, given):
                found = user
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


class Secret(Protocol):
    """Where the signing key comes from."""

    async def current(self) -> bytes:
        """The key. Raises :class:`~promptmill.errors.StoreUnavailable` while it has never been seen."""
        ...

    async def refreshed(self) -> bytes:
        """The key, looked up again where that may tell something new."""
        ...


class FixedSecret:
    """The signing key of the configuration."""

    def __init__(self, key: str) -> None:
        self._key = key.encode()

    async def current(self) -> bytes:
        return self._key

    async def refreshed(self) -> bytes:
        return self._key


class SharedSecret:
    """A random signing key in Redis, the same for every gateway and relay; whoever comes first writes it.

    Looked up at first need, so a process starts without Redis, and again every hour, which also renews its time to
    live. Once known it is used while Redis is away.
    """

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._key: bytes | None = None
        self._looked_at_s = -math.inf
        self._lock = asyncio.Lock()

    async def current(self) -> bytes:
        return await self._get(_RENEW_AFTER_S)

    async def refreshed(self) -> bytes:
        return await self._get(_REFRESH_AT_MOST_EVERY_S)

    async def _get(self, max_age_s: float) -> bytes:
        if self._key is not None and self._clock() - self._looked_at_s < max_age_s:
            return self._key
        async with self._lock:
            if self._key is not None and self._clock() - self._looked_at_s < max_age_s:
                return self._key
            # Before the look-up, so that a Redis that is away is not asked at every request.
            self._looked_at_s = self._clock()
            try:
                self._key = await self._look_up()
            except StoreUnavailable:
                if self._key is None:
                    self._looked_at_s = -math.inf
                    raise
                # The key that we know is as good as before; the next look-up comes in its turn.
            return self._key

    async def _look_up(self) -> bytes:
        with store_errors(self._store.address):
            ttl_s = int(keys.SIGNING_KEY_TTL.total_seconds())
            replies = await self._store.ask(
                [
                    ("SET", keys.SIGNING_KEY, secrets.token_hex(32), "NX", "EX", ttl_s),
                    ("GET", keys.SIGNING_KEY),
                    ("EXPIRE", keys.SIGNING_KEY, ttl_s),
                ]
            )
        return bytes(replies[1])


class StreamUrls:
    """Signs and checks the addresses of streams: HMAC-SHA256 over job id and expiry (Unix seconds)."""

    def __init__(self, secret: Secret, ttl_s: float, clock: Callable[[], float] = time.time) -> None:
        self._secret = secret
        self._ttl_s = ttl_s
        self._clock = clock

    async def prepare(self) -> None:
        """Make sure that the key is at hand. Raises :class:`~promptmill.errors.StoreUnavailable`."""
        await self._secret.current()

    async def sign(self, job_id: str) -> str:
        """The address, as a path with its query, good for ``stream_url_ttl_s`` from now."""
        expires = str(math.ceil(self._clock() + self._ttl_s))
        return f"/v1/jobs/{job_id}/stream?expires={expires}&sig={_sign(await self._secret.current(), job_id, expires)}"

    async def check(self, job_id: str, expires: str, signature: str) -> None:
        """Raises :class:`~promptmill.errors.NotAuthorised` where the signature is wrong or has expired."""
        if not self._fits(await self._secret.current(), job_id, expires, signature) and not self._fits(
            # Redis may have lost the key, and another process may have signed with the new one.
            await self._secret.refreshed(),
            job_id,
            expires,
            signature,
        ):
            raise NotAuthorised("the stream's address has a wrong signature", field="sig")
        # Only after the signature: what is not signed need not be a number.
        if int(expires) <= self._clock():
            raise NotAuthorised(
                "the stream's address has expired: ask for the job again to get a new one", field="expires"
            )

    @staticmethod
    def _fits(key: bytes, job_id: str, expires: str, signature: str) -> bool:
        return hmac.compare_digest(_sign(key, job_id, expires).encode(), signature.encode("utf-8", "surrogatepass"))


def _sign(key: bytes, job_id: str, expires: str) -> str:
    # Neither part can hold a line end in a signed address, so no two pairs give the same message.
    message = f"promptmill stream\n{job_id}\n{expires}".encode("utf-8", "surrogatepass")
    return base64.urlsafe_b64encode(hmac.digest(key, message, "sha256")).rstrip(b"=").decode()


class Access:
    """Decides for each request whose it is."""

    def __init__(self, key_ring: KeyRing, stream_urls: StreamUrls) -> None:
        self._key_ring = key_ring
        self.stream_urls = stream_urls

    @classmethod
    def of(cls, settings: Settings, store: Store) -> Access:
        """As configured. Raises :class:`~promptmill.errors.ConfigError` where a key cannot be read."""
        secret = FixedSecret(settings.signing_key) if settings.signing_key else SharedSecret(store)
        return cls(KeyRing(settings.keys_by_user()), StreamUrls(secret, settings.stream_url_ttl_s))

    @property
    def is_open(self) -> bool:
        """True where no API key is configured: everybody who reaches us may do everything."""
        return self._key_ring.is_open

    def user(self, headers: RawHeaders) -> str | None:
        """The user of the API key in ``Authorization: Bearer KEY`` or ``X-API-Key``; None where no key is configured.

        Raises :class:`~promptmill.errors.NotAuthorised`.
        """
        if self.is_open:
            return None
        key = _key_in(headers)
        if key is None:
            raise NotAuthorised("an API key is needed: send Authorization: Bearer KEY, or X-API-Key: KEY")
        user = self._key_ring.user_of(key)
        if user is None:
            raise NotAuthorised("this API key is not known")
        return user

    async def reader(self, headers: RawHeaders, query: Mapping[str, str], job_id: str) -> str | None:
        """The user as whom a stream is read; None where any job may be read (no keys), or this one (signed address).

        A signature that is there is checked, whatever else the request carries.
        Raises :class:`~promptmill.errors.NotAuthorised`, and :class:`~promptmill.errors.StoreUnavailable` while the
        signing key is not known.
        """
        if "sig" in query or "expires" in query:
            await self.stream_urls.check(job_id, query.get("expires", ""), query.get("sig", ""))
            return None
        return self.user(headers)


def _key_in(headers: RawHeaders) -> str | None:
    fallback = None
    for name, value in headers:
        if name == b"authorization":
            scheme, _, key = value.decode("utf-8", "replace").strip().partition(" ")
            if scheme.lower() == "bearer":
                return key.strip()
        elif name == b"x-api-key":
            fallback = value.decode("utf-8", "replace").strip()
    return fallback
