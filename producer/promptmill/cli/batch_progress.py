"""How far a batch is: a live display at a terminal, a line every few seconds elsewhere, or JSON events."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Final, Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from promptmill.batch.models import BatchStatus
from promptmill.traffic import Cooldown

from .output import note, out_json

PLAIN_EVERY_S: Final = 5.0
_RATE_OVER_S: Final = 30.0
_SHOWN_MAX: Final = 6


class Pace:
    """Lines a second over the last half minute, and how long the rest takes at that."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def take(self, done: int, now: float) -> None:
        """So many lines are done at a time in s."""
        if self._seen and done < self._seen[-1][1]:
            self._seen.clear()  # a store that came back with less: what was measured before says nothing
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[1][0] >= _RATE_OVER_S:
            self._seen.popleft()

    @property
    def rate(self) -> float | None:
        """Lines a second; None where nothing was seen to end."""
        if len(self._seen) < 2:
            return None
        (first_at, first), (last_at, last) = self._seen[0], self._seen[-1]
        return (last - first) / (last_at - first_at) if last > first and last_at > first_at else None

    def left_s(self, total: int | None) -> float | None:
        """Seconds to the end; None where that is not known."""
        rate = self.rate
        return (total - self._seen[-1][1]) / rate if total is not None and rate else None


class View:
    """All that is shown of a batch, and put into words once for every kind of display."""

    def __init__(self, total: int | None = None) -> None:
        self.status: BatchStatus | None = None
        self.held: Sequence[Cooldown] = ()
        self.trouble: str | None = None
        self.written: int | None = None
        self._total = total
        self._pace = Pace()

    def take(self, status: BatchStatus) -> None:
        """The batch as it is now."""
        self.status = status
        self._pace.take(status.done, time.monotonic())

    @property
    def total(self) -> int | None:
        """How many lines there are, as far as anybody knows."""
        known = self.status.total if self.status else None
        return self._total if known is None else known

    def data(self) -> dict[str, Any]:
        """As JSON."""
        if self.status is None:
            return {}
        left_s = self._pace.left_s(self.total)
        return {
            **self.status.model_dump(mode="json", exclude={"options"}),
            "total": self.total,
            "done": self.status.done,
            "lines_per_s": self._pace.rate,
            "left_s": left_s,
            "written": self.written,
            "held_back": [{"name": c.name, "state": c.state, "for_s": c.for_s, "code": c.code} for c in self.held],
            "trouble": self.trouble,
        }

    def head(self) -> str:
        """How far it is and how fast it goes."""
        status = self.status
        if status is None:
            return self.trouble or ""
        total, done = self.total, status.done
        parts = [f"{done:,} of {total:,}" if total is not None else f"{done:,} so far"]
        if total:
            parts[0] += f" ({100 * done // total} %)"
        if status.state == "uploading" and total is not None:
            parts.append(f"{status.uploaded_lines:,} uploaded")
        elif status.state not in {"running", "completed"}:
            parts.append(status.state)
        if self._pace.rate and not status.ended:
            parts.append(f"{self._pace.rate:,.1f}/s")
            parts.append(f"{duration(self._pace.left_s(total))} left")
        return ", ".join(parts)

    def details(self) -> list[tuple[str, str]]:
        """What there is beside, by name."""
        status = self.status
        found: list[tuple[str, str]] = []
        if status is not None:
            ends = {"succeeded": status.succeeded, "failed": status.failed}
            ends |= {"cancelled": status.cancelled, "expired": status.expired}
            found.append(("lines", ", ".join(f"{n:,} {kind}" for kind, n in ends.items() if n) or "none ended yet"))
            if status.failures:
                found.append(("failures", _counts(status.failures)))
            if status.models:
                found.append(("models", _counts(status.models)))
            usage = status.usage
            asked = usage.input_tokens + usage.cache_read_tokens + usage.cache_write_tokens
            about = " (partly estimated)" if usage.estimated else ""
            found.append(("tokens", f"{asked:,} in, {usage.output_tokens:,} out{about}"))
            found.append(("cost", dollars(status)))
        if self.held:
            found.append(("held back", "; ".join(_held(cooldown) for cooldown in self.held)))
        if self.trouble:
            found.append(("trouble", self.trouble))
        return found

    def line(self) -> str:
        """All on one line."""
        details = "; ".join(f"{name} {text}" for name, text in self.details() if name != "lines")
        return f"{self.head()}; {details}" if details else self.head()


