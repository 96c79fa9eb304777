"""What must hold of the framers and decoders for any bytes; ``python -m ops.fuzz`` looks for longer."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.fuzz.coverage_input import MOST_CUTS, split
from ops.fuzz.framers import SEEDS, TARGETS

PLACES = st.lists(st.integers(0, 5000), max_size=MOST_CUTS)


@pytest.mark.parametrize("name", TARGETS)
def test_what_holds_for_the_samples_holds_however_they_are_cut(name: str) -> None:
    for sample in SEEDS[name]:
        TARGETS[name](sample, [])
        for place in range(len(sample)):
            TARGETS[name](sample, [place])


@pytest.mark.parametrize("name", TARGETS)
@settings(deadline=None)
@given(data=st.data())
def test_it_holds_for_any_bytes(name: str, data: st.DataObject) -> None:
    TARGETS[name](data.draw(st.binary(max_size=200)), data.draw(PLACES))


@pytest.mark.parametrize("name", TARGETS)
@settings(deadline=None)
@given(chance=st.randoms(use_true_random=False), places=PLACES)
def test_it_holds_for_samples_that_were_damaged(name: str, chance: random.Random, places: list[int]) -> None:
    TARGETS[name](damaged(chance.choice(SEEDS[name]), chance), places)


def damaged(sample: bytes, chance: random.Random) -> bytes:
    """Some bytes changed, left out or doubled; some JSON values put in the place of others."""
    values = [b"null", b"true", b"-1", b"1e999", b'"x"', b'"\\ud800"', b"[]", b"{}", b"[null]", b'{"a":[1]}']
    for _ in range(chance.randint(1, 4)):
        start = chance.randrange(len(sample) + 1)
        match chance.randint(0, 4):
            case 0:
                sample = sample[:start] + bytes([chance.randrange(256)]) + sample[start + 1 :]
            case 1:
                sample = sample[:start] + sample[start + chance.randint(1, 20) :]
            case 2:
                sample = sample[:start] + sample[chance.randrange(len(sample) + 1) :]
            case _:
                colon = sample.find(b":", start)
                end = min((i for c in b",}" if (i := sample.find(bytes([c]), colon)) > 0), default=len(sample))
                if colon > 0:
                    sample = sample[: colon + 1] + chance.choice(values) + sample[end:]
    return sample


def test_a_check_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("promptmill_workers.backends.sse.SseFramer.flush", lambda _: [object()])
    with pytest.raises(AssertionError, match="last event"):
        TARGETS["sse"](b"data: x", [1])
    monkeypatch.setattr("promptmill_workers.programs.lines.LineFramer.flush", lambda _: b"")
    with pytest.raises(AssertionError, match="other lines"):
        TARGETS["lines"](b"a\nb", [1])
    monkeypatch.setattr("promptmill_relay.sse.encode_frame", lambda event_id, kind, data: b"data: %b\n\n" % data)
    with pytest.raises(AssertionError, match="posed"):
        TARGETS["relay"](b"7-1token\n\ndata: forged", [3, 8])
    monkeypatch.setattr("promptmill_workers.backends.decoding.AnswerDecoder.end", lambda _: [])
    with pytest.raises(AssertionError, match="neither"):
        TARGETS["openai"](b"data: [DONE]\n\n", [])


def test_a_fuzzers_input_says_where_to_cut() -> None:
    assert split(b"data") == (b"data", [])
    data, places = split(b"data" + bytes([1, 0]) * MOST_CUTS)
    assert (data, places) == (b"data", [256] * MOST_CUTS)
