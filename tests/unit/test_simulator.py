"""The provider simulator, driven by independent clients: the `anthropic` SDK, httpx, and a bare socket."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import httpx2
import pytest

from tests.support.processes import PATIENCE_S
from tests.support.simulator import (
    NASTY_PIECES,
    Plan,
    PlanError,
    RequestRecord,
    Simulator,
    refusing_url,
    running_simulator,
    spawned_simulator,
    unanswering_url,
    well_formed,
)
from tests.support.simulator.connection import BadRequestError, parse_chunks
from tests.support.simulator.script import limited, plan_from_mapping, plan_from_model
from tests.support.simulator.server import Delayed
from tests.support.simulator.stream import sliced
from tests.support.simulator.ticker import Ticker

USER = [{"role": "user", "content": "Hello there"}]
TIFF = {"type": "image", "source": {"type": "base64", "media_type": "image/tiff", "data": "AA"}}
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
async def sim() -> AsyncIterator[Simulator]:
    async with Simulator() as simulator:
        yield simulator


@pytest.fixture
async def http(sim: Simulator) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=sim.url, timeout=PATIENCE_S, verify=False) as client:
        yield client


@pytest.fixture
async def claude(sim: Simulator) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=sim.url, api_key="any", max_retries=0, timeout=PATIENCE_S) as client:
        yield client


def events_of(body: bytes) -> list[tuple[str | None, bytes]]:
    """The SSE events of a body, after the HTML standard (CRLF or LF framing, comments dropped)."""
    events: list[tuple[str | None, bytes]] = []
    name, data = None, []
    for line in body.replace(b"\r\n", b"\n").split(b"\n"):
        if line.startswith(b"event: "):
            name = line[7:].decode()
        elif line.startswith(b"data: "):
            data.append(line[6:])
        elif not line and data:
            events.append((name, b"\n".join(data)))
            name, data = None, []
    return events


def chat(model: str = "sim", **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": USER, "stream": True, **more}


async def stream_chat(http: httpx.AsyncClient, model: str = "sim", **more: Any) -> list[Any]:
    """The decoded `data:` of a chat stream, `[DONE]` as it stands."""
    answer = await http.post("/v1/chat/completions", json=chat(model, **more))
    assert answer.status_code == 200
    return [data if data == b"[DONE]" else json.loads(data) for _, data in events_of(answer.content)]


async def reads_of(http: httpx.AsyncClient, model: str, reads: list[bytes], **options: Any) -> None:
    """Append what each read of a chat stream brings, so that it is there also when the stream breaks."""
    async with http.stream("POST", "/v1/chat/completions", json=chat(model), **options) as answer:
        async for data in answer.aiter_raw():
            reads.append(data)  # noqa: PERF401 - a comprehension would drop what came before a break


def text_of(chunks: list[Any]) -> str:
    return "".join(
        chunk["choices"][0]["delta"].get("content", "")
        for chunk in chunks
        if isinstance(chunk, dict) and chunk.get("choices")
    )


async def only(sim: Simulator) -> RequestRecord:
    await sim.wait_idle()
    (record,) = sim.requests
    return record


# OpenAI


async def test_chat_stream_has_role_then_content_then_finish_then_done(http: httpx.AsyncClient) -> None:
    *chunks, done = await stream_chat(http, "sim:tokens=3")
    assert done == b"[DONE]"
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert text_of(chunks) == "tok0 tok1 tok2 "
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 4 + ["stop"]
    assert {(chunk["id"], chunk["object"], chunk["model"]) for chunk in chunks} == {
        (chunks[0]["id"], "chat.completion.chunk", "sim:tokens=3")
    }
    assert all("usage" not in chunk for chunk in chunks)


async def test_chat_usage_comes_in_a_chunk_without_choices_and_only_when_asked_for(http: httpx.AsyncClient) -> None:
    model = "sim:tokens=3,input=70,cache_read=64"
    *chunks, usage, done = await stream_chat(http, model, stream_options={"include_usage": True})
    assert done == b"[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert usage["choices"] == []
    assert usage["usage"]["prompt_tokens"] == 70
    assert usage["usage"]["completion_tokens"] == 3
    assert usage["usage"]["total_tokens"] == 73
    assert usage["usage"]["prompt_tokens_details"]["cached_tokens"] == 64


async def test_chat_usage_can_be_withheld_as_some_servers_do(http: httpx.AsyncClient) -> None:
    chunks = await stream_chat(http, "sim:tokens=1,omit_usage=1", stream_options={"include_usage": True})
    assert not any(isinstance(chunk, dict) and chunk["usage"] for chunk in chunks)


async def test_chat_without_stream_answers_in_one_body(http: httpx.AsyncClient) -> None:
    answer = await http.post("/api/chat/completions", json=chat("sim:tokens=3", stream=False))
    body = answer.json()
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "tok0 tok1 tok2 ", "refusal": None}
    assert body["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
async def test_chat_honours_the_token_limit(http: httpx.AsyncClient, field: str) -> None:
    chunks = await stream_chat(http, "sim:tokens=9", **{field: 2})
    assert text_of(chunks) == "tok0 tok1 "
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"


async def test_chat_honours_stop_and_leaves_the_stop_sequence_out(http: httpx.AsyncClient) -> None:
    chunks = await stream_chat(http, "sim:tokens=9", stop=["k2", "k7"])
    assert text_of(chunks) == "tok0 tok1 to"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"


async def test_chat_records_the_request_and_its_images(sim: Simulator, http: httpx.AsyncClient) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [image]}]
    await http.post("/v1/chat/completions", json=chat("sim", messages=messages), headers={"Authorization": "Bearer x"})
    record = await only(sim)
    assert (record.protocol, record.path, record.images) == ("openai", "/v1/chat/completions", 1)
    assert record.body["messages"] == messages
    assert record.headers["authorization"] == "Bearer x"
    assert record.as_json(redact=True)["headers"]["authorization"] == "***"
    assert (record.outcome, record.tokens_written, record.open) == ("finished", 20, False)


async def test_chat_answers_json_when_the_response_format_asks_for_it(http: httpx.AsyncClient) -> None:
    chunks = await stream_chat(http, "sim:tokens=4", response_format={"type": "json_object"})
    assert json.loads(text_of(chunks)) == {"text": "tok0 tok1 tok2 tok3 "}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": ""}]}, "messages[0].role"),
        ({"stream": "yes"}, "stream"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.name"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        ({"model": "sim:speed=3"}, "model"),
    ],
)
async def test_chat_refuses_what_the_protocol_forbids(http: httpx.AsyncClient, change: Any, param: str) -> None:
    answer = await http.post("/v1/chat/completions", json=chat() | change)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


async def test_a_body_that_is_no_json_is_a_bad_request(http: httpx.AsyncClient) -> None:
    answer = await http.post("/v1/chat/completions", content=b"{")
    assert answer.status_code == 400


async def test_models_are_listed_on_both_paths(http: httpx.AsyncClient) -> None:
    for path in ("/v1/models", "/api/models"):
        body = (await http.get(path)).json()
        assert (body["object"], body["data"][0]["id"]) == ("list", "sim")


async def test_a_simulator_with_a_key_refuses_requests_without_it() -> None:
    async with Simulator(key="secret") as sim, httpx.AsyncClient(base_url=sim.url, timeout=PATIENCE_S) as http:
        headers = {"anthropic-version": "2023-06-01"}
        assert (await http.post("/v1/chat/completions", json=chat())).json()["error"]["code"] == "invalid_api_key"
        assert (await http.get("/v1/models")).status_code == 401
        refused = await http.post("/v1/messages", json=chat(max_tokens=9), headers=headers)
        assert refused.json()["error"]["type"] == "authentication_error"
        gemini = await http.post("/v1beta/models/sim:generateContent", json={})
        assert gemini.json()["error"]["details"][0]["reason"] == "API_KEY_INVALID"
        bearer = {"Authorization": "Bearer secret", **headers}
        for path in ("/v1/chat/completions", "/v1/messages"):
            assert (await http.post(path, json=chat(max_tokens=9), headers=bearer)).status_code == 200
        by_key = await http.post("/v1/messages", json=chat(max_tokens=9), headers={"x-api-key": "secret", **headers})
        assert by_key.status_code == 200


# Faults, seen through httpx


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 429, 500, 503, 529])
async def test_a_status_fault_answers_with_the_status_in_openais_shape(
    sim: Simulator, http: httpx.AsyncClient, status: int
) -> None:
    answer = await http.post("/v1/chat/completions", json=chat(f"sim:fault={status},retry_after=1.5"))
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.headers["retry-after"] == "1.5"
    record = await only(sim)
    assert (record.outcome, record.status, record.tokens_written) == ("faulted", status, 0)


async def test_a_fault_with_times_ends_after_so_many_requests_of_one_key(http: httpx.AsyncClient) -> None:
    body = chat("sim:fault=503,times=2,key=a")
    seen = [(await http.post("/v1/chat/completions", json=body)).status_code for _ in range(4)]
    assert seen == [503, 503, 200, 200]
    other = await http.post("/v1/chat/completions", json=chat("sim:fault=503,times=2,key=b"))
    assert other.status_code == 503


async def test_context_is_openais_code_for_a_prompt_that_is_too_long(http: httpx.AsyncClient) -> None:
    answer = await http.post("/v1/chat/completions", json=chat("sim:fault=context"))
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("fault", ["hang", "hang_headers", "stall"])
async def test_a_silent_fault_stays_silent_until_the_client_leaves(
    sim: Simulator, http: httpx.AsyncClient, fault: str
) -> None:
    reads: list[bytes] = []
    with pytest.raises(httpx.ReadTimeout):
        await reads_of(http, f"sim:fault={fault},after=3", reads, timeout=httpx.Timeout(PATIENCE_S, read=1))
    record = await only(sim)
    assert (record.outcome, record.fault) == ("client_disconnected", fault)
    assert record.status == (None if fault == "hang" else 200)
    tokens = {"hang": 0, "hang_headers": 0, "stall": 3}[fault]
    assert (record.tokens_written, b"".join(reads).count(b"tok")) == (tokens, tokens)


@pytest.mark.parametrize(("fault", "error"), [("cut", httpx.RemoteProtocolError), ("reset", httpx.ReadError)])
async def test_a_cut_breaks_the_body_after_so_many_tokens(
    sim: Simulator, http: httpx.AsyncClient, fault: str, error: type[Exception]
) -> None:
    reads: list[bytes] = []
    with pytest.raises(error):
        await reads_of(http, f"sim:fault={fault},after=4", reads)
    assert b"".join(reads).count(b"tok") == 4
    assert (await only(sim)).outcome == "faulted"
    await sim.wait_idle(connections=True)
    assert sim.open_connections == 0


async def test_truncated_ends_the_body_cleanly_without_finish_or_done(http: httpx.AsyncClient) -> None:
    chunks = await stream_chat(http, "sim:tokens=6,fault=truncated")
    assert text_of(chunks) == "tok0 tok1 tok2 "
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)


@pytest.mark.parametrize("done", [0, 1])
async def test_an_error_event_comes_in_place_of_the_rest(http: httpx.AsyncClient, done: int) -> None:
    chunks = await stream_chat(http, f"sim:fault=error_event,after=2,message=Sorry%2C no,done={done}")
    assert text_of(chunks) == "tok0 tok1 "
    assert chunks[4 - 1]["error"]["message"] == "Sorry, no"
    assert chunks[4:] == [b"[DONE]"] * done


async def test_malformed_breaks_one_data_line_and_goes_on(http: httpx.AsyncClient) -> None:
    answer = await http.post("/v1/chat/completions", json=chat("sim:tokens=4,fault=malformed,after=2"))
    data = [item for _, item in events_of(answer.content)]
    with pytest.raises(json.JSONDecodeError):
        json.loads(data.pop(3))
    assert text_of([json.loads(item) for item in data[:-1]]) == "tok0 tok1 tok2 tok3 "
    assert data[-1] == b"[DONE]"


async def test_empty_and_refusal_finish_properly(http: httpx.AsyncClient) -> None:
    empty = await stream_chat(http, "sim:fault=empty")
    assert (text_of(empty), empty[-2]["choices"][0]["finish_reason"], empty[-1]) == ("", "stop", b"[DONE]")
    refusal = await stream_chat(http, "sim:fault=refusal,after=1")
    assert text_of(refusal) == "tok0 "
    assert refusal[-2]["choices"][0]["finish_reason"] == "content_filter"


async def test_split_cuts_inside_characters_and_line_ends_and_still_adds_up(
    sim: Simulator, http: httpx.AsyncClient
) -> None:
    reads: list[bytes] = []
    await reads_of(http, "sim:fault=split", reads)
    body = b"".join(reads)
    assert any(read[0] & 0xC0 == 0x80 for read in reads), "no read begins inside a character"
    assert any(read[:1] == b"\n" for read in reads), "no read begins between CR and LF"
    assert body.count(b"\n") == body.count(b"\r\n")
    for raw in ("\u2028", "\u0085", "\u2029"):
        assert raw.encode() in body
    assert b"\\ud83d" in body
    chunks = [json.loads(data) for _, data in events_of(body)[:-1]]
    assert well_formed(text_of(chunks)) == Plan(fault="split").expected_text()
    assert "pair 😀 lone \ufffd end" in Plan(fault="split").expected_text()
    assert len("".join(body.decode().splitlines()).encode()) < len(body.replace(b"\r\n", b"")), "splitlines is fooled"
    assert (await only(sim)).outcome == "finished"


async def test_wire_cuts_the_body_every_so_many_bytes(http: httpx.AsyncClient) -> None:
    reads: list[bytes] = []
    await reads_of(http, "sim:tokens=1,wire=50", reads)
    assert max(map(len, reads)) <= 50
    assert events_of(b"".join(reads))[-1] == (None, b"[DONE]")


@pytest.mark.parametrize(
    ("fault", "error"),
    [("cut", httpx.RemoteProtocolError), ("reset", httpx.ReadError), ("malformed", None), ("truncated", None)],
)
async def test_an_unstreamed_answer_can_break_too(
    http: httpx.AsyncClient, fault: str, error: type[Exception] | None
) -> None:
    body = chat(f"sim:fault={fault}", stream=False)
    if error is not None:
        with pytest.raises(error):
            await http.post("/v1/chat/completions", json=body)
        return
    answer = await http.post("/v1/chat/completions", json=body)
    with pytest.raises(json.JSONDecodeError):
        answer.json()


# Plans, pace, connections


async def test_queued_plans_go_first_each_to_one_request_of_its_model(sim: Simulator, http: httpx.AsyncClient) -> None:
    sim.plan(text="for b", model="b")
    sim.plan(chunks=["x", "y"])
    assert text_of(await stream_chat(http, "a")) == "xy"
    assert text_of(await stream_chat(http, "b")) == "for b"
    assert text_of(await stream_chat(http, "b:tokens=1")) == "tok0 "


async def test_a_queued_plan_with_times_stays_until_it_succeeded_once(sim: Simulator, http: httpx.AsyncClient) -> None:
    sim.plan(fault="500", times=1, text="better")
    statuses = [(await http.post("/v1/chat/completions", json=chat())).status_code for _ in range(2)]
    assert statuses == [500, 200]
    assert sim.stats()["queued_plans"] == 0
    assert text_of(await stream_chat(http, "sim:tokens=1")) == "tok0 "


async def test_echo_answers_with_the_last_user_message(http: httpx.AsyncClient) -> None:
    messages = [{"role": "user", "content": "日本語 and 👩‍🚀\n  two"}]
    assert text_of(await stream_chat(http, "sim:echo=1,chars=1", messages=messages)) == messages[0]["content"]


async def test_first_and_rate_set_the_pace(http: httpx.AsyncClient) -> None:
    times: list[float] = []
    start = time.monotonic()
    async with http.stream("POST", "/v1/chat/completions", json=chat("sim:tokens=5,first=0.1,rate=50")) as answer:
        async for data in answer.aiter_raw():
            times += [time.monotonic() - start] * data.count(b'"tok')
    assert len(times) == 5
    for index, seen in enumerate(times):
        assert seen >= 0.1 + index / 50


async def test_stamped_tokens_carry_the_time_of_their_writing(http: httpx.AsyncClient) -> None:
    before = time.monotonic_ns()
    stamps = [int(stamp) for stamp in text_of(await stream_chat(http, "sim:tokens=50,stamp=1")).split()]
    assert len(stamps) == 50
    assert before <= stamps[0] <= stamps[-1] <= time.monotonic_ns()


async def test_a_client_that_leaves_stops_its_stream_at_once(sim: Simulator, http: httpx.AsyncClient) -> None:
    async with http.stream("POST", "/v1/chat/completions", json=chat("sim:tokens=1000,rate=200")) as answer:
        await anext(answer.aiter_raw())
        assert sim.stats()["open_requests"] == 1
    record = await only(sim)
    assert record.outcome == "client_disconnected"
    assert record.tokens_written < 1000
    await sim.wait_idle(connections=True)
    stats = sim.stats()
    assert stats["open_connections"] == 0
    assert stats["by_outcome"]["client_disconnected"]["billed_output_tokens"] == record.tokens_written
    assert stats["by_model"]["sim:tokens=1000,rate=200"]["requests"] == 1


async def test_a_reader_that_does_not_read_stops_the_writing_and_loses_nothing(sim: Simulator) -> None:
    count = 100_000
    body = json.dumps(chat(f"sim:tokens={count}")).encode()
    host, port = sim.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=2**16)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
    writer.write(head % len(body) + body)
    await sim.wait_requests(1)
    for _ in range(200):
        await asyncio.sleep(0.001)  # the ticks during which an unbounded writer would write everything
    assert sim.requests[0].open
    assert sim.requests[0].tokens_written < count
    received = await reader.read(-1)
    writer.close()
    await writer.wait_closed()
    assert received.count(b'"tok') == count
    assert (await only(sim)).outcome == "finished"


async def test_a_hundred_streams_at_once_get_all_their_tokens(sim: Simulator, http: httpx.AsyncClient) -> None:
    answers = await asyncio.gather(*(stream_chat(http, f"sim:tokens=20,rate=200,key={i}") for i in range(100)))
    assert {text_of(chunks) for chunks in answers} == {Plan().expected_text()}
    assert sim.stats()["tokens_written"] == 2000


async def test_requests_sent_without_waiting_are_answered_in_order(sim: Simulator) -> None:
    host, port = sim.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    for text in ("one", "two"):
        body = json.dumps(chat(f"sim:text={text}", stream=False)).encode()
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    writer.write(b"nonsense\r\n\r\n")
    received = await reader.read(-1)
    writer.close()
    await writer.wait_closed()
    assert received.index(b'"one"') < received.index(b'"two"') < received.index(b"400 Bad Request")


async def test_a_request_body_in_chunks_is_read(http: httpx.AsyncClient) -> None:
    async def parts() -> AsyncIterator[bytes]:
        for byte in json.dumps(chat("sim:tokens=1")).encode():
            yield bytes([byte])

    answer = await http.post("/v1/chat/completions", content=parts())
    assert events_of(answer.content)[-1] == (None, b"[DONE]")


async def test_the_control_endpoints_queue_show_and_reset(sim: Simulator, http: httpx.AsyncClient) -> None:
    queued = await http.post("/_sim/plans", json=[{"text": "a"}, {"fault": "429", "retry_after": 1}])
    assert queued.json() == {"queued": 2}
    await http.post("/_sim/default", json={"text": "default"})
    assert text_of(await stream_chat(http)) == "a"
    assert (await http.post("/v1/chat/completions", json=chat())).status_code == 429
    assert text_of(await stream_chat(http)) == "default"
    shown = (await http.get("/_sim/requests?redact=1")).json()
    assert [(item["outcome"], item["open"]) for item in shown] == [
        ("finished", False),
        ("faulted", False),
        ("finished", False),
    ]
    assert (await http.post("/_sim/plans", json={"txt": "a"})).status_code == 400
    await http.post("/_sim/reset")
    stats = (await http.get("/_sim/stats")).json()
    assert (stats["requests"], stats["tokens_written"], stats["open_connections"]) == (0, 0, 0)
    assert text_of(await stream_chat(http)) == Plan().expected_text()


async def test_unknown_paths_are_404_and_the_root_answers_probes(http: httpx.AsyncClient) -> None:
    assert (await http.get("/v1/nothing")).status_code == 404
    assert (await http.head("/")).status_code == 200


# Anthropic, through its SDK


async def test_the_sdk_streams_text_and_usage_with_cache_tokens(
    sim: Simulator, claude: anthropic.AsyncAnthropic
) -> None:
    model = "sim:tokens=5,input=11,cache_read=7,cache_write=3"
    async with claude.messages.stream(model=model, max_tokens=50, messages=USER) as stream:
        pieces = [piece async for piece in stream.text_stream]
        message = await stream.get_final_message()
    assert pieces == [f"tok{i} " for i in range(5)]
    assert (message.stop_reason, message.content[0].text) == ("end_turn", "".join(pieces))
    usage = message.usage
    assert (usage.input_tokens, usage.output_tokens) == (11, 5)
    assert (usage.cache_read_input_tokens, usage.cache_creation_input_tokens) == (7, 3)
    assert stream.response.headers["request-id"].startswith("req_")
    assert (await only(sim)).outcome == "finished"


async def test_a_messages_stream_has_the_documented_events_in_order(http: httpx.AsyncClient) -> None:
    headers = {"anthropic-version": "2023-06-01"}
    answer = await http.post("/v1/messages", json=chat("sim:tokens=2", max_tokens=9), headers=headers)
    events = events_of(answer.content)
    assert [name for name, _ in events] == [
        "message_start",
        "content_block_start",
        "ping",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert all(json.loads(data)["type"] == name for name, data in events)


async def test_the_sdk_reads_an_unstreamed_message(claude: anthropic.AsyncAnthropic) -> None:
    message = await claude.messages.create(model="sim:tokens=3", max_tokens=2, messages=USER)
    assert (message.content[0].text, message.stop_reason, message.usage.output_tokens) == (
        "tok0 tok1 ",
        "max_tokens",
        2,
    )
    message = await claude.messages.create(model="sim", max_tokens=9, messages=USER, stop_sequences=["k1"])
    assert (message.content[0].text, message.stop_reason, message.stop_sequence) == ("tok0 to", "stop_sequence", "k1")


async def test_the_sdk_counts_tokens(claude: anthropic.AsyncAnthropic) -> None:
    counted = await claude.messages.count_tokens(model="sim", messages=[{"role": "user", "content": "x" * 40}])
    assert counted.input_tokens == 10


@pytest.mark.parametrize(
    ("fault", "error", "kind"),
    [
        ("400", anthropic.BadRequestError, "invalid_request_error"),
        ("401", anthropic.AuthenticationError, "authentication_error"),
        ("403", anthropic.PermissionDeniedError, "permission_error"),
        ("404", anthropic.NotFoundError, "not_found_error"),
        ("413", anthropic.APIStatusError, "request_too_large"),
        ("429", anthropic.RateLimitError, "rate_limit_error"),
        ("500", anthropic.InternalServerError, "api_error"),
        ("529", anthropic.APIStatusError, "overloaded_error"),
        ("context", anthropic.BadRequestError, "invalid_request_error"),
    ],
)
async def test_the_sdk_raises_its_error_for_a_status_fault(
    claude: anthropic.AsyncAnthropic, fault: str, error: type[anthropic.APIStatusError], kind: str
) -> None:
    with pytest.raises(error) as caught:
        async with claude.messages.stream(model=f"sim:fault={fault}", max_tokens=9, messages=USER):
            pass
    body = caught.value.body
    assert isinstance(body, dict)
    assert (body["type"], body["error"]["type"]) == ("error", kind)
    assert caught.value.request_id == body["request_id"]
    assert ("prompt is too long" in body["error"]["message"]) == (fault == "context")


async def test_the_sdk_retries_through_a_fault_that_passes(sim: Simulator) -> None:
    async with anthropic.AsyncAnthropic(base_url=sim.url, api_key="k", max_retries=2) as claude:
        model = "sim:tokens=1,fault=529,times=2,retry_after=0.01"
        message = await claude.messages.create(model=model, max_tokens=9, messages=USER)
    assert message.content[0].text == "tok0 "
    assert [record.status for record in sim.requests] == [529, 529, 200]


async def read_messages(claude: anthropic.AsyncAnthropic, model: str) -> tuple[list[str], str | None]:
    """The text deltas and the stop reason of a raw stream."""
    pieces: list[str] = []
    stop_reason = None
    stream = await claude.messages.create(model=model, max_tokens=50, messages=USER, stream=True)
    async with stream:
        async for event in stream:
            if event.type == "content_block_delta" and event.delta.type == "text_delta":
                pieces.append(event.delta.text)
            elif event.type == "message_delta":
                stop_reason = event.delta.stop_reason
    return pieces, stop_reason


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("cut", httpx2.RemoteProtocolError),
        ("reset", httpx2.ReadError),
        ("error_event", anthropic.APIStatusError),
        ("malformed", json.JSONDecodeError),
        ("stall", httpx2.ReadTimeout),
        ("hang_headers", httpx2.ReadTimeout),
        ("hang", anthropic.APITimeoutError),
    ],
)
async def test_the_sdk_fails_on_a_stream_that_breaks(sim: Simulator, fault: str, error: type[Exception]) -> None:
    # Only waiting for what never comes is short: a busy machine may take longer for what does.
    silent = fault in {"stall", "hang_headers", "hang"}
    timeout = httpx2.Timeout(PATIENCE_S, read=0.5 if silent else PATIENCE_S)
    async with anthropic.AsyncAnthropic(base_url=sim.url, api_key="k", max_retries=0, timeout=timeout) as claude:
        with pytest.raises(error) as caught:
            await read_messages(claude, f"sim:fault={fault},after=2")
    if isinstance(caught.value, anthropic.APIStatusError):
        assert caught.value.status_code == 200
        assert isinstance(caught.value.body, dict)
        assert caught.value.body["error"]["type"] == "overloaded_error"
    await sim.wait_idle(connections=True)
    assert sim.open_connections == 0


async def test_the_sdk_sees_truncated_empty_and_refused_streams_end_without_an_error(
    claude: anthropic.AsyncAnthropic,
) -> None:
    assert await read_messages(claude, "sim:fault=truncated,after=2") == (["tok0 ", "tok1 "], None)
    assert await read_messages(claude, "sim:fault=empty") == ([], "end_turn")
    assert await read_messages(claude, "sim:fault=refusal") == ([], "refusal")


async def test_the_sdk_survives_split(claude: anthropic.AsyncAnthropic) -> None:
    pieces, stop_reason = await read_messages(claude, "sim:fault=split")
    assert (tuple(pieces), stop_reason) == (NASTY_PIECES, "end_turn")


@pytest.mark.parametrize(
    "body",
    [
        {"model": "sim", "messages": USER},
        {"model": "sim", "max_tokens": 0, "messages": USER},
        {"model": "sim", "max_tokens": 9, "messages": [{"role": "system", "content": "x"}]},
        {"model": "sim", "max_tokens": 9, "messages": [{"role": "user", "content": [{"type": "image"}]}]},
        {"model": "sim", "max_tokens": 9, "messages": [{"role": "user", "content": [TIFF]}]},
        {"model": "sim", "max_tokens": 9, "messages": USER, "output_config": {"format": {"type": "json_object"}}},
        {"model": "sim", "max_tokens": 9, "messages": USER, "output_config": {"format": {"type": "json_schema"}}},
    ],
)
async def test_messages_refuses_what_the_protocol_forbids(http: httpx.AsyncClient, body: Any) -> None:
    answer = await http.post("/v1/messages", json=body, headers={"anthropic-version": "2023-06-01"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert answer.headers["request-id"] == answer.json()["request_id"]


# Gemini


async def gemini_stream(http: httpx.AsyncClient, model: str) -> list[dict[str, Any]]:
    body = {"contents": [{"role": "user", "parts": [{"text": "Hi"}]}], "generationConfig": {"maxOutputTokens": 3}}
    answer = await http.post(f"/v1beta/models/{model}:streamGenerateContent?alt=sse", json=body)
    assert answer.status_code == 200
    return [json.loads(data) for _, data in events_of(answer.content)]


async def test_gemini_streams_candidates_and_ends_with_reason_and_usage(http: httpx.AsyncClient) -> None:
    *parts, last = await gemini_stream(http, "sim:tokens=9")
    assert [part["candidates"][0]["content"]["parts"][0]["text"] for part in parts] == ["tok0 ", "tok1 ", "tok2 "]
    assert last["candidates"][0]["finishReason"] == "MAX_TOKENS"
    assert last["usageMetadata"]["candidatesTokenCount"] == 3
    refused = await gemini_stream(http, "sim:fault=refusal")
    assert refused[-1]["candidates"][0]["finishReason"] == "SAFETY"
    failed = await gemini_stream(http, "sim:fault=error_event,after=1")
    assert failed[-1]["error"]["status"] == "UNAVAILABLE"


async def test_gemini_answers_in_one_body_and_with_its_errors(http: httpx.AsyncClient) -> None:
    body = {"contents": [{"parts": [{"text": "Hi"}, {"inlineData": {"mimeType": "image/png", "data": "AA"}}]}]}
    answer = (await http.post("/v1beta/models/sim:tokens=2:generateContent", json=body)).json()
    assert answer["candidates"][0]["content"] == {"parts": [{"text": "tok0 tok1 "}], "role": "model"}
    listed = (await http.post("/v1beta/models/sim:tokens=2:streamGenerateContent", json=body)).json()
    assert [item["candidates"][0]["finishReason"] for item in listed] == ["STOP"]
    limited_answer = await http.post("/v1beta/models/sim:fault=429:generateContent", json=body)
    assert limited_answer.json()["error"]["status"] == "RESOURCE_EXHAUSTED"
    assert limited_answer.json()["error"]["code"] == 429
    assert (await http.post("/v1beta/models/sim:generateContent", json={})).status_code == 400
    assert (await http.post("/v1beta/models/sim:countTokens", json=body)).json() == {"totalTokens": 1}


# Gemini by OpenAI's protocol


async def gemini_chat(http: httpx.AsyncClient, model: str = "sim", **more: Any) -> httpx.Response:
    return await http.post("/v1beta/openai/chat/completions", json=chat(model, **more))


async def test_gemini_chat_streams_openais_chunks_and_counts_thinking_in_the_total_only(
    http: httpx.AsyncClient,
) -> None:
    model = "sim:tokens=2,input=70,output=2,cache_read=64,thinking=500"
    answer = await gemini_chat(http, model, stream_options={"include_usage": True})
    *chunks, last = [data for _, data in events_of(answer.content)]
    assert last == b"[DONE]"
    parsed = [json.loads(chunk) for chunk in chunks]
    assert text_of(parsed) == "tok0 tok1 "
    assert [chunk["choices"][0]["finish_reason"] for chunk in parsed] == [None, None, "stop"]
    assert parsed[-1]["usage"] == {
        "prompt_tokens": 70,
        "completion_tokens": 2,
        "total_tokens": 572,
        "prompt_tokens_details": {"cached_tokens": 64},
    }
    assert "x-request-id" not in answer.headers
    refused = await gemini_chat(http, "sim:fault=refusal")
    assert b"content_filter: SAFETY" in refused.content


async def test_gemini_chat_answers_with_googles_errors_in_a_list(http: httpx.AsyncClient) -> None:
    limited_answer = await gemini_chat(http, "sim:fault=429,retry_after=1.5")
    assert (limited_answer.status_code, "retry-after" in limited_answer.headers) == (429, False)
    (body,) = limited_answer.json()
    assert (body["error"]["code"], body["error"]["status"]) == (429, "RESOURCE_EXHAUSTED")
    assert body["error"]["details"][0]["retryDelay"] == "1.5s"
    failed = await gemini_chat(http, "sim:fault=error_event,after=1")
    assert json.loads(events_of(failed.content)[-1][1])["error"]["status"] == "UNAVAILABLE"
    image = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    refused = await gemini_chat(http, messages=[{"role": "user", "content": [image]}])
    assert refused.json()[0]["error"]["status"] == "INVALID_ARGUMENT"


async def test_gemini_chat_wants_its_key_as_a_bearer() -> None:
    async with Simulator(key="secret") as sim, httpx.AsyncClient(base_url=sim.url, timeout=PATIENCE_S) as http:
        refused = await gemini_chat(http)
        assert refused.status_code == 400
        assert refused.json()[0]["error"]["details"][0]["reason"] == "API_KEY_INVALID"
        http.headers["authorization"] = "Bearer secret"
        assert (await gemini_chat(http)).status_code == 200


# Ways to run it


def test_a_simulator_in_a_thread_serves_synchronous_code() -> None:
    with running_simulator(default=Plan(text="hi")) as sim:
        sim.plan(text="queued")
        for expected in ("queued", "hi"):
            answer = httpx.post(f"{sim.url}/v1/chat/completions", json=chat(stream=False), timeout=PATIENCE_S)
            assert answer.json()["choices"][0]["message"]["content"] == expected
        sim.wait_requests(2)
        sim.wait_idle(connections=True)
        assert [record.outcome for record in sim.requests] == ["finished", "finished"]
        sim.reset()
        assert sim.stats()["requests"] == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(sim.url)


def test_waiting_for_idle_fails_while_a_request_hangs() -> None:
    with running_simulator() as sim:
        host, port = sim.url.removeprefix("http://").split(":")
        body = json.dumps(chat("sim:fault=hang")).encode()
        with socket.create_connection((host, int(port))) as client:
            client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            sim.wait_requests(1)
            with pytest.raises(TimeoutError, match="no open request"):
                sim.wait_idle(timeout_s=0.05)
        sim.wait_idle(connections=True)


def test_a_simulator_process_serves_and_checks_its_key() -> None:
    with spawned_simulator(key="k") as sim:
        url, allowed = f"{sim.url}/v1/chat/completions", {"Authorization": "Bearer k"}
        assert httpx.post(url, json=chat(), timeout=PATIENCE_S).status_code == 401
        assert httpx.post(url, json=chat(), headers=allowed, timeout=PATIENCE_S).status_code == 200
        assert httpx.get(f"{sim.url}/_sim/stats", timeout=PATIENCE_S).json()["pid"] == sim.pid


@pytest.mark.parametrize("way", ["stdin", "SIGTERM"])
def test_a_simulator_process_ends_by_signal_and_with_its_standard_input(way: str) -> None:
    command = [sys.executable, "-m", "tests.support.simulator", "--die-with-stdin"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["url"].startswith("http://127.0.0.1:")
        if way == "stdin":
            process.stdin.close()
        else:
            os.kill(process.pid, signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0


def test_a_refusing_address_refuses_and_an_unanswering_one_times_out() -> None:
    with refusing_url() as url, pytest.raises(httpx.ConnectError):
        httpx.get(url)
    with unanswering_url() as url, pytest.raises(httpx.ConnectTimeout):
        httpx.get(url, timeout=0.3)


# Plans and parsing


def test_a_model_name_with_a_plain_tag_is_no_spec() -> None:
    assert plan_from_model("llama3.2:1b", Plan()) is None
    assert plan_from_model("sim", Plan()) is None


def test_a_spec_changes_only_what_it_names() -> None:
    plan = plan_from_model("m:rate=5,text=a%2Cb,input=3", Plan(first=1.5))
    assert plan == Plan(first=1.5, rate=5.0, text="a,b", usage={"input_tokens": 3})


@pytest.mark.parametrize("spec", ["fault=nope", "tokens=x", "stamp=yes", "after=-1", "wire=0", "what=1", "rate="])
def test_a_bad_spec_is_refused(spec: str) -> None:
    with pytest.raises(PlanError):
        plan_from_model(f"sim:{spec}", Plan())


@pytest.mark.parametrize("given", [{"usage": {"in": 1}}, {"text": 5}, {"chunks": [1]}, {"tokens": "5"}, {"x": 1}])
def test_a_bad_plan_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        plan_from_mapping(given)


def test_the_earliest_stop_sequence_wins_across_deltas() -> None:
    assert limited(["ab", "cd", "ef"], None, ["ef", "bc"]) == (["a"], "stop_sequence", "bc")
    assert limited(["ab"], 1, []) == (["ab"], "stop", None)


def test_slices_add_up_to_what_was_cut() -> None:
    data = "data: é\r\n\r\n".encode()
    assert b"".join(sliced(data, None)) == data
    assert sliced(data, 3) == [data[i : i + 3] for i in range(0, len(data), 3)]
    assert b"\n" in {piece[:1] for piece in sliced(data, None)}


def test_a_chunked_body_is_read_whole_or_not_at_all() -> None:
    data = bytearray(b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\nrest")
    assert parse_chunks(data, 0) == (b"abcde", len(data) - 4)
    for end in range(len(data) - 5):
        assert parse_chunks(data[:end], 0) is None
    with pytest.raises(BadRequestError):
        parse_chunks(bytearray(b"zz\r\n"), 0)


async def test_an_entry_that_fails_takes_no_other_entrys_turn() -> None:
    loop = asyncio.get_running_loop()
    failures: list[BaseException | None] = []
    loop.set_exception_handler(lambda _, context: failures.append(context.get("exception")))
    ticker = Ticker(loop)
    called: asyncio.Queue[str] = asyncio.Queue()

    def fail() -> None:
        raise RuntimeError("broken entry")

    due = time.monotonic() + 0.01
    for name in ("first", "second"):
        ticker.at(due, Delayed(lambda name=name: called.put_nowait(name)))
        ticker.at(due, Delayed(fail))
    async with asyncio.timeout(PATIENCE_S):
        assert {await called.get(), await called.get()} == {"first", "second"}
    assert time.monotonic() >= due
    assert [str(failure) for failure in failures] == ["broken entry"] * 2
    ticker.close()
