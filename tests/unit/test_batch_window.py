"""How the window is divided, which lines are open, and what slots lines of batches may hold."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from promptmill import keys
from promptmill.batch.chunks import line_job_id, pack, unpack
from promptmill.batch.models import BatchLine
from promptmill.batch.view import FIELDS, View, open_lines, shares
from promptmill_workers.capacity import Capacity


@settings(deadline=None)
@given(st.integers(1, 2_000), st.lists(st.integers(0, 3_000), min_size=1, max_size=30))
def test_shares_use_the_window_and_are_fair(window: int, demands: list[int]) -> None:
    given_ = shares(window, demands)
    assert all(1 <= share <= max(1, demand) for share, demand in zip(given_, demands, strict=True))
    if len(demands) <= window:
        wanted = sum(max(1, demand) for demand in demands)
        assert sum(given_) <= max(window, len(demands))
        assert sum(given_) >= min(wanted, window) - len(demands), "places are left although somebody wants them"
    largest = max(given_)
    for share, demand in zip(given_, demands, strict=True):
        assert share >= min(demand, largest - len(demands)), "somebody else has more"


def test_shares_of_a_small_and_a_large_batch() -> None:
    assert shares(100, [1000]) == [100]
    assert shares(100, [10, 1000]) == [10, 90]
    assert shares(100, [1000, 1000]) == [50, 50]
    assert shares(2, [5, 5, 5]) == [1, 1, 1], "nobody starves"


@settings(deadline=None)
@given(st.sets(st.integers(0, 200)), st.integers(0, 150), st.integers(0, 120))
def test_open_lines_are_those_whose_bit_is_not_set(counted: set[int], start: int, length: int) -> None:
    bits = bytearray(26)
    for index in counted:
        bits[index // 8] |= 0x80 >> index % 8
    while bits and not bits[-1]:
        bits.pop()  # the store's string ends with the last bit that was set
    stop = start + length
    read = bytes(bits)[start // 8 : -(-stop // 8)]
    assert open_lines(read, start, stop) == [i for i in range(start, stop) if i not in counted]


def test_a_view_counts_what_holds_a_place() -> None:
    row: dict[str, bytes] = {"state": b"running", "lines": b"100", "fed": b"60", "linked": b"5", "succeeded": b"20"}
    view = View.read([row.get(name) for name in FIELDS])
    assert view is not None
    assert (view.left, view.in_flight, view.feeds, view.over) == (40, 35, True, False)
    assert View.read([None] * len(FIELDS)) is None


def test_a_chunk_is_read_as_it_was_packed() -> None:
    lines = [BatchLine(f"é{i}", {"messages": [{"role": "user", "content": "\u2028 x"}]}, i or None) for i in range(3)]
    assert unpack(pack(lines)) == lines


@settings(deadline=None)
@given(st.text(min_size=1), st.integers(0, 10**7))
def test_the_id_of_a_lines_job_is_a_job_id_and_always_the_same(secret: str, index: int) -> None:
    job_id = line_job_id(secret, index)
    assert keys.check_job_id(job_id) == job_id
    assert job_id[0].isalnum()
    assert len(job_id) == 22
    assert line_job_id(secret, index) == job_id
    assert line_job_id(secret, index + 1) != job_id


# -- slots ---------------------------------------------------------------------------------------------------------


def test_lines_and_messages_together_hold_no_more_than_the_share() -> None:
    capacity = Capacity(10, "batch", 0.8)
    capacity.take("batch")
    capacity.lend(8)
    assert capacity.pull(100) == 7
    assert capacity.pull(100) == 0
    assert not capacity.has_room("batch")
    assert capacity.has_room("interactive")
    capacity.give("batch")
    assert capacity.pull(100) == 1


def test_nothing_is_pulled_that_was_not_lent() -> None:
    capacity = Capacity(10, "batch", 0.8)
    assert capacity.pull(5) == 0
    capacity.lend(3)
    assert capacity.pull(5) == 3
    capacity.lend(1)
    capacity.pulled_done(2)
    assert capacity.pull(5) == 0, "one still runs"
    capacity.pulled_done()
    assert capacity.pull(5) == 1


def test_slots_that_are_lent_are_kept_from_messages_and_come_back() -> None:
    capacity = Capacity(10, "batch", 0.8)
    capacity.lend(8)
    assert not capacity.has_room("batch")
    capacity.lend(4)
    assert capacity.has_room("batch")
    capacity.lend(0)
    for _ in range(8):
        capacity.take("batch")
    assert not capacity.has_room("batch")


def test_a_slot_is_left_to_messages_even_where_batch_jobs_may_hold_all() -> None:
    capacity = Capacity(10, "batch", 1.0)
    capacity.lend(10)
    assert capacity.pull(100) == 9
    assert capacity.has_room("interactive")
    only = Capacity(1, "batch", 1.0)
    only.lend(1)
    assert only.pull(100) == 1


def test_whoever_makes_room_for_messages_of_batch_jobs_is_told_so() -> None:
    """Else they are not asked for while lines follow each other: the slots that are lent change no more."""
    capacity = Capacity(5, "batch", 0.8)
    capacity.lend(4)
    assert capacity.pull(100) == 4
    capacity.lend(2)
    assert not capacity.has_room("batch"), "four still run"
    assert capacity.pulled_done() is True
    assert capacity.has_room("batch")
    assert capacity.pulled_done() is False


@given(
    concurrency=st.integers(1, 6),
    share=st.sampled_from([0.2, 0.5, 0.8, 1.0]),
    acts=st.lists(st.tuples(st.sampled_from(["lend", "pull", "done", "batch", "now"]), st.integers(0, 6)), max_size=60),
)
def test_no_line_that_ends_makes_room_unsaid(concurrency: int, share: float, acts: list[tuple[str, int]]) -> None:
    capacity = Capacity(concurrency, "batch", share)
    for act, count in acts:
        before = [capacity.has_room(queue) for queue in ("now", "batch")]
        if act == "lend":
            capacity.lend(count)
        elif act == "pull":
            capacity.pull(count)
        elif act == "done":
            said = capacity.pulled_done(min(count, capacity.pulled))
            assert said == ([capacity.has_room(queue) for queue in ("now", "batch")] != before)
        elif capacity.has_room(act):
            capacity.take(act)


def test_whoever_frees_the_last_slot_is_told_so() -> None:
    capacity = Capacity(3, "batch", 0.8)
    capacity.lend(2)
    assert capacity.pull(2) == 2
    capacity.take("interactive")
    assert capacity.pulled_done() is True
    assert capacity.pulled_done() is False
