"""Lines of a batch in every format: what they say arrives, what they cannot say is refused, answers have their form."""

from __future__ import annotations

import base64
import csv
import io
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promptmill.batch.files.format import Format, FormatName
from promptmill.batch.files.formats import FormatOptions, format_of, output_format
from promptmill.batch.files.lines import LineReader
from promptmill.batch.files.outcomes import answer_of, error_of, failure_of
from promptmill.batch.files.records import Input, Record
from promptmill.batch.models import BatchResult
from promptmill.contract import ErrorInfo, ImagePart, Job, JobRequest, Limits, Message, TextPart, Usage
from promptmill.errors import BadRequest

LIMIT = Limits().request_bytes
PNG = base64.b64encode(b"\x89PNG....").decode()

# -- any request, written in a provider's form, is read as the same request ---------------------------------------

text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda t: bool(t.strip()))
ids = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
names = st.from_regex(r"[a-z][a-z0-9._-]{0,20}", fullmatch=True)
images = st.one_of(
    st.binary(min_size=1, max_size=30).map(
        lambda data: ImagePart(media_type="image/png", data=base64.b64encode(data).decode())
    ),
    names.map(lambda name: ImagePart(url=f"https://example.com/{name}.png")),
)
contents = text | st.lists(text.map(lambda t: TextPart(text=t)) | images, min_size=1, max_size=3)
schemas = st.fixed_dictionaries({"type": st.just("object"), "title": text})
formats = st.one_of(
    st.just({"type": "json_object"}),
    st.builds(
        lambda name, schema: {"type": "json_schema", "json_schema": {"name": name, "schema": schema}},
        names.map(lambda n: n.replace(".", "_")),
        schemas,
    ),
)


@st.composite
def requests(draw: st.DrawFn, *, structured: bool = True, metadata: bool = True) -> JobRequest:
    turns = draw(st.lists(st.tuples(text, text), max_size=2))
    messages = [
        Message(role=role, content=t) for pair in turns for role, t in zip(("user", "assistant"), pair, strict=True)
    ]
    messages.append(Message(role="user", content=draw(contents)))
    fields: dict[str, Any] = {
        "messages": messages,
        "system": draw(st.none() | text),
        "model": draw(st.none() | names),
        "max_tokens": draw(st.none() | st.integers(1, 10_000)),
        "temperature": draw(st.none() | st.floats(0, 2)),
        "stop": draw(st.none() | st.lists(text, min_size=1, max_size=3)),
        "priority": "batch",
    }
    if structured:
        fields["response_format"] = draw(st.none() | formats)
    if metadata:
        fields["metadata"] = draw(st.dictionaries(names, text, max_size=3))
    return JobRequest(**{k: v for k, v in fields.items() if v is not None})


def openai_part(part: TextPart | ImagePart, *, responses: bool = False) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "input_text" if responses else "text", "text": part.text}
    url = part.url or f"data:{part.media_type};base64,{part.data}"
    if responses:
        return {"type": "input_image", "image_url": url, "detail": "auto"}
    return {"type": "image_url", "image_url": {"url": url, "detail": "high"}}


def schema_format(request: JobRequest) -> dict[str, Any] | None:
    asked = request.response_format
    if asked is None:
        return None
    if asked.type == "json_object":
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"name": asked.name, "schema": asked.json_schema, "strict": True}}


def content(message: Message, part: Any) -> Any:
    return message.content if isinstance(message.content, str) else [part(p) for p in message.content]


