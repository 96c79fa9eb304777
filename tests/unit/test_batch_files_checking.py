"""The first pass over an input: what is wrong is told before anything is sent, what is right is found again."""

from __future__ import annotations

import io
import json
import os
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promptmill.batch.files.checking import (
    BAD_LINES_MAX,
    CHUNK_BYTES_MAX,
    BadInput,
    Plan,
    batch_lines,
    check_input,
    ids_of,
    locate_lines,
    sample_of,
)
from promptmill.batch.files.formats import FormatOptions, format_of
from promptmill.batch.files.hashes import HashTable, hash_of_id
from promptmill.batch.files.lines import LineReader
from promptmill.batch.files.records import Input
from promptmill.contract import Limits, parse_request
from promptmill.errors import BadRequest

SMALL = Limits(request_bytes=1000)


def jsonl(*lines: Any) -> bytes:
    return b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)


def line(n: int, **fields: Any) -> dict[str, Any]:
    return {"id": f"line-{n}", "prompt": f"What is {n}?", **fields}


def check(path: Path, data: bytes, *, limits: Limits | None = None, **options: Any) -> Plan:
    path.write_bytes(data)
    with Input.open(str(path)) as source:
        return check_input(source, reader_of(source, limits), **options)


def reader_of(source: Input, limits: Limits | None = None, **overrides: Any) -> LineReader:
    limits = limits or Limits()
    return LineReader(format_of(source, FormatOptions(), limits.request_bytes), limits, overrides)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.jsonl"


def test_a_bad_line_names_its_number_and_reason(path: Path) -> None:
    data = jsonl(line(1), b"", line(2, max_token=3), line(3))
    with pytest.raises(BadInput) as caught:
        check(path, data)
    assert caught.value.message == (
        f"{path}: 1 of 3 lines is wrong; nothing was sent. line 3: max_token: no such field"
    )
    assert [(bad.number, bad.code) for bad in caught.value.lines] == [(3, "bad_request")]


def test_bad_lines_are_left_out_where_that_was_asked_for(path: Path) -> None:
    plan = check(path, jsonl(line(1), b"{", line(1), line(2)), skip_bad=True)
    assert [str(bad).split(" (")[0] for bad in plan.bad] == [
        "line 2: not JSON: Expecting property name enclosed in double quotes: line 1 column 2",
        "line 3: id: 'line-1' is the id of line 1, too",
    ]
    assert list(plan.numbers) == [1, 4]


def test_a_duplicate_id_is_told_with_the_line_that_has_it_already(path: Path) -> None:
    with pytest.raises(BadInput, match="line 4: id: '7' is the id of line 2, too"):
        check(path, jsonl(line(1), line(2, id=7), line(3), line(4, id="7")))


def test_a_line_that_is_too_long_is_told_and_the_next_ones_are_read(path: Path) -> None:
    long = line(2, system="x" * 5_000_000)
    plan = check(path, jsonl(line(1), long, line(3)), limits=SMALL, skip_bad=True)
    assert [(bad.number, bad.code, bad.message) for bad in plan.bad] == [
        (2, "too_large", "the line is longer than 1000 bytes")
    ]
    assert list(plan.numbers) == [1, 3]


@pytest.mark.parametrize("size", [999, 1000, 1001])
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_a_line_of_just_the_limit_is_good(tmp_path: Path, size: int, end: bytes) -> None:
    (tmp_path / "x.txt").write_bytes(b"x" * size + end)
    with Input.open(str(tmp_path / "x.txt")) as source:
        (record,) = source.lines(1000)
    assert (record.problem is None) == (size <= 1000)


def test_a_line_without_end_is_read_with_bounded_memory(path: Path) -> None:
    with path.open("wb") as file:
        file.write(jsonl(line(1)))
        file.truncate(400 << 20)  # a sparse file: one line of zeros without an end
    with Input.open(str(path)) as source:
        reader = reader_of(source, SMALL)
        tracemalloc.start()
        try:
            plan = check_input(source, reader, skip_bad=True)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert [bad.code for bad in plan.bad] == ["too_large"]
    assert peak < 32 << 20


