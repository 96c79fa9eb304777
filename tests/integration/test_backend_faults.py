"""Every fault of the provider simulator on every HTTP backend: its exact documented code, and nothing left open."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any, Final

import pytest

from promptmill.errors import CODES
from promptmill.settings import ModelConfig
from promptmill_workers.backends import http, load_backend
from promptmill_workers.backends.base import Backend, Call, Finished, Item, TextDelta, UsageUpdate
from promptmill_workers.backends.structured import check_answer
from promptmill_workers.testing import call, collect, failure, text_of
from tests.support.processes import PATIENCE_S, wait_until
from tests.support.simulator import FAULTS, Simulator, refusing_url, unanswering_url

KEY: Final = "planted-key-0123456789"
PATHS: Final = {"local_openai": "/v1", "anthropic_api": "", "gemini_api": "/v1beta/openai"}
KINDS: Final = tuple(PATHS)
NO_ID_IN_HEADERS: Final = {"gemini_api"}

# Fault: code, and how many deltas of ten come before it.
EXPECTED: Final[dict[str, tuple[str, int]]] = {
    "400": ("bad_request", 0),
    "401": ("auth", 0),
    "403": ("auth", 0),
    "404": ("bad_request", 0),
    "408": ("overloaded", 0),
    "409": ("overloaded", 0),
    "413": ("context_too_long", 0),
    "429": ("rate_limited", 0),
    "500": ("overloaded", 0),
    "503": ("overloaded", 0),
    "504": ("overloaded", 0),
    "529": ("overloaded", 0),
    "context": ("context_too_long", 0),
    "cut": ("cut", 5),
    "reset": ("cut", 5),
    "truncated": ("cut", 5),
    "error_event": ("overloaded", 5),
    "malformed": ("malformed", 5),
    "empty": ("empty", 0),
    "refusal": ("refused", 0),
}
SILENT: Final = {"hang": 0, "hang_headers": 0, "stall": 5}
HEALTHY: Final = {"split"}
TEXT: Final = [{"type": "text", "text": "What is this?"}]


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIMULATOR_KEY", KEY)
    # One that the SDK would take by itself, and that must never travel.
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-wrong-one")
    monkeypatch.setenv("GEMINI_API_KEY", "sk-wrong-one")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", "http://127.0.0.1:9")


@pytest.fixture
async def sim() -> AsyncIterator[Simulator]:
    async with Simulator(key=KEY) as simulator:
        yield simulator


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@asynccontextmanager
async def opened(kind: str, url: str, model: str = "sim", **fields: Any) -> AsyncIterator[Backend]:
    config = ModelConfig(type=kind, model_name=model, api_url=url + PATHS[kind], api_key_env="SIMULATOR_KEY", **fields)
    backend = load_backend("model", config)
    try:
        yield backend
    finally:
        await backend.aclose()


def words(count: int) -> str:
    return "".join(f"tok{i} " for i in range(count))


def test_every_fault_of_the_simulator_is_covered() -> None:
    assert EXPECTED.keys() | SILENT.keys() | HEALTHY == FAULTS


@pytest.mark.parametrize("fault", EXPECTED)
async def test_each_fault_ends_in_its_code(sim: Simulator, kind: str, fault: str) -> None:
    code, deltas = EXPECTED[fault]
    async with opened(kind, sim.url, f"sim:tokens=10,fault={fault}") as backend:
        items, error = await failure(backend, call())
        assert (error.code, error.retryable) == (code, CODES[code].retryable), error
        assert text_of(items) == words(deltas)
        assert not any(isinstance(item, Finished) for item in items)
        if kind not in NO_ID_IN_HEADERS or sim.requests[0].status == 200:
            assert error.provider_request_id, "the provider's id helps its support"
        assert KEY not in str(error)
        assert len(sim.requests) == 1, "a backend never retries by itself"
    await sim.wait_idle(connections=True)


@pytest.mark.parametrize("fault", SILENT)
async def test_a_silent_provider_is_left_as_soon_as_the_call_is_cancelled(
    sim: Simulator, kind: str, fault: str
) -> None:
    seen: list[Item] = []

    async def read() -> None:
        async with aclosing(backend.complete(call())) as items:
            async for item in items:
                seen.append(item)  # noqa: PERF401 - what came before the silence is kept

    async with opened(kind, sim.url, f"sim:tokens=10,fault={fault}") as backend:
        reading = asyncio.create_task(read())
        await sim.wait_requests(1)
        await wait_until(lambda: text_of(seen) == words(SILENT[fault]), "all came that comes")
        done, _ = await asyncio.wait([reading], timeout=0.1)
        assert not done, "it waits for more"
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await sim.wait_idle(connections=True)


async def test_an_answer_cut_into_the_smallest_pieces_arrives_whole(sim: Simulator, kind: str) -> None:
    plan = sim.plan(fault="split")
    async with opened(kind, sim.url) as backend:
        assert text_of(await collect(backend, call())) == plan.expected_text()


@pytest.mark.parametrize("wire", [1, 3, 64])
async def test_an_answer_in_fixed_slices_arrives_whole(sim: Simulator, kind: str, wire: int) -> None:
    plan = sim.plan(wire=wire, chunks=("日本 ", "👩‍🚀\u2028", "\u0085x"))
    async with opened(kind, sim.url) as backend:
        assert text_of(await collect(backend, call())) == plan.expected_text()


async def test_a_refused_connection_is_unreachable(kind: str) -> None:
    with refusing_url() as url:
        async with opened(kind, url) as backend:
            items, error = await failure(backend, call())
    assert (items, error.code, error.retryable) == ([], "unreachable", True)
    assert url.removeprefix("http://") in str(error)


async def test_an_unknown_host_is_unreachable(kind: str) -> None:
    async with opened(kind, "http://no-such-host.invalid") as backend:
        _, error = await failure(backend, call())
    assert error.code == "unreachable"


async def test_a_connection_that_never_opens_is_a_connect_timeout(kind: str) -> None:
    asked = call()
    asked = Call(asked.job_id, 1, asked.request, asked.timeouts.model_copy(update={"connect_s": 0.2}))
    with unanswering_url() as url:
        async with opened(kind, url) as backend, asyncio.timeout(PATIENCE_S):
            _, error = await failure(backend, asked)
    assert error.code == "timeout_connect"


async def _answering(answer: bytes) -> AsyncIterator[str]:
    """A server that reads a request's head, says ``answer`` and closes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await server.wait_closed()