def dollars(status: BatchStatus) -> str:
    """The cost as far as it is known."""
    if status.unpriced and not status.cost_usd:
        return "not known"
    return f"${status.cost_usd:,.4f}{' and more' if status.unpriced else ''}"


def duration(seconds: float | None) -> str:
    """A time for people: 45 s, 12 min, 3.4 h."""
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _counts(counts: dict[str, int]) -> str:
    rows = sorted(counts.items(), key=lambda row: -row[1])
    more = f", {len(rows) - _SHOWN_MAX} others" if len(rows) > _SHOWN_MAX else ""
    return ", ".join(f"{name} {count:,}" for name, count in rows[:_SHOWN_MAX]) + more


def _held(cooldown: Cooldown) -> str:
    about = [cooldown.state, *([f"for {cooldown.for_s:.0f} s"] if cooldown.for_s else [])]
    if cooldown.concurrency is not None:
        about.append(f"{cooldown.concurrency} at once")
    about += [cooldown.code] if cooldown.code else []
    return f"{cooldown.name} ({', '.join(about)})"


class Display(Protocol):
    """Shows a :class:`View`. Use it as a context; nothing is drawn outside."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def checking(self, lines: int, done_bytes: int, all_bytes: int) -> None:
        """Lines are being checked."""
        ...

    def show(self, view: View) -> None:
        """Something may have changed; called often."""
        ...

    def tell(self, event: str, text: str, **data: Any) -> None:
        """Something happened once: ``text`` for people, ``data`` for programs."""
        ...


class _Plain:
    """A line of text now and then, to standard error."""

    every_s = PLAIN_EVERY_S

    def __init__(self) -> None:
        self._next_at = time.monotonic() + self.every_s
        self._last = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def checking(self, lines: int, done_bytes: int, all_bytes: int) -> None:
        if self._due():
            note(f"checking: {lines:,} lines, {_share(done_bytes, all_bytes)}")

    def show(self, view: View) -> None:
        if self._due():
            line = view.line()
            if line != self._last:
                note(line)
                self._last = line

    def tell(self, event: str, text: str, **data: Any) -> None:
        del event, data
        if text:
            note(text)

    def _due(self) -> bool:
        now = time.monotonic()
        if now < self._next_at:
            return False
        self._next_at = now + self.every_s
        return True


class Silent(_Plain):
    """Shows nothing."""

    def checking(self, lines: int, done_bytes: int, all_bytes: int) -> None:
        """Nothing."""

    def show(self, view: View) -> None:
        """Nothing."""

    def tell(self, event: str, text: str, **data: Any) -> None:
        """Nothing."""


class _Json(_Plain):
    """Events as JSON, to standard output."""

    every_s = 1.0

    def checking(self, lines: int, done_bytes: int, all_bytes: int) -> None:
        if self._due():
            out_json({"event": "checking", "lines": lines, "bytes": done_bytes, "of_bytes": all_bytes})

    def show(self, view: View) -> None:
        if self._due():
            out_json({"event": "progress", **view.data()})

    def tell(self, event: str, text: str, **data: Any) -> None:
        del text
        out_json({"event": event, **data})


class _Live(_Plain):
    """Redrawn in place, on the terminal of standard error."""

    def __init__(self) -> None:
        super().__init__()
        self._console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        self._live = Live(console=self._console, refresh_per_second=5, redirect_stdout=False, redirect_stderr=False)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def checking(self, lines: int, done_bytes: int, all_bytes: int) -> None:
        self._live.update(Text(f"checking: {lines:,} lines, {_share(done_bytes, all_bytes)}"))

    def show(self, view: View) -> None:
        table = Table.grid(padding=(0, 2))
        for name, text in view.details():
            table.add_row(Text(name, style="dim"), Text(text))
        total = view.total
        done = view.status.done if view.status else 0
        self._live.update(Group(ProgressBar(total=total or 1, completed=done, width=40), Text(view.head()), table))

    def tell(self, event: str, text: str, **data: Any) -> None:
        del event, data
        if text:
            self._console.print(Text(text))


def display(*, as_json: bool) -> Display:
    """What fits where this process writes to."""
    if as_json:
        return _Json()
    return _Live() if sys.stderr.isatty() else _Plain()


def _share(done: int, total: int) -> str:
    return f"{100 * done // total} %" if total else "100 %"
