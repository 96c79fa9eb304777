"""The line framer: how the bytes were cut must not matter, nor how many pieces there were."""

from __future__ import annotations

import time
import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptmill_workers.programs.lines import LineFramer, LineTooLong

BYTES = st.lists(st.sampled_from([b"a", b"\n", b"\r\n", b"\xe2\x80\xa8", b"\x0b\x0c\x1c\x85", b"\x00", b"{}"])).map(
    b"".join
)


def pieces_of(text: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[start:end] for start, end in pairwise(edges)]


@given(BYTES, st.lists(st.integers(0, 60), max_size=20))
def test_lines_do_not_depend_on_where_the_bytes_are_cut(text: bytes, cuts: list[int]) -> None:
    framer = LineFramer(1000)
    lines = [line for piece in pieces_of(text, cuts) for line in framer.push(piece)]
    assert [*lines, framer.flush()] == text.split(b"\n")
    assert framer.flush() == b""


@given(BYTES, st.lists(st.integers(0, 60), max_size=20), st.integers(0, 6))
def test_a_line_is_too_long_exactly_when_it_is_over_the_bound(text: bytes, cuts: list[int], bound: int) -> None:
    framer = LineFramer(bound)

    def push_all() -> None:
        for piece in pieces_of(text, cuts):
            framer.push(piece)

    if max(len(line) for line in text.split(b"\n")) > bound:
        with pytest.raises(LineTooLong):
            push_all()
        assert framer.flush() == b"", "what is too long is not kept"
    else:
        push_all()


def test_a_line_in_a_million_pieces_takes_time_by_its_length_not_by_its_square() -> None:
    framer = LineFramer(1 << 30)
    started = time.process_time()
    for _ in range(200_000):
        framer.push(b"0123456789")
    assert framer.push(b"\n") == [b"0123456789" * 200_000]
    # Joined at every piece it would copy 200 GB.
    assert time.process_time() - started < 5


def test_a_flood_without_a_line_end_is_not_kept() -> None:
    framer, chunk = LineFramer(1 << 20), b"x" * 65536
    tracemalloc.start()
    try:
        for _ in range(1000):
            for _ in range(16):
                framer.push(chunk)
            with pytest.raises(LineTooLong):
                framer.push(chunk)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