answering = asynccontextmanager(_answering)


def response(body: bytes, *, status: str = "200 OK", kind: str = "text/event-stream", extra: str = "") -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{extra}Connection: close\r\n\r\n"
    )
    return head.encode() + body


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (b"", "unreachable"),
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "malformed"),
        (response(b"<html>Sign in</html>", kind="text/html"), "malformed"),
        (response(b"{}", kind="application/json"), "malformed"),
        (response(b'{"error": "model is loading"}', kind="application/json"), "crashed"),
        (response(b""), "cut"),
        (response(b"data: [1]\n\n"), "malformed"),
        (response(b"data: \xff\xfe\n\n"), "malformed"),
        (response(b"data: " + b"[" * 100_000 + b"\n\n"), "malformed"),
        (response(b"data: {" + b" " * 9_000_000), "malformed"),
        (response(b"", status="302 Found", extra="Location: https://elsewhere.invalid/\r\n"), "bad_request"),
        (response(b"<html>" * 100, status="502 Bad Gateway", kind="text/html"), "unreachable"),
        (response(b"upstream down", status="521 Down", kind="text/plain"), "unreachable"),
    ],
)
async def test_a_server_that_is_no_provider_gives_a_documented_code(kind: str, answer: bytes, code: str) -> None:
    async with answering(answer) as url, opened(kind, url) as backend:
        items, error = await failure(backend, call())
    assert (text_of(items), error.code) == ("", code), error
    assert len(str(error)) < 700


async def test_the_wait_that_the_provider_asks_for_is_passed_on(sim: Simulator, kind: str) -> None:
    async with opened(kind, sim.url, "sim:fault=429,retry_after=7") as backend:
        _, error = await failure(backend, call())
    assert error.retry_after_s == 7


