"""The signing key that gateways and relays share through Redis."""

from pathlib import Path

import pytest

from promptmill import keys
from promptmill.errors import NotAuthorised, StoreUnavailable
from promptmill.store import Store
from promptmill_relay.auth import SharedSecret, StreamUrls
from tests.support.store import running_store


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def parts(url: str) -> tuple[str, str]:
    expires, _, signature = url.partition("?expires=")[2].partition("&sig=")
    return expires, signature


async def test_every_process_finds_the_key_that_the_first_one_wrote_and_it_expires_in_redis(store: Store) -> None:
    first, second = SharedSecret(store), SharedSecret(store)
    assert await first.current() == await second.current()
    assert len(await first.current()) == 64
    assert await store.redis.ttl(keys.SIGNING_KEY) > keys.SIGNING_KEY_TTL.total_seconds() - 60


async def test_looking_it_up_again_renews_its_time_to_live(store: Store) -> None:
    clock = Clock()
    secret = SharedSecret(store, clock)
    await secret.current()
    await store.redis.expire(keys.SIGNING_KEY, 5)
    await secret.current()
    assert await store.redis.ttl(keys.SIGNING_KEY) <= 5
    clock.now += 3601
    await secret.current()
    assert await store.redis.ttl(keys.SIGNING_KEY) > 5


async def test_a_key_that_redis_lost_is_found_again_before_an_address_is_refused(store: Store) -> None:
    clock = Clock()
    late = StreamUrls(SharedSecret(store, clock), 60)
    await late.prepare()
    await store.redis.delete(keys.SIGNING_KEY)
    url = await StreamUrls(SharedSecret(store), 60).sign("job")
    # Not at once: whoever guesses signatures must not make us ask Redis each time.
    with pytest.raises(NotAuthorised):
        await late.check("job", *parts(url))
    clock.now += 6
    await late.check("job", *parts(url))


async def test_a_key_once_known_serves_while_redis_is_away_and_an_unknown_one_is_an_outage(tmp_path: Path) -> None:
    clock = Clock()
    with running_store(tmp_path) as server:
        store = await Store.connect(server.url)
        known = SharedSecret(store, clock)
        key = await known.current()
    clock.now += 4000
    assert await known.current() == key
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            await SharedSecret(store).current()
    await store.aclose()