def test_an_input_of_which_nothing_is_left_is_refused(path: Path) -> None:
    with pytest.raises(BadRequest, match="has no line to run: all 2 are wrong"):
        check(path, jsonl(b"{", {"id": "a"}), skip_bad=True)


def test_so_many_bad_lines_are_not_skipped(path: Path) -> None:
    with pytest.raises(BadInput, match="more than 10000 lines are wrong"):
        check(path, jsonl(line(1)) + b"x\n" * (BAD_LINES_MAX + 1), skip_bad=True)


def test_equal_lines_are_found_where_that_was_asked_for(path: Path) -> None:
    lines = [line(1), line(2), {"id": "a", "prompt": "What is 1?"}, {"prompt": "What is 2?", "id": "b"}, line(3)]
    plan = check(path, jsonl(*lines), dedupe=True)
    assert [plan.same_as(index) for index in range(5)] == [None, None, 0, 1, None]
    (amounts,) = plan.choices.values()
    assert amounts.lines == 3
    assert check(path, jsonl(*lines)).same_as(2) is None


def test_equal_hashes_of_different_requests_make_no_equal_lines(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("promptmill.batch.files.checking.hash_of", lambda data: 1)
    plan = check(path, jsonl(line(1), line(2), {"id": "a", "prompt": "What is 1?"}), dedupe=True)
    assert [plan.same_as(index) for index in range(3)] == [None, None, 0]


def test_what_lines_ask_for_is_summed_by_who_shall_answer(path: Path) -> None:
    plan = check(path, jsonl(line(1, model="a", max_tokens=5), line(2, model="b"), line(3, model="a", max_tokens=7)))
    found = {choice.model: amounts for choice, amounts in plan.choices.items()}
    assert (found["a"].lines, found["a"].output_max, found["a"].unbounded, found["a"].first_number) == (2, 12, 0, 1)
    assert (found["b"].lines, found["b"].output_max, found["b"].unbounded, found["b"].first_number) == (1, 0, 1, 2)


@given(count=st.integers(1, 40), size=st.integers(1, 12), bad=st.sets(st.integers(0, 39)))
@settings(deadline=None)
def test_uploaded_chunks_hold_every_line_as_it_was_checked(
    tmp_path_factory: pytest.TempPathFactory, count: int, size: int, bad: set[int]
) -> None:
    path = tmp_path_factory.mktemp("x") / "x.jsonl"
    lines = [b"{" if n in bad and n else line(n, max_tokens=n + 1) for n in range(count)]
    path.write_bytes(jsonl(*lines))
    good = [entry for entry in lines if not isinstance(entry, bytes)]
    with Input.open(str(path)) as source:
        reader = reader_of(source, model="m")
        plan = check_input(source, reader, skip_bad=True)
        again = locate_lines(source, reader, frozenset(b.number for b in plan.bad))
        assert (again.numbers, again.offsets, again.sizes) == (plan.numbers, plan.offsets, plan.sizes)
        assert [(b.number, b.offset, b.size) for b in again.bad] == [(b.number, b.offset, b.size) for b in plan.bad]
        sent = [
            made
            for start in range(0, len(plan), size)
            for made in batch_lines(source, reader, plan, start, start + size)
        ]
        assert [name for _, name in ids_of(source, reader, plan)] == [entry["id"] for entry in good]
    assert [made.id for made in sent] == [entry["id"] for entry in good]
    for made, entry in zip(sent, good, strict=True):
        fields = {k: v for k, v in entry.items() if k != "id"}
        assert parse_request(made.request) == parse_request({**fields, "model": "m", "priority": "batch"})


@given(total=st.integers(1, 60), count=st.integers(1, 70))
@settings(deadline=None)
def test_a_sample_is_spread_over_the_input(tmp_path_factory: pytest.TempPathFactory, total: int, count: int) -> None:
    path = tmp_path_factory.mktemp("x") / "x.jsonl"
    path.write_bytes(jsonl(*(line(n) for n in range(total))))
    with Input.open(str(path)) as source:
        reader = reader_of(source)
        plan = check_input(source, reader)
        sample = sample_of(plan, source, reader, count)
        names = [name for _, name in ids_of(source, reader, sample)]
    assert len(set(names)) == len(names) == min(total, count)
    assert sample.input_lines == total
    assert sum(amounts.lines for amounts in sample.choices.values()) == len(sample)
    gaps = [b - a for a, b in zip(sample.numbers, list(sample.numbers)[1:], strict=False)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_chunks_of_large_lines_have_fewer_lines() -> None:
    plan = Plan()
    plan.sizes.extend([1000] * 200)
    assert plan.chunk_lines() == 100
    plan.sizes.extend([1 << 20] * 30)
    assert plan.chunk_lines() == 5
    plan.sizes.append(CHUNK_BYTES_MAX + 1)
    assert plan.chunk_lines() == 1


def test_an_input_that_changes_while_it_is_read_is_told(path: Path) -> None:
    path.write_bytes(jsonl(*(line(n) for n in range(3))))
    with Input.open(str(path)) as source:
        reader = reader_of(source)

        def change(lines: int, done: int) -> None:
            if lines == 2:
                os.utime(path, ns=(1, 1))

        with pytest.raises(BadRequest, match="was changed while it was read"):
            check_input(source, reader, seen=change)


def test_an_input_that_shrinks_before_it_is_sent_is_told(path: Path) -> None:
    path.write_bytes(jsonl(*(line(n) for n in range(3))))
    with Input.open(str(path)) as source:
        reader = reader_of(source)
        plan = check_input(source, reader)
        path.write_bytes(b"")
        with pytest.raises(BadRequest, match="was changed while it was read"):
            batch_lines(source, reader, plan, 0, 3)


def make_fifo(tmp_path: Path, data: bytes) -> str:
    read, write = os.pipe()
    os.write(write, data)
    os.close(write)
    return f"/dev/fd/{read}"


def test_a_pipe_is_read_again_by_places(tmp_path: Path) -> None:
    name = make_fifo(tmp_path, jsonl(line(1), line(2)))
    with Input.open(name) as source:
        reader = reader_of(source)
        plan = check_input(source, reader)
        assert [made.id for made in batch_lines(source, reader, plan, 0, 100)] == ["line-1", "line-2"]
    os.close(int(name.rpartition("/")[2]))


def test_standard_input_is_an_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(jsonl(line(1)))))
    with Input.open("-") as source:
        assert (source.name, len(check_input(source, reader_of(source)))) == ("standard input", 1)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "cannot be read: No such file"),
        (lambda path: path.mkdir(), "cannot be read: Is a directory"),
    ],
)
def test_an_input_that_cannot_be_read_is_told(path: Path, make: Callable[[Path], Any], says: str) -> None:
    make(path)
    with pytest.raises(BadRequest, match=says), Input.open(str(path)):
        pass


@given(st.lists(st.tuples(st.integers(1, 2**64 - 1), st.integers(0, 2**62)), max_size=300))
def test_the_table_of_hashes_is_a_dict_of_first_numbers(pairs: list[tuple[int, int]]) -> None:
    table, model = HashTable(), dict[int, int]()
    for key, number in pairs:
        assert table.add(key, number) == model.get(key)
        model.setdefault(key, number)
    assert len(table) == len(model)
    assert all(table.get(key) == number and key in table for key, number in model.items())
    assert table.get(3) == model.get(3)


def test_the_table_of_hashes_grows() -> None:
    table = HashTable()
    keys = [hash_of_id(f"line-{n}") for n in range(20_000)]
    assert all(table.add(key, n) is None for n, key in enumerate(keys))
    assert [table.get(key) for key in keys] == list(range(20_000))