async def test_usage_and_reason_are_what_the_provider_said(sim: Simulator, kind: str) -> None:
    sim.plan(tokens=7, usage={"input_tokens": 100, "output_tokens": 7, "cache_read_tokens": 40})
    async with opened(kind, sim.url) as backend:
        items = await collect(backend, call(max_tokens=3))
    usage = [item.usage for item in items if isinstance(item, UsageUpdate)][-1]
    # OpenAI counts what came from the cache among the prompt's tokens, Anthropic beside them.
    assert usage.input_tokens == (100 if kind == "anthropic_api" else 60)
    assert (usage.output_tokens, usage.cache_read_tokens, usage.estimated) == (7, 40, False)
    last = items[-1]
    assert isinstance(last, Finished)
    assert (last.reason, text_of(items)) == ("length", words(3))
    assert last.provider_request_id
    assert last.provider_request_id.startswith("chatcmpl-" if kind in NO_ID_IN_HEADERS else "req_")


async def test_what_the_model_thought_counts_as_output(sim: Simulator, kind: str) -> None:
    """It is billed as output; Google alone counts it in the sum and nowhere else."""
    sim.plan(tokens=7, usage={"input_tokens": 100, "output_tokens": 7, "thinking_tokens": 500})
    async with opened(kind, sim.url) as backend:
        items = await collect(backend, call())
    usage = [item.usage for item in items if isinstance(item, UsageUpdate)][-1]
    assert (usage.input_tokens, usage.output_tokens) == (100, 507)


async def test_an_answer_without_usage_is_an_answer(sim: Simulator) -> None:
    async with opened("local_openai", sim.url, "sim:tokens=2,omit_usage=1") as backend:
        items = await collect(backend, call())
    assert text_of(items) == words(2)
    assert not any(isinstance(item, UsageUpdate) for item in items)


async def test_a_stop_sequence_ends_the_answer(sim: Simulator, kind: str) -> None:
    async with opened(kind, sim.url, "sim:tokens=10") as backend:
        items = await collect(backend, call(stop=["tok4"]))
    last = items[-1]
    assert isinstance(last, Finished)
    assert text_of(items) == words(4)
    # OpenAI's protocol does not tell one from the other.
    assert last.reason == ("stop_sequence" if kind == "anthropic_api" else "stop")


async def test_a_refusal_after_text_went_out_is_still_a_refusal(sim: Simulator, kind: str) -> None:
    async with opened(kind, sim.url, "sim:tokens=10,fault=refusal,after=3") as backend:
        items, error = await failure(backend, call())
    assert (text_of(items), error.code, error.retryable) == (words(3), "refused", False)


async def test_the_request_carries_what_the_job_asked(sim: Simulator, kind: str) -> None:
    picture = "iVBORw0KGgo="
    asked = call()
    elsewhere = [] if kind == "gemini_api" else [{"type": "image", "url": "https://example.org/a.png"}]
    request = asked.request.model_validate(
        {
            "system": "Be brief.",
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "What is this?"},
                        {"type": "image", "media_type": "image/png", "data": picture},
                        *elsewhere,
                    ],
                }
            ],
            "max_tokens": 50,
            "temperature": 0.5,
            "stop": ["END"],
        }
    )
    options = {"extra_body": {"top_p": 0.9}}
    async with opened(kind, sim.url, options=options) as backend:
        await collect(backend, Call(asked.job_id, 1, request, asked.timeouts))
    seen = sim.requests[0]
    body = seen.body
    assert (seen.headers["authorization"], seen.images) == (f"Bearer {KEY}", 1 + len(elsewhere))
    assert (body["max_tokens"], body["temperature"], body["top_p"], body["stream"]) == (50, 0.5, 0.9, True)
    content = body["messages"][-1]["content"]
    if kind != "anthropic_api":
        assert (body["messages"][0], body["stop"]) == ({"role": "system", "content": "Be brief."}, ["END"])
        assert [part["image_url"]["url"] for part in content[1:]] == [
            f"data:image/png;base64,{picture}",
            *(part["url"] for part in elsewhere),
        ]
    else:
        assert (body["system"], body["stop_sequences"]) == ("Be brief.", ["END"])
        assert [part["source"] for part in content[1:]] == [
            {"type": "base64", "media_type": "image/png", "data": picture},
            {"type": "url", "url": "https://example.org/a.png"},
        ]


