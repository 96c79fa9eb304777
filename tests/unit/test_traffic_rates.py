"""Providers' headers on their limits, and the lines in which isolated backends hand them on."""

from __future__ import annotations

import httpx
import pytest

from promptmill.rates import RateInfo, RateWindow
from promptmill_workers.backends.rate_headers import rate_info
from promptmill_workers.items import decode_line, encode_item

DATE = "Sun, 22 Nov 2026 12:00:00 GMT"


def anthropic(**parts: str) -> dict[str, str]:
    return {"Date": DATE, **{f"Anthropic-RateLimit-{name.replace('_', '-')}": value for name, value in parts.items()}}


def openai(**parts: str) -> dict[str, str]:
    return {"Date": DATE, **{f"x-ratelimit-{name.replace('_', '-')}": value for name, value in parts.items()}}


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"retry-after": "3", "date": DATE}, None),
        (
            anthropic(requests_limit="50", requests_remaining="0", requests_reset="2026-11-22T12:00:12Z"),
            RateInfo(requests=RateWindow(50, 0, 12.0)),
        ),
        (
            anthropic(
                tokens_limit="90000",
                tokens_remaining="1000",
                tokens_reset="2026-11-22T13:00:30+01:00",
                input_tokens_limit="80000",
                input_tokens_remaining="0",
                output_tokens_remaining="10000",
            ),
            RateInfo(
                tokens=RateWindow(90_000, 1000, 0.0 + 30),
                input_tokens=RateWindow(80_000, 0, None),
                output_tokens=RateWindow(None, 10_000, None),
            ),
        ),
        (anthropic(requests_reset="2026-11-22T11:59:00Z"), RateInfo(requests=RateWindow(None, None, 0.0))),
        (
            openai(limit_requests="60", remaining_requests="59", reset_requests="1s", reset_tokens="6m0s"),
            RateInfo(RateWindow(60, 59, 1.0), RateWindow(None, None, 360.0)),
        ),
        (openai(reset_requests="8.64s"), RateInfo(RateWindow(None, None, 8.64))),
        (openai(reset_requests="120ms"), RateInfo(RateWindow(None, None, 0.12))),
        (openai(reset_requests="1h2m3.5s"), RateInfo(RateWindow(None, None, 3723.5))),
        (openai(reset_requests="12.5"), RateInfo(RateWindow(None, None, 12.5))),
        (openai(remaining_tokens="149984.0"), RateInfo(tokens=RateWindow(None, 149_984, None))),
        # What cannot be read, or cannot be meant, counts as not told.
        (openai(reset_requests="1795348800"), None),
        (openai(reset_requests="soon", limit_requests="-1", remaining_requests="many"), None),
        (openai(reset_requests="1x2s", limit_requests="9" * 30), None),
        ({"x-ratelimit-limit": "5"}, None),
        (anthropic(requests_reset="2026-13-45T00:00:00Z"), None),
    ],
)
def test_headers_are_read_as_the_provider_means_them(headers: dict[str, str], expected: RateInfo | None) -> None:
    assert rate_info(httpx.Headers(headers)) == expected


def test_a_wrong_date_of_the_provider_is_not_the_end_of_an_answer() -> None:
    info = rate_info({"date": "yesterday", "anthropic-ratelimit-requests-reset": "2020-01-01T00:00:00Z"})
    assert info == RateInfo(requests=RateWindow(None, None, 0.0))


def test_what_has_run_out_for_the_longest_counts() -> None:
    assert RateInfo().used_up() is None
    assert RateInfo(RateWindow(5, 1, 9.0), RateWindow(5, 0, None)).used_up() is None
    info = RateInfo(RateWindow(5, 0, 2.0), RateWindow(5, 1, 99.0), RateWindow(5, 0, 7.0), RateWindow(5, 0, 3.0))
    assert info.used_up() == ("tokens", 7.0)


@pytest.mark.parametrize(
    "info", [RateInfo(), RateInfo(RateWindow(1, 0, 0.5)), RateInfo(None, RateWindow(), RateWindow(3), RateWindow(2, 1))]
)
def test_what_an_isolated_backend_learns_of_limits_arrives_as_it_was(info: RateInfo) -> None:
    line = encode_item(info)
    assert line.count(b"\n") == 1
    assert decode_line(line) == info
