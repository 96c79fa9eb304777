"""What a report is asked for: days and groups, and what is wrong with them."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

import pytest

from promptmill.errors import BadRequest
from promptmill.store.tries import day_of, merge_tries, try_id
from promptmill.usage.report import parse_by, parse_days, today


def test_days_are_dates_or_names_and_default_to_today() -> None:
    now = today()
    assert parse_days(None, None) == (now, now)
    assert parse_days("yesterday", "today") == (now - timedelta(days=1), now)
    assert parse_days("yesterday", None) == (now - timedelta(days=1), now)
    assert parse_days("2024-02-28", date(2024, 3, 1)) == (date(2024, 2, 28), date(2024, 3, 1))
    assert parse_days(None, "2024-03-01") == (date(2024, 3, 1), date(2024, 3, 1))


@pytest.mark.parametrize(
    ("first", "last", "field"),
    [
        ("2026-02-30", None, "from"),
        ("tomorrow", None, "from"),
        (None, "20260101", "to"),
        (None, "\u0662\u0660\u0662\u0666-01-01", "to"),
        ("", None, "from"),
        ("2026-01-02", "2026-01-01", "from"),
        ("2020-01-01", "2026-01-01", "from"),
    ],
)
def test_days_that_are_none_are_named(first: str | None, last: str | None, field: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_days(first, last)
    assert (caught.value.code, caught.value.field) == ("bad_request", field)


def test_groups_are_named_once_in_the_order_asked_for() -> None:
    assert parse_by(None) == ("user", "model")
    assert parse_by("day, user,day") == ("day", "user")
    assert parse_by(["role"]) == ("role",)
    assert parse_by("") == ()
    with pytest.raises(BadRequest, match="user, model, backend, role, day") as caught:
        parse_by("user,price")
    assert caught.value.field == "by"


def test_a_try_counts_on_the_utc_day_on_which_it_ended() -> None:
    assert day_of({"finished_at": "2026-01-01T00:30:00+02:00"}) == "2025-12-31"
    ended = datetime(2026, 5, 6, 23, 59, 59, tzinfo=UTC)
    assert day_of({"ended_ms": ended.timestamp() * 1000}) == "2026-05-06"
    assert day_of({"epoch": str(int(ended.timestamp() * 1000))}) == "2026-05-06"


def test_a_try_is_named_by_its_claim_and_a_lost_one_by_that_alone() -> None:
    assert try_id({"claim": "0123456789", "attempt": 3}) == "01234567:3"
    assert try_id({"claim": "0123456789", "attempt": 3, "lost": True}) == "01234567:lost"
    assert try_id({"claim": "01234567", "epoch": "5", "attempt": 1, "text_bytes": 0}) == "01234567:lost"
    assert try_id({"epoch": "5", "attempt": 1, "text_bytes": 9}) == "5:lost"


def test_two_lists_of_tries_become_one_in_which_what_was_told_wins() -> None:
    presumed = {"claim": "a", "attempt": 1, "text_bytes": 9, "ended_ms": 0}
    told = {"claim": "a", "attempt": 4, "lost": True, "outcome": "cut", "finished_at": "2026-01-01T00:00:00+00:00"}
    other = {"claim": "b", "attempt": 1}
    assert merge_tries([presumed, other], [told, other]) == [{**told, "day": "1970-01-01"}, other]
    assert merge_tries([other], [told]) == [other, told]
