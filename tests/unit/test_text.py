"""Text that can always be written, however its surrogates were cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptmill.text import SurrogateJoiner, clean_text

# Halves are made likely: whole Unicode would almost never bring two that belong together.
TEXTS = st.text(st.characters() | st.sampled_from("\ud83d\ude00\ud800\udbff\udc00\udfff😀aé"), max_size=30)


def joined(pieces: list[str]) -> str:
    joiner = SurrogateJoiner()
    return "".join(map(joiner.push, pieces)) + joiner.flush()


@given(TEXTS)
def test_clean_text_can_be_encoded_and_is_left_alone_when_cleaned_again(text: str) -> None:
    cleaned = clean_text(text)
    cleaned.encode()
    assert clean_text(cleaned) == cleaned


@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_text_without_surrogates_is_unchanged(text: str) -> None:
    assert clean_text(text) == text


@given(TEXTS, st.lists(st.integers(min_value=0, max_value=100), max_size=30))
def test_pieces_cut_anywhere_join_to_the_cleaned_whole(text: str, places: list[int]) -> None:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    assert joined([text[a:b] for a, b in pairwise(edges)]) == clean_text(text)


@given(st.lists(TEXTS, max_size=10))
def test_every_piece_that_comes_out_can_be_written(pieces: list[str]) -> None:
    joiner = SurrogateJoiner()
    for piece in pieces:
        joiner.push(piece).encode()
    joiner.flush().encode()


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        (["\ud83d", "\ude00"], "😀"),
        (["a\ud83d", "", "\ude00b"], "a😀b"),
        (["\ud83d\ude00"], "😀"),
        (["\ud83d", "x"], "\ufffdx"),
        (["\ude00"], "\ufffd"),
        (["\ud83d", "\ud83d", "\ude00"], "\ufffd😀"),
        (["end\ud83d"], "end\ufffd"),
        ([], ""),
    ],
)
def test_halves_are_joined_or_replaced(pieces: list[str], text: str) -> None:
    assert joined(pieces) == text


def test_a_high_half_is_held_back_until_its_other_half_comes() -> None:
    joiner = SurrogateJoiner()
    assert joiner.push("a\ud83d") == "a"
    assert joiner.push("\ude00") == "😀"
    assert joiner.flush() == ""
