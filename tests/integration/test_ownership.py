"""One user's jobs are nobody else's: every route, every way to come in."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from promptmill import keys
from promptmill.contract import Done, Limits, Progress
from promptmill.errors import StoreUnavailable
from promptmill.registry import Registry
from promptmill.servers import announced
from promptmill.settings import ModelConfig, Price, Settings
from promptmill.store import Claimed, Store
from promptmill.usage import book
from tests.support.docs import ROOT, blocks, read, table
from tests.support.gateway import Front, running_gateway, running_relay
from tests.support.processes import wait_until
from tests.support.store import running_store
from tests.support.web import request
from tests.support.worker import worker_process

ECHO: dict[str, Any] = {"prompt": "hello", "model": "echo"}
SECRET_TEXT = "what nobody else may read"
WAYS = {
    "bearer": lambda key: {"Authorization": f"Bearer {key}"},
    "header": lambda key: {"X-API-Key": key},
    "both": lambda key: {"Authorization": f"Bearer {key}", "X-API-Key": "key-ann"},
    "named": lambda key: {"X-API-Key": key, "X-Forwarded-User": "ann", "X-User": "ann", "User": "ann"},
}
"""Bob's key, as he may send it; in `both` and `named` he claims to be Ann beside it."""


@dataclass
class World:
    """Two users with a key each, a gateway, a relay, and what Ann has."""

    ann: str
    bob: str
    front: Front
    relay: Front
    waiting: str
    """A job of Ann's that is queued."""
    ended: str
    """One that has succeeded; its text is secret."""
    idempotency_key: str

    @property
    def url(self) -> str:
        return f"/v1/jobs/{self.waiting}"