def as_chat(line_id: str, request: JobRequest) -> dict[str, Any]:
    messages = [{"role": m.role, "content": content(m, openai_part)} for m in request.messages]
    if request.system is not None:
        messages.insert(0, {"role": "system", "content": request.system})
    body = {
        "model": request.model,
        "messages": messages,
        "max_completion_tokens": request.max_tokens,
        "temperature": request.temperature,
        "stop": request.stop,
        "response_format": schema_format(request) or {"type": "text"},
        "metadata": request.metadata or None,
        "n": 1,
        "user": "somebody",
    }
    return {"custom_id": line_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def as_responses(line_id: str, request: JobRequest) -> dict[str, Any]:
    wanted = schema_format(request)
    if wanted and "json_schema" in wanted:
        wanted = {"type": "json_schema", **wanted["json_schema"]}
    items = [
        {"type": "message", "role": m.role, "content": content(m, lambda p: openai_part(p, responses=True))}
        for m in request.messages
    ]
    body = {
        "model": request.model,
        "input": items,
        "instructions": request.system,
        "max_output_tokens": request.max_tokens,
        "temperature": request.temperature,
        "text": {"format": wanted or {"type": "text"}},
        "metadata": request.metadata or None,
        "store": False,
    }
    return {"custom_id": line_id, "method": "POST", "url": "/v1/responses", "body": body}


def anthropic_part(part: TextPart | ImagePart) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text, "cache_control": {"type": "ephemeral"}}
    if part.url:
        return {"type": "image", "source": {"type": "url", "url": part.url}}
    return {"type": "image", "source": {"type": "base64", "media_type": part.media_type, "data": part.data}}


def as_anthropic(line_id: str, request: JobRequest) -> dict[str, Any]:
    params = {
        "model": request.model,
        "max_tokens": request.max_tokens,
        "messages": [{"role": m.role, "content": content(m, anthropic_part)} for m in request.messages],
        "system": [{"type": "text", "text": request.system}] if request.system is not None else None,
        "temperature": request.temperature,
        "stop_sequences": request.stop,
        "stream": False,
        "metadata": {"user_id": "somebody"},
    }
    return {"custom_id": line_id, "params": params}


def as_simple(line_id: str, request: JobRequest) -> dict[str, Any]:
    fields = request.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    del fields["priority"]
    return {"id": line_id, **fields}


def record(line: Any, number: int = 1) -> Record:
    raw = line if isinstance(line, bytes) else json.dumps(line).encode()
    return Record(number, 0, len(raw), raw)


def form(name: FormatName) -> Format:
    return output_format(name)


def read(name: FormatName, line: Any, **overrides: Any) -> tuple[str, JobRequest]:
    return LineReader(form(name), Limits(), overrides).read(record(line))


@given(ids, requests(metadata=True))
@settings(deadline=None)
def test_a_chat_completion_line_says_the_request(line_id: str, request: JobRequest) -> None:
    assert read("openai", as_chat(line_id, request)) == (line_id, request)


@given(ids, requests().filter(lambda r: r.stop is None))
@settings(deadline=None)
def test_a_responses_line_says_the_request(line_id: str, request: JobRequest) -> None:
    assert read("openai-responses", as_responses(line_id, request)) == (line_id, request)


@given(ids, requests(structured=False, metadata=False))
@settings(deadline=None)
def test_an_anthropic_line_says_the_request(line_id: str, request: JobRequest) -> None:
    assert read("anthropic", as_anthropic(line_id, request)) == (line_id, request)


@given(ids, requests())
@settings(deadline=None)
def test_a_simple_line_says_the_request(line_id: str, request: JobRequest) -> None:
    assert read("simple", as_simple(line_id, request)) == (line_id, request)


def open_records(data: bytes, path: Path, options: FormatOptions | None = None) -> tuple[Format, list[Record]]:
    """The format that a file is seen to have, and its records, read again by their places."""
    path.write_bytes(data)
    with Input.open(str(path)) as source:
        found = format_of(source, options or FormatOptions(), LIMIT)
        records = list(found.records(source, LIMIT))
        again = [Record(r.number, r.offset, r.size, source.read(r.offset, r.size)) for r in records]
        assert source.digest() == source.sha256
    for once, twice in zip(records, again, strict=True):
        assert found.parse(once) == found.parse(twice)
    return found, records


line_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\0"), min_size=1).filter(
    lambda t: bool(t.strip()) and not t.startswith("\ufeff")
)


@given(lines=st.lists(line_text, min_size=1, max_size=6), end=st.sampled_from(["\n", "\r\n"]), bom=st.booleans())
@settings(deadline=None)
def test_every_line_of_text_is_a_prompt_by_its_number(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], end: str, bom: bool
) -> None:
    data = (b"\xef\xbb\xbf" if bom else b"") + ("\n" + end.join(lines) + end + end).encode()
    path = tmp_path_factory.mktemp("x") / "prompts.txt"
    found, records = open_records(data, path, FormatOptions(name="text"))
    reader = LineReader(found, Limits())
    assert [reader.read(r) for r in records] == [
        (str(number), JobRequest.model_validate({"prompt": line.rstrip("\r"), "priority": "batch"}))
        for number, line in enumerate(lines, 2)
    ]


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=20)


