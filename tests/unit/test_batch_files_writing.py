"""Results and failures: whole lines only, whatever happened to the writer, and each line once."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promptmill.batch.files.ordering import put_in_order
from promptmill.batch.files.sidecar import Sidecar, sidecar_path
from promptmill.batch.files.writing import LineFile, OutputFiles, skipped_id
from promptmill.errors import BadRequest, PromptmillError

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def result(line_id: str, text: str = "Hi") -> dict[str, Any]:
    return {"id": line_id, "text": text}


@contextmanager
def files(tmp_path: Path) -> Iterator[OutputFiles]:
    made = OutputFiles(tmp_path / "results.jsonl", tmp_path / "results.failed.jsonl", "id")
    try:
        made.open()
        yield made
    finally:
        made.close()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def write(tmp_path: Path, ids: list[str], failed: frozenset[str] = frozenset()) -> None:
    with files(tmp_path) as made:
        for line_id in ids:
            (made.add_failure if line_id in failed else made.add_result)(line_id, result(line_id))
        made.flush()


@given(
    entries=st.lists(st.tuples(texts.filter(bool), texts), min_size=1, max_size=8, unique_by=lambda e: e[0]),
    data=st.data(),
)
@settings(deadline=None)
def test_a_kill_at_any_byte_costs_at_most_the_torn_line(
    tmp_path_factory: pytest.TempPathFactory, entries: list[tuple[str, str]], data: st.DataObject
) -> None:
    tmp_path = tmp_path_factory.mktemp("x")
    with files(tmp_path) as made:
        for line_id, text in entries:
            made.add_result(line_id, result(line_id, text))
        made.flush()
    path = tmp_path / "results.jsonl"
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    with files(tmp_path) as made:
        kept = whole[:cut].count(b"\n")
        assert path.read_bytes() == whole[: whole[:cut].rfind(b"\n") + 1]
        assert made.succeeded == kept
        assert [made.has(line_id) for line_id, _ in entries] == [n < kept for n in range(len(entries))]
        for line_id, text in entries:
            made.add_result(line_id, result(line_id, text))
        made.flush()
    assert path.read_bytes() == whole


def test_zeros_that_a_loss_of_power_left_are_cut_off(tmp_path: Path) -> None:
    write(tmp_path, ["a", "b"])
    path = tmp_path / "results.jsonl"
    good = path.read_bytes()
    path.write_bytes(good + b'{"id": "c\0\0\0\n{"id": "d"}\n\0\0')
    with files(tmp_path) as made:
        assert (made.succeeded, made.has("c"), made.has("d")) == (2, False, False)
    assert path.read_bytes() == good


@pytest.mark.parametrize("foreign", [b"hello\n", b'{"id": "a"}\nhello\n{"id": "b"}\n', b"hello", b'{"text": "x"}\n'])
def test_a_file_with_lines_of_others_is_refused_and_left_as_it_is(tmp_path: Path, foreign: bytes) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(foreign)
    with pytest.raises(BadRequest, match="is not a line of this batch"), files(tmp_path):
        pass
    assert path.read_bytes() == foreign


def test_a_line_is_written_once_however_often_it_ends(tmp_path: Path) -> None:
    write(tmp_path, ["a", "b"], frozenset("b"))
    write(tmp_path, ["a", "b", "c", "c"])
    assert [line["id"] for line in lines(tmp_path / "results.jsonl")] == ["a", "c"]
    assert [line["id"] for line in lines(tmp_path / "results.failed.jsonl")] == ["b"]


def test_there_is_no_file_of_failures_where_nothing_failed(tmp_path: Path) -> None:
    write(tmp_path, ["a"])
    assert not (tmp_path / "results.failed.jsonl").exists()


def test_a_line_that_was_left_out_is_known_by_its_number(tmp_path: Path) -> None:
    with files(tmp_path) as made:
        made.add_failure(skipped_id(3), {"id": None, "line": 3, "code": "bad_request"})
        made.flush()
    with files(tmp_path) as made:
        assert made.has(skipped_id(3))
        assert not made.has("3")
        assert not made.has(skipped_id(4))


def test_two_commands_do_not_write_one_file(tmp_path: Path) -> None:
    with files(tmp_path), pytest.raises(BadRequest, match="another command is writing"), files(tmp_path):
        pass


def test_a_file_system_without_locks_is_no_reason_to_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(file: Any, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    write(tmp_path, ["a"])
    assert len(lines(tmp_path / "results.jsonl")) == 1


class Full:
    """A disk with room for some bytes: what a file writes beyond them fails in the midst of a line."""

    def __init__(self, file: LineFile, room: int) -> None:
        self.room = room
        self._inner = file.open()
        file._file = self  # pyright: ignore[reportAttributeAccessIssue, reportPrivateUsage]

    def write(self, data: bytes) -> int:
        if self.room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = self._inner.write(data[: min(self.room, 7)])
        self.room -= taken
        return taken

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def test_a_full_disk_is_told_and_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with files(tmp_path) as made:
        made.add_result("a", result("a"))
        made.flush()
        whole = path.read_bytes()
        disk = Full(made.results, 40)
        for n in range(5):
            made.add_result(f"b{n}", result(f"b{n}"))
        with pytest.raises(PromptmillError) as caught:
            made.flush()
        assert caught.value.code == "cannot_write"
        assert caught.value.message == (
            f"{path} cannot be written: No space left on device; make room and run the same command again"
        )
        assert path.read_bytes() == whole
        disk.room = 10_000
        made.flush()
    assert [line["id"] for line in lines(path)] == ["a", "b0", "b1", "b2", "b3", "b4"]


def test_a_file_that_may_not_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(PromptmillError, match="Is a directory") as caught:
        LineFile(tmp_path).open()
    assert caught.value.code == "cannot_write"
    with pytest.raises(PromptmillError, match="No such file or directory"):
        LineFile(tmp_path / "not" / "there").open()


# -- order ---------------------------------------------------------------------------------------------------------


@given(st.permutations(range(12)), st.sets(st.integers(0, 11)))
@settings(deadline=None)
def test_results_are_put_in_the_order_of_the_input(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], failed: set[int]
) -> None:
    tmp_path = tmp_path_factory.mktemp("x")
    write(tmp_path, [f"line-{n}" for n in order], frozenset(f"line-{n}" for n in failed))
    with files(tmp_path) as made:
        put_in_order(made.results, "id", (f"line-{n}" for n in range(12)))
    expected = [f"line-{n}" for n in range(12) if n not in failed]
    assert [line["id"] for line in lines(tmp_path / "results.jsonl")] == expected
    assert {p.name for p in tmp_path.iterdir()} <= {"results.jsonl", "results.failed.jsonl"}


def test_an_order_that_cannot_be_written_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, ["b", "a"])
    path = tmp_path / "results.jsonl"
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with files(tmp_path) as made:
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            with pytest.raises(PromptmillError, match="No space left"):
                put_in_order(made.results, "id", ["a", "b"])
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["results.jsonl"]


def test_lines_that_nobody_asked_for_stay_behind_the_others(tmp_path: Path) -> None:
    write(tmp_path, ["x", "b", "a"])
    with files(tmp_path) as made:
        put_in_order(made.results, "id", ["a", "b", "c"])
    assert [line["id"] for line in lines(tmp_path / "results.jsonl")] == ["a", "b", "x"]


# -- the sidecar ---------------------------------------------------------------------------------------------------


def sidecar(**fields: Any) -> Sidecar:
    return Sidecar(
        **{
            "batch_id": "B",
            "input_size": 1,
            "input_sha256": "x",
            "total": 1,
            "chunk_lines": 100,
            "format": "text",
            **fields,
        }
    )


def test_a_sidecar_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = sidecar_path(tmp_path / "results.jsonl")
    assert path.name == "results.jsonl.promptmill.json"
    assert Sidecar.load(path) is None
    kept = sidecar(stage="sealed", cursor=7, skipped=[3], options={"--model": "m"})
    kept.save(path)
    assert Sidecar.load(path) == kept
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"version": 2}', sidecar().model_dump_json().encode()[:-9]])
def test_a_sidecar_that_is_none_is_told(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.promptmill.json"
    path.write_bytes(data)
    with pytest.raises(BadRequest, match="is not what this version writes there"):
        Sidecar.load(path)


def test_a_sidecar_of_other_options_names_the_one_that_differs(tmp_path: Path) -> None:
    kept = sidecar(options={"--model": "a", "--user": "u"})
    kept.check({"--model": "a", "--user": "u"}, tmp_path)
    with pytest.raises(BadRequest, match=r"another --model \('a', now none\)"):
        kept.check({"--user": "u"}, tmp_path)
    with pytest.raises(BadRequest, match=r"another --role \(none, now 'chat'\)"):
        kept.check({"--model": "a", "--user": "u", "--role": "chat"}, tmp_path)
