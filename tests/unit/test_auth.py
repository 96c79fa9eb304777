import hmac
from urllib.parse import parse_qsl, urlsplit

import pytest

from promptmill.errors import ConfigError, NotAuthorised, StoreUnavailable
from promptmill_relay.auth import Access, FixedSecret, KeyRing, StreamUrls

JOB = "abcDEF123_-abcDEF123_-"


class Clock:
    now = 1_000.0

    def __call__(self) -> float:
        return self.now


class ChangingSecret:
    """A key that another process has replaced; only a new look-up shows it."""

    def __init__(self, old: bytes, new: bytes) -> None:
        self._known, self._new = old, new
        self.look_ups = 0

    async def current(self) -> bytes:
        return self._known

    async def refreshed(self) -> bytes:
        self.look_ups += 1
        self._known = self._new
        return self._known


def urls(clock: Clock | None = None, key: str = "secret") -> StreamUrls:
    return StreamUrls(FixedSecret(key), 60, clock or Clock())


def access(**keys: str) -> Access:
    return Access(KeyRing(keys), urls())


def query_of(url: str) -> dict[str, str]:
    return dict(parse_qsl(urlsplit(url).query))


async def test_a_signed_address_opens_its_own_job() -> None:
    url = await urls().sign(JOB)
    assert urlsplit(url).path == f"/v1/jobs/{JOB}/stream"
    assert await access(ann="key-a").reader([], query_of(url), JOB) is None


async def test_a_signed_address_opens_no_other_job() -> None:
    query = query_of(await urls().sign(JOB))
    with pytest.raises(NotAuthorised, match="wrong signature"):
        await access(ann="key-a").reader([], query, "another")


async def test_a_signed_address_expires() -> None:
    clock = Clock()
    signer = urls(clock)
    query = query_of(await signer.sign(JOB))
    clock.now += 59
    await signer.check(JOB, query["expires"], query["sig"])
    clock.now += 1
    with pytest.raises(NotAuthorised, match="expired"):
        await signer.check(JOB, query["expires"], query["sig"])


@pytest.mark.parametrize(
    "change",
    [
        {"expires": "99999999999"},
        {"expires": "x"},
        {"expires": ""},
        {"expires": "1060\n"},
        {"sig": ""},
        {"sig": "ä"},
        {"sig": "\ud800"},
        {"sig": "A" * 43},
    ],
)
async def test_a_changed_address_opens_nothing(change: dict[str, str]) -> None:
    query = {**query_of(await urls().sign(JOB)), **change}
    with pytest.raises(NotAuthorised, match="wrong signature"):
        await access(ann="key-a").reader([], query, JOB)


async def test_half_a_signature_is_a_wrong_one() -> None:
    query = query_of(await urls().sign(JOB))
    for name in ("expires", "sig"):
        with pytest.raises(NotAuthorised):
            await access(ann="key-a").reader([], {name: query[name]}, JOB)


async def test_another_servers_key_signs_nothing_here() -> None:
    query = query_of(await urls(key="other").sign(JOB))
    with pytest.raises(NotAuthorised):
        await urls().check(JOB, query["expires"], query["sig"])


async def test_a_signature_is_checked_where_no_key_is_configured_too() -> None:
    with pytest.raises(NotAuthorised):
        await access().reader([], {"sig": "x", "expires": "9"}, JOB)


async def test_a_key_replaced_in_redis_is_looked_up_before_an_address_is_refused() -> None:
    secret = ChangingSecret(b"old", b"new")
    signer = StreamUrls(secret, 60, Clock())
    query = query_of(await urls(key="new").sign(JOB))
    await signer.check(JOB, query["expires"], query["sig"])
    await signer.check(JOB, query["expires"], query["sig"])
    assert secret.look_ups == 1


@pytest.mark.parametrize(
    "headers",
    [
        [(b"authorization", b"Bearer key-b")],
        [(b"authorization", b"bearer  key-b ")],
        [(b"x-api-key", b"key-b")],
        [(b"authorization", b"Basic eDp5"), (b"x-api-key", b"key-b")],
    ],
)
def test_a_key_stands_for_its_user(headers: list[tuple[bytes, bytes]]) -> None:
    assert access(ann="key-a", bob="key-b").user(headers) == "bob"


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"Bearer key-c")],
        [(b"authorization", b"Bearer ")],
        [(b"authorization", b"key-b")],
        [(b"authorization", b"Bearer \xff\xfe")],
        [(b"authorization", b"Bearer wrong"), (b"x-api-key", b"key-b")],
    ],
)
def test_anything_else_is_refused(headers: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(NotAuthorised):
        access(ann="key-a", bob="key-b").user(headers)


def test_every_key_is_compared_whichever_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest

    def watch(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return compare(a, b)

    ring = KeyRing({"ann": "a", "bob": "a much longer key", "cy": "c"})
    monkeypatch.setattr(hmac, "compare_digest", watch)
    for key in ("a", "c", "none of them"):
        ring.user_of(key)
    assert len(compared) == 9
    assert {(len(a), len(b)) for a, b in compared} == {(32, 32)}


def test_two_users_cannot_have_the_same_key() -> None:
    with pytest.raises(ConfigError, match="same key"):
        KeyRing({"ann": "k", "bob": "k"})


def test_without_keys_everybody_is_let_in() -> None:
    assert access().is_open
    assert access().user([]) is None


class BrokenSecret:
    async def current(self) -> bytes:
        raise StoreUnavailable("away")

    async def refreshed(self) -> bytes:
        raise StoreUnavailable("away")


async def test_while_the_signing_key_is_unknown_nobody_is_called_a_forger() -> None:
    with pytest.raises(StoreUnavailable):
        await Access(KeyRing({}), StreamUrls(BrokenSecret(), 60)).reader([], {"sig": "x", "expires": "9"}, JOB)