@given(
    rows=st.lists(st.tuples(cells, cells), min_size=1, max_size=6),
    delimiter=st.sampled_from([",", ";", "\t"]),
    end=st.sampled_from(["\n", "\r\n"]),
)
@settings(deadline=None)
def test_every_row_of_a_csv_fills_the_template(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], delimiter: str, end: str
) -> None:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end)
    writer.writerow(["id", "title", "body"])
    writer.writerows([f"row {n}", *row] for n, row in enumerate(rows))
    path = tmp_path_factory.mktemp("x") / "rows.csv"
    data = text.getvalue().encode()
    found, records = open_records(data, path, FormatOptions(template="{title}: {{{body}}}"))
    assert found.name == "csv"
    assert [found.parse(r) for r in records] == [
        type(found.parse(r))(f"row {n}", {"prompt": f"{title}: {{{body}}}"})
        for n, ((title, body), r) in enumerate(zip(rows, records, strict=True))
    ]


def test_a_request_with_parts_is_read_again_as_it_is_stored() -> None:
    parts = [TextPart(text="What is this?"), ImagePart(url="https://example.com/a.png")]
    request = JobRequest(messages=[Message(role="user", content=parts)])
    assert JobRequest.model_validate_json(request.to_json()) == request


# -- which format --------------------------------------------------------------------------------------------------

CHAT_LINE = b'{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": []}}\n'