@pytest.mark.parametrize("media_type", ["image/png", "image/jpeg", "image/webp", "image/gif"])
async def test_each_kind_of_picture_is_sent_or_refused_with_advice(sim: Simulator, kind: str, media_type: str) -> None:
    content = [{"type": "text", "text": "?"}, {"type": "image", "media_type": media_type, "data": "AAAA"}]
    asked = call(content)
    async with opened(kind, sim.url) as backend:
        if (kind, media_type) == ("gemini_api", "image/gif"):
            _, error = await failure(backend, asked)
            assert (error.code, error.field) == ("bad_request", "messages.0.content")
            assert "image/png, image/jpeg, image/webp" in str(error)
            assert sim.requests == []
        else:
            await collect(backend, asked)
            assert sim.requests[0].images == 1
            assert media_type in str(sim.requests[0].body)


async def test_google_is_asked_for_no_picture_that_stands_elsewhere(sim: Simulator) -> None:
    async with opened("gemini_api", sim.url) as backend:
        _, error = await failure(backend, call([{"type": "image", "url": "https://example.org/a.png"}, *TEXT]))
    assert (error.code, error.retryable, sim.requests) == ("bad_request", False, [])
    assert "send it as data" in str(error)


async def test_a_schema_travels_in_the_providers_own_form(sim: Simulator, kind: str) -> None:
    schema = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
    asked = call(response_format={"type": "json_schema", "name": "said", "json_schema": schema})
    async with opened(kind, sim.url) as backend:
        text = text_of(await collect(backend, asked))
    await check_answer(text, asked.request.response_format)
    body = sim.requests[0].body
    if kind == "anthropic_api":
        assert body["output_config"] == {"format": {"type": "json_schema", "schema": schema}}
    else:
        wanted = {"type": "json_schema", "json_schema": {"name": "said", "schema": schema}}
        assert body["response_format"] == wanted


async def test_json_of_any_form_is_asked_for_where_the_provider_knows_it(sim: Simulator, kind: str) -> None:
    asked = call(response_format={"type": "json_object"})
    async with opened(kind, sim.url) as backend:
        if kind == "anthropic_api":
            _, error = await failure(backend, asked)
            assert (error.code, error.field, sim.requests) == ("bad_request", "response_format.type", [])
            assert "json_schema" in str(error)
        else:
            await check_answer(text_of(await collect(backend, asked)), asked.request.response_format)
            assert sim.requests[0].body["response_format"] == {"type": "json_object"}


async def test_openais_strict_form_is_asked_for_by_an_option(sim: Simulator) -> None:
    asked = call(response_format={"type": "json_schema", "json_schema": {"type": "object"}})
    async with opened("local_openai", sim.url, options={"strict_schema": True}) as backend:
        await collect(backend, asked)
    assert sim.requests[0].body["response_format"]["json_schema"]["strict"] is True


async def test_a_format_leaves_what_else_stands_in_anthropics_output_config(sim: Simulator) -> None:
    asked = call(response_format={"type": "json_schema", "json_schema": {"type": "object"}})
    options = {"extra_body": {"output_config": {"effort": "low"}, "top_k": 3}}
    async with opened("anthropic_api", sim.url, options=options) as backend:
        await collect(backend, asked)
        await collect(backend, call())
    with_format, without = (record.body for record in sim.requests)
    assert with_format["output_config"] == {
        "effort": "low",
        "format": {"type": "json_schema", "schema": {"type": "object"}},
    }
    assert (without["output_config"], without["top_k"]) == ({"effort": "low"}, 3)


@pytest.mark.parametrize(("host_type", "path"), [("openai", "/v1"), ("openwebui", "")])
async def test_the_host_type_chooses_the_path(sim: Simulator, host_type: str, path: str) -> None:
    config = ModelConfig(
        type="local_openai",
        model_name="sim",
        api_url=sim.url + path,
        api_key_env="SIMULATOR_KEY",
        host_type=host_type,  # pyright: ignore[reportArgumentType]
    )
    backend = load_backend("model", config)
    try:
        await collect(backend, call())
    finally:
        await backend.aclose()
    wanted = {"openai": "/v1/chat/completions", "openwebui": "/api/chat/completions"}
    assert sim.requests[0].path == wanted[host_type]


