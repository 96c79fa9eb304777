"""The picture of `promptmill top` at several sizes of the terminal."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from datetime import UTC, date, datetime
from typing import Any

import pytest
from rich.console import Console

from promptmill.cli.top_view import Picture
from promptmill.fleet import BatchLook, Fleet, QueueLook, WorkerLook
from promptmill.heartbeat import Done
from promptmill.servers import Server
from promptmill.traffic import Cooldown
from promptmill.usage.report import Sums, UsageReport, UsageRow

DONE = Done(7200.0, {"succeeded": 1234, "failed": 5}, 99_999, 4.5, 321.0, {"refused": 4, "cut": 1})
WORKER = WorkerLook("api-1@host-1-ab", "api-1", "host", "api", "ready", True, 0.4, 34, 1000, None, [], 0, DONE)
MODELS = [
    UsageRow({"model": "sonnet"}, Sums(10, 1, 1000, 2000, cost_nano_usd=1_230_000_000)),
    UsageRow({"model": "local"}, Sums(3, 0, 10, 20, unpriced=3)),
]
ALL = Sums(13, 1, 1010, 2020, cost_nano_usd=1_230_000_000, unpriced=3)
FLEET = Fleet(
    at=datetime(2026, 11, 22, 21, 5, 1, tzinfo=UTC),
    store="127.0.0.1:6379",
    waiting=12_345,
    running=34,
    given_up=7,
    queues=[
        QueueLook("promptmill.api", "api", "interactive", 12_000, 0, 75.0, 1),
        QueueLook("promptmill.api.batch", "api", "batch", 0, 345, None, 1),
        QueueLook("promptmill.claude", "claude", "interactive", None, 0, 3 * 3600.0, 0),
    ],
    workers=[WORKER, replace(WORKER, id="api-2@host-2-cd", name="api-2", alive=False, silent_s=12.0)],
    servers=[Server("gateway@host-3-ef", "gateway", True, 0.5, 60.0, 41, 5000, 250.0)],
    batches=2,
    open_batches=[BatchLook("A" * 22, "running", 1000, 250, 3)],
    held=[Cooldown("model", "sonnet", "open", 30.0, "overloaded")],
    today=UsageReport(
        date(2026, 11, 22),
        date(2026, 11, 22),
        ("model",),
        MODELS,
        Sums(13, 1, 1010, 2020, cost_nano_usd=1_230_000_000, unpriced=3),
    ),
)


def shown(fleet: Fleet, width: int, height: int = 200, **options: Any) -> list[str]:
    file = io.StringIO()
    console = Console(file=file, width=width, height=height, highlight=False, markup=False, emoji=False)
    console.print(Picture(fleet, **options))
    return file.getvalue().splitlines()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_what_matters_is_there_at_every_width(width: int) -> None:
    lines = shown(FLEET, width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    words = " ".join(text.split())
    assert "waiting 12,345" in words
    assert "running 34 of 1,000" in words
    assert "workers 1 of 2" in words
    assert "given up 7" in words
    for part in ("12,000", "75 s", "3.0 h", "api-1", "34/1,000", "silent 12 s", "gateway@", "41", "refused", "sonnet"):
        assert part in text, part
    for part in ("$1.23+?", "$?", "overloaded", "30 s", "250/1,000"):
        assert part in text, part
    assert "?" in next(line for line in lines if line.startswith("claude"))


def test_wider_terminals_show_more_columns() -> None:
    narrow, middle, wide = ("\n".join(shown(FLEET, width)) for width in (60, 100, 200))
    assert "tokens/s" in middle.split("workers", 1)[1]
    for part in ("1,234", "5,000", "2.0 h"):
        assert part not in narrow
        assert part in middle
        assert part in wide
    # Side by side: fewer lines.
    assert len(wide.splitlines()) < len(middle.splitlines())


def test_a_low_terminal_shows_some_rows_and_says_how_many_there_are_more() -> None:
    fleet = replace(FLEET, workers=[replace(WORKER, id=f"w{n}", name=f"w{n}") for n in range(50)])
    assert len(shown(fleet, 80)) > 60
    lines = shown(fleet, 80, height=24, fits=True)
    assert any("and 46 more" in line for line in lines)
    assert not any("and" in line for line in shown(FLEET, 80, height=24, fits=True))


def test_trouble_is_told_above_the_last_picture() -> None:
    lines = shown(FLEET, 80, trouble="Redis at 127.0.0.1:6379 cannot be reached")
    assert lines[1].startswith("as it was then: Redis at 127.0.0.1:6379 cannot be reached")


def test_an_empty_deployment_has_a_picture() -> None:
    nothing: list[Any] = []
    empty = replace(
        FLEET, queues=FLEET.queues[:1], workers=nothing, servers=nothing, open_batches=nothing, held=nothing,
        today=UsageReport(date(2026, 11, 22), date(2026, 11, 22), ("model",), []),
    )  # fmt: skip
    text = "\n".join(shown(empty, 80))
    assert "cost today $0.00" in " ".join(text.split())
    assert "worker " not in text.splitlines()[-2]


def test_a_queue_that_nobody_serves_stands_out() -> None:
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True, color_system="standard", highlight=False)
    fleet = replace(FLEET, queues=[replace(FLEET.queues[0], workers=0)], workers=[], held=[])
    console.print(Picture(fleet))
    assert re.search(r"\x1b\[31m *0\x1b", file.getvalue())


def test_the_json_form_holds_everything_and_no_more_than_json_can() -> None:
    said = json.loads(json.dumps(FLEET.to_dict()))
    assert said["at"] == "2026-11-22T21:05:01.000+00:00"
    assert (said["waiting"], said["running"], said["readers"], said["jobs_per_s"]) == (12_345, 34, 41, 4.5)
    assert said["failures"] == {"refused": 4, "cut": 1}
    assert said["queues"][2]["messages"] is None
    assert said["workers"][0]["done"]["ended"] == {"succeeded": 1234, "failed": 5}
    assert said["today"]["rows"][0]["model"] == "sonnet"