@pytest.mark.parametrize(
    ("data", "name", "options", "expected"),
    [
        (CHAT_LINE, "x", {}, "openai"),
        (CHAT_LINE.replace(b"chat/completions", b"responses"), "x", {}, "openai-responses"),
        (b'{"custom_id": "a", "params": {}}\n', "x", {}, "anthropic"),
        (b'{"id": 1, "prompt": "x"}\n', "x", {}, "simple"),
        (b'\n  \n{"prompt": "x"}', "x.jsonl", {}, "simple"),
        (b'{"id": 1, "body": "x"}\n', "x.jsonl", {"template": "{body}"}, "simple"),
        (b"What is a mill?\n", "x", {}, "text"),
        (b"What is a mill?\n", "x", {"template": "Say: {text}"}, "text"),
        (b"a,b\n1,2\n", "x", {"template": "{b}"}, "csv"),
        (b"prompt\nx\n", "x.csv", {}, "csv"),
        (b"id\tprompt\n1\tx\n", "x.tsv", {}, "csv"),
        (b'{"id": 1}\n', "x", {"name": "text"}, "text"),
    ],
)
def test_the_format_is_seen_by_the_first_line(
    tmp_path: Path, data: bytes, name: str, options: dict[str, Any], expected: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with Input.open(str(tmp_path / name)) as source:
        assert format_of(source, FormatOptions(**options), LIMIT).name == expected


@pytest.mark.parametrize(
    ("data", "name", "options", "says"),
    [
        (b"", "x", {}, "is empty"),
        (b"\n \r\n", "x", {}, "is empty"),
        (b'[{"id": 1}]\n', "x.json", {}, "not an array"),
        (b"hello\n", "x.jsonl", {}, "line 1: not JSON"),
        (CHAT_LINE.replace(b"chat/completions", b"embeddings"), "x", {}, "'/v1/embeddings' is not supported"),
        (b"a,b\n1,2\n", "x.csv", {}, "give a --template over the columns a, b"),
        (b"a,b\n1,2\n", "x.csv", {"template": "{c}"}, "no column 'c'; there are a, b"),
        (b"a,a\n1,2\n", "x.csv", {"template": "{a}"}, "same name"),
        (b"a,b\n1,2\n", "x.csv", {"template": "{a}", "id_column": "c"}, "--id-column: there is no column 'c'"),
        (b"x\n", "x", {"template": "no column"}, "names no column"),
        (b"x\n", "x", {"template": "{text!r}"}, "and no more"),
        (b"x\n", "x", {"template": "{text"}, "--template: "),
        (b"x\n", "x", {"name": "text", "template": "{other}"}, "a line is {text}"),
        (CHAT_LINE, "x", {"template": "{text}"}, "does not go with the format openai"),
        (b"x\n", "x", {"id_column": "id"}, "does not go with the format text"),
    ],
)
def test_an_input_that_does_not_fit_what_is_said_of_it_is_refused(
    tmp_path: Path, data: bytes, name: str, options: dict[str, Any], says: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with Input.open(str(tmp_path / name)) as source, pytest.raises(BadRequest) as caught:
        format_of(source, FormatOptions(**options), LIMIT)
    assert says in caught.value.message


# -- bad lines -----------------------------------------------------------------------------------------------------


def chat(**body: Any) -> dict[str, Any]:
    return {"custom_id": "a", "body": {"messages": [{"role": "user", "content": "x"}], **body}}


def chat_with(*messages: dict[str, Any]) -> dict[str, Any]:
    return chat(messages=list(messages))


def anthropic(**params: Any) -> dict[str, Any]:
    return {"custom_id": "a", "params": {"messages": [{"role": "user", "content": "x"}], **params}}


@pytest.mark.parametrize(
    ("name", "line", "says"),
    [
        ("simple", b"{", "not JSON"),
        ("simple", b"[]", "not a JSON object"),
        ("simple", b"\xff{}", "not UTF-8 (byte 0"),
        ("simple", b'{"prompt": "x", "temperature": NaN}', "NaN is no number"),
        ("simple", {"id": "a"}, "give prompt or messages"),
        ("simple", {"id": "a", "prompt": "x", "max_token": 1}, "max_token: no such field"),
        ("simple", {"id": True, "prompt": "x"}, "id: text of 1"),
        ("simple", {"id": "", "prompt": "x"}, "id: text of 1"),
        ("simple", {"id": "x" * 513, "prompt": "x"}, "id: text of 1"),
        ("simple", {"id": "a", "prompt": "x", "user": "me"}, "give --user"),
        ("simple", {"id": "a", "prompt": "x", "priority": "interactive"}, "priority batch"),
        ("simple", {"id": "a", "prompt": "x", "idempotency_key": "k"}, "the line's id is its key"),
        ("openai", {"body": {}}, "custom_id: missing"),
        ("openai", {"custom_id": "a"}, "body: missing"),
        ("openai", {"custom_id": "a", "body": []}, "body: an object"),
        ("openai", {"custom_id": "a", "body": {}, "more": 1}, "more: not supported"),
        ("openai", {"custom_id": "a", "body": {}, "url": "/v1/responses"}, "where the first line has"),
        ("openai", {"custom_id": "a", "body": {}, "method": "GET"}, "POST is needed"),
        ("openai", {"custom_id": "a", "body": {}}, "body.messages: missing"),
        ("openai", chat_with(), "a list with a message"),
        ("openai", chat(tools=[{"type": "function"}]), "body.tools: not supported; `--ignore-field tools`"),
        ("openai", chat(n=2), "body.n: not supported"),
        ("openai", chat(seed=7), "body.seed: not supported"),
        ("openai", chat_with({"role": "tool", "content": "x"}), "the role 'tool'"),
        ("openai", chat_with({"role": "user", "content": "x"}, {"role": "system", "content": "y"}), "behind the first"),
        ("openai", chat_with({"role": "user", "content": [{"type": "input_audio"}]}), "a part of type 'input_audio'"),
        ("openai", chat_with({"role": "user", "content": "x", "name": "me"}), "body.messages.0.name: not supported"),
        ("openai", chat(max_tokens=0), "max_tokens: "),
        ("openai-responses", {"custom_id": "a", "body": {"input": [{"type": "reasoning"}]}}, "no message"),
        ("openai-responses", {"custom_id": "a", "body": {"input": "x", "previous_response_id": "r"}}, "not supported"),
        ("anthropic", {"custom_id": "a", "params": {}}, "params.messages: missing"),
        ("anthropic", anthropic(tools=[{"name": "t"}]), "params.tools: not supported"),
        ("anthropic", anthropic(thinking={"type": "enabled"}), "params.thinking: not supported"),
        ("anthropic", anthropic(messages=[{"role": "user", "content": [{"type": "document"}]}]), "of type 'document'"),
        (
            "anthropic",
            anthropic(messages=[{"role": "user", "content": "x"}] * 1 + [{"role": "assistant", "content": "y"}]),
            "the last message must be the user's",
        ),
    ],
)
def test_a_bad_line_says_what_is_wrong_with_it(name: FormatName, line: Any, says: str) -> None:
    with pytest.raises(BadRequest) as caught:
        read(name, line)
    assert says in caught.value.message


def test_fields_that_the_user_chose_to_drop_are_dropped(tmp_path: Path) -> None:
    line = json.dumps(chat(seed=7, top_p=0.5)).encode()
    found, records = open_records(line, tmp_path / "x", FormatOptions(ignored=frozenset({"seed", "top_p"})))
    assert LineReader(found, Limits()).read(records[0])[1].messages[0].text == "x"


def test_an_escaped_lone_surrogate_in_a_line_is_replaced_as_everywhere() -> None:
    line_id, request = read("simple", b'{"id": "\\ud83d\\ude00\\ud800", "prompt": "a\\udc00"}')
    assert (line_id, request.messages[0].text) == ("\U0001f600\ufffd", "a\ufffd")


def test_options_win_over_what_a_line_says() -> None:
    line = {"id": "a", "prompt": "x", "role": "chat", "slot": "primary", "max_tokens": 5, "temperature": 1}
    _, request = read("simple", line, model="small", max_tokens=7)
    assert (request.model, request.role, request.slot, request.max_tokens, request.temperature) == (
        "small",
        None,
        None,
        7,
        1,
    )


def test_a_providers_name_of_a_model_is_ours_in_a_providers_line_only() -> None:
    known = {"claude-x-1": "sonnet"}
    line = anthropic(model="claude-x-1")
    assert LineReader(form("anthropic"), Limits(), {}, known).read(record(line))[1].model == "sonnet"
    simple = {"id": "a", "prompt": "x", "model": "claude-x-1"}
    assert LineReader(form("simple"), Limits(), {}, known).read(record(simple))[1].model == "claude-x-1"


def test_several_leading_system_messages_are_one() -> None:
    line = chat_with(
        {"role": "system", "content": "a"},
        {"role": "developer", "content": [{"type": "text", "text": "b"}]},
        {"role": "user", "content": "x"},
    )
    assert read("openai", line)[1].system == "a\n\nb"


def test_a_row_that_has_not_the_headings_fields_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('prompt,b\nx\n"open, and\nso on,,\n')
    with Input.open(str(tmp_path / "x.csv")) as source:
        found = format_of(source, FormatOptions(), LIMIT)
        short, broken = list(found.records(source, LIMIT))
        with pytest.raises(BadRequest, match="has 1 fields, the heading has 2"):
            found.parse(short)
        with pytest.raises(BadRequest, match="not CSV: unexpected end of data"):
            found.parse(broken)
        assert (short.number, broken.number) == (2, 3)


def test_a_row_that_is_not_utf_8_is_told_and_the_next_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"prompt\na\xff\nb\n")
    with Input.open(str(tmp_path / "x.csv")) as source:
        found = format_of(source, FormatOptions(), LIMIT)
        bad, good = list(found.records(source, LIMIT))
        with pytest.raises(BadRequest, match="not UTF-8"):
            found.parse(bad)
        assert found.parse(good).fields == {"prompt": "b"}


# -- answers -------------------------------------------------------------------------------------------------------

USAGE = Usage(input_tokens=10, output_tokens=4, cache_read_tokens=3, cache_write_tokens=2)


def job(**fields: Any) -> Job:
    at = datetime(2026, 1, 2, tzinfo=UTC)
    base: dict[str, Any] = {"id": "JOB", "state": "succeeded", "user": "u", "model": "sonnet", "created_at": at}
    return Job(**{**base, "text": "Hi", "usage": USAGE, "cost_usd": 0.5, "finish_reason": "stop", **fields})


@pytest.mark.parametrize(("reason", "told"), [("stop", "stop"), ("length", "length"), ("stop_sequence", "stop")])
def test_an_answer_to_a_chat_line_is_a_line_of_openais_output_file(reason: str, told: str) -> None:
    line = answer_of(form("openai"), BatchResult(0, "a", None), job(finish_reason=reason))
    assert line == {
        "id": "batch_req_JOB",
        "custom_id": "a",
        "response": {
            "status_code": 200,
            "request_id": "JOB",
            "body": {
                "id": "chatcmpl-JOB",
                "object": "chat.completion",
                "created": 1767312000,
                "model": "sonnet",
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": "Hi", "refusal": None},
                        "logprobs": None,
                        "finish_reason": told,
                    }
                ],
                "usage": {
                    "prompt_tokens": 15,
                    "completion_tokens": 4,
                    "total_tokens": 19,
                    "prompt_tokens_details": {"cached_tokens": 3},
                },
            },
        },
        "error": None,
    }


