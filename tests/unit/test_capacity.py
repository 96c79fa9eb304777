"""How many jobs a worker takes, and how many of them may be batch jobs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptmill_workers.capacity import Capacity

BOTH: tuple[str, ...] = ("now", "batch")


@pytest.mark.parametrize(
    ("concurrency", "share", "batch_max"),
    [(1000, 0.8, 800), (8, 0.8, 6), (5, 0.8, 4), (3, 0.8, 2), (2, 0.8, 1), (1, 0.8, 1), (4, 0.1, 1), (4, 1, 4)],
)
def test_batch_jobs_have_their_share_but_one_slot_at_least(concurrency: int, share: float, batch_max: int) -> None:
    capacity = Capacity(concurrency, "batch", share)
    for _ in range(batch_max):
        assert capacity.has_room("batch")
        capacity.take("batch")
    assert not capacity.has_room("batch")
    assert capacity.has_room("now") == (batch_max < concurrency)
    assert capacity.free == concurrency - batch_max


@given(
    concurrency=st.integers(1, 6),
    share=st.sampled_from([0.2, 0.5, 0.8, 1.0]),
    acts=st.lists(st.tuples(st.sampled_from(BOTH), st.booleans()), max_size=60),
)
def test_there_is_room_exactly_as_long_as_neither_bound_is_reached(
    concurrency: int, share: float, acts: list[tuple[str, bool]]
) -> None:
    capacity = Capacity(concurrency, "batch", share)
    taken: dict[str, int] = dict.fromkeys(BOTH, 0)
    for queue, taking in acts:
        total = sum(taken.values())
        room = {
            "now": total < concurrency,
            "batch": total < concurrency and taken["batch"] < max(1, int(share * concurrency)),
        }
        assert {name: capacity.has_room(name) for name in BOTH} == room
        if taking:
            capacity.take(queue)
            taken[queue] += 1
        elif taken[queue]:
            capacity.give(queue)
            taken[queue] -= 1
    assert capacity.free == concurrency - sum(taken.values())