async def test_a_key_is_read_at_each_call(sim: Simulator, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(kind, sim.url) as backend:
        monkeypatch.setenv("SIMULATOR_KEY", "an-old-key-that-is-wrong")
        _, error = await failure(backend, call())
        assert error.code == "auth"
        monkeypatch.setenv("SIMULATOR_KEY", KEY)
        assert text_of(await collect(backend, call())) == words(20)


async def test_a_missing_key_says_which_variable_to_set(
    sim: Simulator, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SIMULATOR_KEY")
    async with opened(kind, sim.url) as backend:
        _, error = await failure(backend, call())
    assert (error.code, error.retryable) == ("auth", False)
    assert "SIMULATOR_KEY" in str(error)
    assert sim.requests == []


@pytest.mark.parametrize("kind", ["anthropic_api", "gemini_api"])
async def test_a_key_for_the_provider_does_not_travel_to_another_host(sim: Simulator, kind: str) -> None:
    config = ModelConfig(type=kind, model_name="sim", api_url=sim.url + PATHS[kind])
    backend = load_backend("model", config)
    try:
        await failure(backend, call())
    finally:
        await backend.aclose()
    assert "sk-wrong-one" not in str(sim.requests[0].headers)


async def test_connections_are_used_again(sim: Simulator, kind: str) -> None:
    async with opened(kind, sim.url) as backend:
        for _ in range(5):
            await collect(backend, call())
            assert sim.open_connections == 1


@pytest.mark.parametrize(("ends_after_s", "waited_s", "connections"), [(0.05, PATIENCE_S, 1), (None, http.DRAIN_S, 2)])
async def test_a_body_that_ends_late_costs_neither_the_connection_nor_the_time(
    ends_after_s: float | None, waited_s: float, connections: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After ``[DONE]`` the body's own end may come later, or never; only then is the connection given up."""
    monkeypatch.setattr(http, "DRAIN_S", waited_s)
    accepted = 0
    event = b'data: {"choices":[{"delta":{"content":"hi"}}]}\n\ndata: [DONE]\n\n'
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal accepted
        accepted += 1
        try:
            while request := await reader.readuntil(b"\r\n\r\n"):
                length = next(line for line in request.lower().split(b"\r\n") if line.startswith(b"content-length:"))
                await reader.readexactly(int(length.split(b":")[1]))
                writer.write(head + b"%x\r\n%b\r\n" % (len(event), event))
                await writer.drain()
                if ends_after_s is None:
                    await reader.read()
                    return
                await asyncio.sleep(ends_after_s)
                writer.write(b"0\r\n\r\n")
        except asyncio.IncompleteReadError:
            return  # the client closed between two requests
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, opened("local_openai", url) as backend:
        for _ in range(2):
            async with asyncio.timeout(PATIENCE_S):
                assert text_of(await collect(backend, call())) == "hi"
    assert accepted == connections


async def test_a_proxy_in_the_environment_is_not_used_for_this_machine(
    sim: Simulator, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    async with opened(kind, sim.url) as backend:
        assert text_of(await collect(backend, call())) == words(20)


async def test_a_proxy_in_the_environment_is_used_for_other_hosts(
    sim: Simulator, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, sim.url)
    async with opened(kind, "http://model.invalid") as backend:
        # The simulator takes the absolute address in the request line for a path that it does not know.
        _, error = await failure(backend, call())
    assert error.code != "unreachable", error


async def test_two_hundred_streams_at_once_share_nothing_but_the_pool(sim: Simulator, kind: str) -> None:
    sim.default = type(sim.default)(echo=True, rate=200)
    prompts = [f"stream {i} says {i * i}" for i in range(200)]
    patient = {"connect_s": PATIENCE_S}  # all at once take their time on a busy machine
    async with opened(kind, sim.url) as backend:
        asked = [call(prompt) for prompt in prompts]
        asked = [replace(one, timeouts=one.timeouts.model_copy(update=patient)) for one in asked]
        answers = await asyncio.gather(*(collect(backend, one) for one in asked))
    assert [text_of(items) for items in answers] == prompts


async def test_each_delta_comes_when_it_was_sent_and_not_at_the_end(sim: Simulator, kind: str) -> None:
    async with (
        opened(kind, sim.url, "sim:tokens=3,fault=stall,after=1") as backend,
        asyncio.timeout(PATIENCE_S),
        aclosing(backend.complete(call())) as items,
    ):
        first = await anext(item async for item in items if isinstance(item, TextDelta))
    assert first == TextDelta("tok0 "), "the end never comes"