def test_an_answer_to_a_responses_line_is_a_response() -> None:
    line = answer_of(form("openai-responses"), BatchResult(0, "a", None), job(finish_reason="length"))
    body = line["response"]["body"]
    assert body["output"][0]["content"] == [{"type": "output_text", "text": "Hi", "annotations": []}]
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert body["usage"]["total_tokens"] == 19


def test_an_answer_to_an_anthropic_line_is_a_result_with_a_message() -> None:
    line = answer_of(form("anthropic"), BatchResult(0, "a", None), job(finish_reason="length"))
    message = line["result"]["message"]
    assert (line["custom_id"], line["result"]["type"]) == ("a", "succeeded")
    assert message["content"] == [{"type": "text", "text": "Hi"}]
    assert message["stop_reason"] == "max_tokens"
    assert message["usage"] == {
        "input_tokens": 10,
        "cache_creation_input_tokens": 2,
        "cache_read_input_tokens": 3,
        "output_tokens": 4,
    }


@pytest.mark.parametrize("name", ["simple", "text", "csv"])
def test_other_answers_are_ours(name: FormatName) -> None:
    assert answer_of(form(name), BatchResult(0, "a", None), job()) == {
        "id": "a",
        "text": "Hi",
        "model": "sonnet",
        "usage": USAGE.model_dump(),
        "cost_usd": 0.5,
        "finish_reason": "stop",
        "job_id": "JOB",
        "attempts": 0,
    }