@pytest.fixture
async def world(redis_url: str, store: Store, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[World]:
    monkeypatch.setenv("KEY_ANN", "key-ann")
    monkeypatch.setenv("KEY_BOB", "key-bob")
    ann, bob = f"ann-{keys.new_job_id()}", f"bob-{keys.new_job_id()}"
    keyring: Any = {ann: {"key_env": "KEY_ANN"}, bob: {"key_env": "KEY_BOB"}}
    settings = Settings(redis_url=redis_url, api_keys=keyring)
    key = keys.new_job_id()
    async with running_gateway(settings) as front, running_relay(settings) as relay:

        async def submit(**fields: Any) -> str:
            answer = await front.http.post("/v1/jobs", json={**ECHO, **fields}, headers={"X-API-Key": "key-ann"})
            assert answer.status_code == 202
            return answer.json()["id"]

        ended = await submit()
        await succeed(store, ended)
        yield World(ann, bob, front, relay, await submit(idempotency_key=key, metadata={"note": key}), ended, key)


async def succeed(store: Store, job_id: str) -> None:
    """End a job as a worker would, and book what it used."""
    token, at = keys.new_token(), datetime.now(UTC).isoformat()
    assert isinstance(await store.claim(job_id, token, "w", Progress(phase="started")), Claimed)
    usage = {"input_tokens": 1234567, "output_tokens": 1, "estimated": False}
    one = {"attempt": 1, "claim": token, "model": "echo", "backend": "echo", "outcome": "succeeded", "usage": usage}
    one |= {"started_at": at, "finished_at": at}
    done = Done(text=SECRET_TEXT, attempt=1).to_json()
    assert await store.finish(job_id, token, "succeeded", done, {"text": SECRET_TEXT}, [one])
    await book(store, Registry({"echo": ModelConfig(type="echo", price=Price(input=1, output=1))}), 1e6, [job_id])


async def test_ann_herself_gets_all_of_it(world: World) -> None:
    """What the other tests look for is there to be found."""
    ann = {"X-API-Key": "key-ann"}
    http = world.front.http
    assert (await http.get(f"/v1/jobs/{world.ended}", headers=ann)).json()["text"] == SECRET_TEXT
    assert [job["id"] for job in (await http.get("/v1/jobs", headers=ann)).json()["jobs"]] == [
        world.waiting,
        world.ended,
    ]
    assert (await http.get("/v1/usage", headers=ann)).json()["total"]["input_tokens"] == 1234567
    for front in (world.front, world.relay):
        async with request(front.port, f"/v1/jobs/{world.ended}/stream", headers=ann) as stream:
            assert SECRET_TEXT in (await stream.read_events())[-1].data


@pytest.mark.parametrize("way", WAYS)
async def test_bob_finds_none_of_anns_jobs_whatever_he_asks(way: str, world: World) -> None:
    headers, http = WAYS[way]("key-bob"), world.front.http
    for job_id in (world.waiting, world.ended):
        never = keys.new_job_id()
        for method, path in (
            ("GET", "/v1/jobs/{}"),
            ("POST", "/v1/jobs/{}/cancel"),
            ("GET", "/v1/jobs/{}/stream"),
            ("GET", "/v1/jobs/{}/stream?last_event_id=1-1"),
            ("HEAD", "/v1/jobs/{}/stream"),
        ):
            found = await http.request(method, path.format(job_id), headers=headers)
            missing = await http.request(method, path.format(never), headers=headers)
            assert (found.status_code, missing.status_code) == (404, 404), (method, path)
            # Not even that there is such a job.
            assert found.text.replace(job_id, "JOB") == missing.text.replace(never, "JOB")
            assert found.headers.get("location") is None
        async with request(world.relay.port, f"/v1/jobs/{job_id}/stream", headers=headers) as stream:
            assert stream.status == 404
    assert (await http.get(world.url, headers={"X-API-Key": "key-ann"})).json()["state"] == "queued"


@pytest.mark.parametrize("way", WAYS)
async def test_bob_lists_and_counts_his_own_only(way: str, world: World) -> None:
    headers, http = WAYS[way]("key-bob"), world.front.http
    score = "9" * 15
    for query in ({}, {"user": world.bob}, {"cursor": f"{score}.{world.waiting}"}, {"state": "succeeded"}):
        page = (await http.get("/v1/jobs", params=query, headers=headers)).json()
        assert page == {"jobs": [], "next_cursor": None}, query
    for query in ({}, {"by": "user"}, {"user": world.bob}, {"by": "day,user,model"}):
        answer = await http.get("/v1/usage", params=query, headers=headers)
        assert answer.json()["total"]["input_tokens"] == 0
        assert world.ann not in answer.text
    for path in ("/v1/jobs", "/v1/usage"):
        for user in (world.ann, "", "default", "*"):
            refused = await http.get(path, params={"user": user}, headers=headers)
            assert (refused.status_code, refused.json()["code"]) == (403, "not_authorised"), (path, user)
        # Named twice: the last one counts, for the check as well as for the answer.
        both = await http.get(f"{path}?user={world.bob}&user={world.ann}", headers=headers)
        assert both.status_code == 403
        both = await http.get(f"{path}?user={world.ann}&user={world.bob}", headers=headers)
        assert both.status_code == 200
        assert world.ann not in both.text
        assert "1234567" not in both.text


async def test_bob_submits_for_nobody_else_and_anns_idempotency_key_is_not_his(world: World) -> None:
    http, bob = world.front.http, {"X-API-Key": "key-bob"}
    refused = await http.post("/v1/jobs", json={**ECHO, "user": world.ann}, headers=bob)
    assert (refused.status_code, refused.json()["field"]) == (403, "user")
    for body, headers in (
        ({**ECHO, "idempotency_key": world.idempotency_key}, bob),
        ({**ECHO, "prompt": "another"}, {**bob, "Idempotency-Key": world.idempotency_key + "2"}),
    ):
        his = await http.post("/v1/jobs", json=body, headers=headers)
        assert his.status_code == 202
        assert his.json()["id"] != world.waiting
        assert his.json()["user"] == world.bob
        assert his.json()["metadata"] == {}


async def test_a_signed_address_opens_one_job_for_reading_and_nothing_else(world: World) -> None:
    bob = {"X-API-Key": "key-bob"}
    his = (await world.front.http.post("/v1/jobs", json=ECHO, headers=bob)).json()
    query = urlsplit(his["stream_url"]).query
    expires, sig = (parse_qs(query)[name][0] for name in ("expires", "sig"))
    stream = f"{world.url}/stream"
    for front in (world.front, world.relay):
        async with request(front.port, his["stream_url"]) as own:
            assert own.status == 200
        for path in (
            f"{stream}?{query}",
            f"{stream}?expires={expires}&sig=",
            f"{stream}?expires=99999999999&sig={sig}",
            f"{stream}?sig={sig}",
            f"{stream}?expires={expires}",
            f"{stream}?{query}&sig={sig}x",
            f"/v1/jobs/{his['id']}/../{world.waiting}/stream?{query}",
            f"/v1/jobs/{his['id']}%2f..%2f{world.waiting}/stream?{query}",
            f"/v1/jobs/{world.waiting}%00/stream?{query}",
        ):
            # With his own good key beside it too: a signature that is there is what counts.
            for headers in ({}, bob):
                async with request(front.port, path, headers=headers) as refused:
                    assert refused.status in {401, 404}, path
    for method, path in (
        ("GET", f"/v1/jobs/{his['id']}?{query}"),
        ("POST", f"/v1/jobs/{his['id']}/cancel?{query}"),
        ("GET", f"/v1/jobs?{query}"),
        ("GET", f"/v1/usage?{query}"),
        ("POST", f"/v1/jobs?{query}"),
    ):
        answer = await world.front.http.request(method, path)
        assert answer.status_code == 401, (method, path)


async def test_the_first_of_two_keys_counts_and_a_wrong_one_is_not_made_good_by_another(world: World) -> None:
    http = world.front.http
    two = [("Authorization", "Bearer key-bob"), ("Authorization", "Bearer key-ann")]
    assert (await http.get(world.url, headers=two)).status_code == 404
    wrong = [("Authorization", "Bearer wrong"), ("X-API-Key", "key-ann")]
    assert (await http.get(world.url, headers=wrong)).status_code == 401


async def test_a_relay_knows_nothing_but_streams(world: World) -> None:
    ann = {"X-API-Key": "key-ann"}
    for method, path in (
        ("POST", "/v1/jobs"),
        ("GET", "/v1/jobs"),
        ("GET", world.url),
        ("POST", f"{world.url}/cancel"),
        ("GET", "/v1/usage"),
        ("POST", f"{world.url}/stream"),
    ):
        answer = await world.relay.http.request(method, path, headers=ann)
        assert answer.status_code in {404, 405}, (method, path)
    assert (await world.front.http.get(world.url, headers=ann)).json()["state"] == "queued"


def test_an_id_cannot_be_guessed() -> None:
    ids = [keys.new_job_id() for _ in range(20_000)]
    assert len(set(ids)) == len(ids)
    assert {len(job_id) for job_id in ids} == {22}
    alphabets = [len({job_id[place] for job_id in ids}) for place in range(22)]
    # Every character is drawn, the first from letters and digits, the others from all 64.
    assert alphabets == [62, *[64] * 21]
    assert sum(map(math.log2, alphabets)) > 128
    for job_id in ids[:100]:
        assert keys.check_job_id(job_id) == job_id


# -- keys -----------------------------------------------------------------------------------------------------------


async def test_no_key_and_no_signature_comes_back_or_is_logged_whatever_goes_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A good key, a wrong one, the signing key and the store's password, on every way to an error."""
    good, wrong, signing, password = (
        f"planted{name}{keys.new_job_id()}" for name in ("Good", "Wrong", "Sign", "Store")
    )
    monkeypatch.setenv("KEY_ANN", good)
    keyring: Any = {"ann": {"key_env": "KEY_ANN"}}
    with running_store(tmp_path) as server:
        plain = await Store.connect(server.url)
        await plain.redis.config_set("requirepass", password)
        url = server.url.replace("redis://", f"redis://:{password}@")
        settings = Settings(redis_url=url, api_keys=keyring, signing_key=signing, limits=Limits(request_bytes=2000))
        caplog.set_level("DEBUG")
        said: list[str] = []
        async with running_gateway(settings) as front:
            ok = {"X-API-Key": good}
            job = (await front.http.post("/v1/jobs", json=ECHO, headers=ok)).json()
            signature = parse_qs(urlsplit(job["stream_url"]).query)["sig"][0]

            async def ask(method: str, path: str, expected: int, **more: Any) -> None:
                answer = await front.http.request(method, path, **more)
                assert answer.status_code == expected, (method, path, answer.text)
                said.append(f"{answer.headers} {answer.text}")

            for headers in ({"X-API-Key": wrong}, {"Authorization": f"Bearer {wrong}"}, {"Authorization": wrong}):
                for method, path in (
                    ("GET", "/v1/jobs"),
                    ("POST", "/v1/jobs"),
                    ("GET", f"/v1/jobs/{job['id']}/stream"),
                ):
                    await ask(method, path, 401, headers=headers)
            await ask("GET", f"/v1/jobs/{job['id']}/stream?expires=1&sig={signature}", 401)
            await ask("GET", f"/v1/jobs/{job['id']}/stream?expires=1&sig={wrong}", 401, headers=ok)
            await ask("GET", "/v1/jobs?user=bob", 403, headers=ok)
            await ask("GET", "/nothing", 404, headers=ok)
            await ask("DELETE", "/v1/jobs", 405, headers=ok)
            await ask("POST", "/v1/jobs", 400, headers=ok, content=b"{")
            await ask("POST", "/v1/jobs", 400, headers=ok, json={**ECHO, "api": 1})
            await ask("POST", "/v1/jobs", 413, headers=ok, content=b" " * 2001)
            keyed = {**ok, "Idempotency-Key": keys.new_job_id()}
            await ask("POST", "/v1/jobs", 202, headers=keyed, json=ECHO)
            await ask("POST", "/v1/jobs", 409, headers=keyed, json={**ECHO, "prompt": "other"})
            said[:] = [text.replace(signature, "") if "202" in text else text for text in said]
            with monkeypatch.context() as broken:
                broken.setattr("promptmill.client.AsyncProducer.get", _fail)
                await ask("GET", f"/v1/jobs/{job['id']}", 500, headers=ok)
            server.kill()
            await ask("GET", f"/v1/jobs/{job['id']}", 503, headers=ok)
            await ask("POST", "/v1/jobs", 503, headers=ok, json=ECHO)
            await ask("GET", "/readyz", 503)
            async with request(front.port, job["stream_url"]) as stream:
                said.append((await stream.read_chunk()).decode())
        await plain.aclose()
        server.start()
        with pytest.raises(StoreUnavailable) as caught:
            await Store.connect(url.replace(password, password + "x"))
        said.append(str(caught.value))
    # This process is the client as well.
    own = [record for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
    log = "\n".join(map(logging.Formatter("%(levelname)s %(name)s %(message)s").format, own))
    assert "somebody's bug" in log, "the log was read"
    for secret in (good, wrong, signing, password, signature):
        assert [text[:300] for text in said if secret in text] == []
        assert secret not in log


async def _fail(*_: object) -> None:
    raise ZeroDivisionError("somebody's bug")


# -- Redis ----------------------------------------------------------------------------------------------------------


def documented_users() -> dict[str, list[str]]:
    """The users of the page on security, with passwords, as ``ACL SETUSER`` takes them."""
    (block,) = [b for b in blocks("docs/security.md") if b.text.startswith("user ")]
    found: dict[str, list[str]] = {}
    for line in block.text.splitlines():
        _, name, *rules = re.findall(r"\([^)]*\)|\S+", line)
        found[name] = [rule.replace(">…", f">{name}-password") for rule in rules]
    return found


async def has_key(store: Store, key: str) -> bool:
    return bool(await store.redis.exists(key))


async def test_the_documented_users_of_redis_suffice_and_may_not_change_what_workers_run(tmp_path: Path) -> None:
    users = documented_users()
    assert set(users) == {"relay", "mill"}
    with running_store(tmp_path) as server:
        root = await Store.connect(server.url)
        for name, rules in users.items():
            await root.redis.execute_command("ACL", "SETUSER", name, *rules)

        def settings(name: str) -> Settings:
            url = server.url.replace("redis://", f"redis://{name}:{name}-password@")
            return Settings(redis_url=url, signing_key="the same everywhere", disconnect_grace_s=0)

        mill, relay_settings = settings("mill"), settings("relay")
        config = tmp_path / "p.toml"
        config.write_text(f'redis_url = "{mill.redis_url}"\nheartbeat_s = 0.5\n')
        with worker_process(config) as worker:
            await worker.ready(server.url)
            async with running_gateway(mill) as front, running_relay(relay_settings) as relay:
                for body in (ECHO, {**ECHO, "priority": "batch", "idempotency_key": "k", "cancel_on_disconnect": True}):
                    job = (await front.http.post("/v1/jobs", json=body)).json()
                    for port in (relay.port, front.port):
                        async with request(port, job["stream_url"]) as stream:
                            assert [event.type for event in await stream.read_events()][-1] == "done"
                for path in ("/readyz", "/v1/usage", "/v1/jobs"):
                    assert (await front.http.get(path)).status_code == 200
                assert (await relay.http.get("/readyz")).status_code == 200
                assert (await front.http.post(f"/v1/jobs/{job['id']}/cancel")).status_code == 200
            reader = await Store.connect(relay_settings.store_url)
            async with announced(reader, "relay", 0.1, lambda: (0, 0)):
                await wait_until(lambda: has_key(root, keys.SERVERS), "the relay is on the list")
            assert not await root.redis.exists(keys.SERVERS)
            await reader.aclose()
            assert worker.stop() == 0
        refused = [entry[b"object"] for entry in await root.redis.execute_command("ACL", "LOG")]
        assert refused == []
        for name, command in (
            ("mill", ("HSET", keys.REGISTRY, "model:x", "{}")),
            ("mill", ("DEL", keys.REGISTRY)),
            ("mill", ("CONFIG", "GET", "*")),
            ("mill", ("FLUSHALL",)),
            ("mill", ("SET", "somebody-elses", "x")),
            ("relay", ("HSET", keys.record(job["id"]), "x", "y")),
            ("relay", ("DEL", keys.log(job["id"]))),
            ("relay", ("GET", keys.SIGNING_KEY)),
            ("relay", ("HSET", keys.WORKERS, "x", "{}")),
            ("relay", ("EVAL", "return 1", 1, keys.record(job["id"]))),
            ("relay", ("PUBLISH", keys.channel(job["id"]), "x")),
            ("relay", ("KEYS", "*")),
        ):
            assert await root.redis.execute_command("ACL", "DRYRUN", name, *command) != b"OK", (name, command)
        await root.aclose()


def test_the_patterns_of_the_documented_user_fit_every_key_that_there_is() -> None:
    patterns = [rule[1:] for rule in documented_users()["mill"] if rule.startswith("~")]
    listed = [row["key"] for row in table("docs/reference/redis-keys.md", "Redis keys") if row["type"] != "channel"]
    names = {"{JOB}": "{" + "x" * 22 + "}", "{SUBJECT}": "{host:h}"}
    for key in listed:
        name = key
        for short, long in names.items():
            name = name.replace(short, long)
        if not name.startswith(keys.REGISTRY):
            assert any(fnmatchcase(name, pattern) for pattern in patterns), f"docs/security.md: add {key}"


def test_every_test_that_the_page_on_security_names_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", read("docs/security.md"))
    assert len(named) > 25
    for path, test in named:
        text = (ROOT / path).read_text()
        assert not test or f"def {test}(" in text, f"{path}::{test}"