def test_what_an_equal_line_had_costs_nothing_again() -> None:
    line = answer_of(form("simple"), BatchResult(3, "a", None, same=0), job())
    assert (line["cost_usd"], line["usage"]["output_tokens"]) == (0.0, 0)


@pytest.mark.parametrize(
    ("ended", "code"),
    [
        (None, "not_found"),
        (job(state="failed", error=ErrorInfo(code="refused", message="no")), "refused"),
        (job(state="cancelled"), "cancelled"),
        (job(state="expired"), "expired"),
    ],
)
def test_every_end_without_an_answer_has_a_code(ended: Job | None, code: str) -> None:
    error = error_of(BatchResult(0, "a", ended))
    assert error is not None
    assert error.code == code


def test_a_failure_has_the_line_as_it_was() -> None:
    error = ErrorInfo(code="refused", message="no")
    made = failure_of("a", error, job(), record({"id": "a", "prompt": "x"}, 7), is_json=True)
    assert json.loads(json.dumps({**made, "input": None})) == {
        "id": "a",
        "line": 7,
        "code": "refused",
        "message": "no",
        "retryable": False,
        "job_id": "JOB",
        "attempts": 0,
        "input": None,
    }


def test_failures_among_results_have_the_providers_form() -> None:
    error = ErrorInfo(code="rate_limited", message="slow down")
    assert form("openai").failure("a", error, None)["error"] == {"code": "rate_limited", "message": "slow down"}
    errored = form("anthropic").failure("a", error, None)["result"]
    assert errored["error"]["error"] == {"type": "rate_limit_error", "message": "rate_limited: slow down"}
    assert form("anthropic").failure("a", ErrorInfo(code="expired", message=""), None)["result"] == {"type": "expired"}
    assert form("simple").failure("a", error, None)["error"]["code"] == "rate_limited"
