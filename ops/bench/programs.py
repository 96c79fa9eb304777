"""``python -m ops.bench.programs``: what the guard of a program costs, and whether it leaves anything behind.

Start-up is measured against a bare subprocess of the same event loop, in turns, so that both see the same machine:
from the call to the moment at which the program is known to run. Linux only: memory and leaks are read from /proc.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import uvloop
from ops.bench.report import number, table
from ops.bench.stats import percentile

from promptmill_workers.programs import LEVELS, Program, open_sandbox, prepare, probe_all
from promptmill_workers.programs.environment import jobs_root

SLEEP = ("/bin/sleep", "300")
FAKE = 'i=0; while [ $i -lt 50 ]; do echo \'{"text":"token"}\'; i=$((i+1)); sleep 0.02; done'
"""Streams fifty lines in a second or more, as a program does."""

BARE = "bare subprocess"


@dataclass
class Row:
    """What was measured of one way to run programs; milliseconds and KiB."""

    name: str
    start_ms: list[float] = field(default_factory=list)
    end_ms: list[float] = field(default_factory=list)
    guard_kib: float = float("nan")
    note: str = ""

    def cells(self) -> list[str]:
        """Its cells in the table."""
        start, end = sorted(self.start_ms), sorted(self.end_ms)
        figures = [percentile(start, 50), percentile(start, 99), percentile(end, 50), self.guard_kib]
        return [self.name, *(number(figure, 1) for figure in figures), self.note]


@dataclass(frozen=True)
class Held:
    """What this process and the user's jobs hold."""

    descendants: int
    descriptors: int
    pipes: int
    directories: int


def held() -> Held:
    """Count it now. The warden is not counted: it stays."""
    names = [process.name() for process in psutil.Process().children(recursive=True)]
    targets: list[str] = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            targets.append(str(entry.readlink()))
        except FileNotFoundError:
            continue  # the listing's own
    return Held(
        descendants=len([name for name in names if name != "pm-warden"]),
        descriptors=len(targets),
        pipes=len([target for target in targets if target.startswith(("pipe:", "socket:"))]),
        directories=len(list(Path(jobs_root()).iterdir())),
    )


async def measure_bare(row: Row) -> None:
    """One start and one kill without any guard."""
    started = time.perf_counter()
    process = await asyncio.create_subprocess_exec(*SLEEP, stdin=-1, stdout=-1, stderr=-1, start_new_session=True)
    running = time.perf_counter()
    process.kill()
    await process.communicate()
    row.start_ms.append((running - started) * 1000)
    row.end_ms.append((time.perf_counter() - running) * 1000)


async def measure_level(row: Row) -> None:
    """One start and one end at a level."""
    async with open_sandbox("sleep") as box:
        started = time.perf_counter()
        async with box.run(SLEEP, environment={}, level=row.name):
            running = time.perf_counter()
        ended = time.perf_counter()
    row.start_ms.append((running - started) * 1000)
    row.end_ms.append((ended - running) * 1000)


def pss_kib(pids: Iterable[int]) -> float:
    """Proportional set size, which counts a shared page by its share."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total


def by_name() -> dict[str, list[int]]:
    """Our descendants by name."""
    found: dict[str, list[int]] = {}
    for process in psutil.Process().children(recursive=True):
        found.setdefault(process.name(), []).append(process.pid)
    return found


async def measure_memory(row: Row, count: int = 20) -> None:
    """PSS of the guard (with its namespace's init, where there is one) of each of ``count`` programs at a time."""
    async with AsyncExitStack() as stack:
        for _ in range(count):
            box = await stack.enter_async_context(open_sandbox("sleep"))
            await stack.enter_async_context(box.run(SLEEP, environment={}, level=row.name))
        names = by_name()
        guards, inits = names.get("pm-guard", []), names.get("pm-init", [])
        row.guard_kib = pss_kib([*guards, *inits]) / count
        warden = pss_kib(names["pm-warden"])
        row.note = f"warden {warden:.0f} KiB" + (", guard + init" if inits else "")


async def _lines(program: Program) -> int:
    count = 0
    async for _ in program.lines():
        count += 1
    return count


async def run_together(level: str, count: int) -> str:
    """``count`` fakes at a time, each read to its end; answers what came of it."""
    before = held()

    async def one() -> int:
        async with (
            open_sandbox("fake") as box,
            box.run(("/bin/sh", "-c", FAKE), environment={}, level=level) as program,
        ):
            return await _lines(program)

    started = time.perf_counter()
    lines = await asyncio.gather(*(one() for _ in range(count)))
    took_s = time.perf_counter() - started
    return f"{count} at a time: {sum(lines)} of {count * 50} lines in {took_s:.1f} s, {leaks(before)}"


async def kill_in_a_row(level: str, count: int) -> str:
    """``count`` programs, one after the other, killed as soon as they run; answers what came of it."""
    before, row = held(), Row(level)
    started = time.perf_counter()
    for _ in range(count):
        await measure_level(row)
    took_s = time.perf_counter() - started
    return f"{count} kills in a row: {took_s:.1f} s, {leaks(before)}"


def leaks(before: Held) -> str:
    """In words: what there is now that there was not before."""
    after = held()
    more = {name: getattr(after, name) - getattr(before, name) for name in Held.__dataclass_fields__}
    left = ", ".join(f"{count:+d} {name}" for name, count in more.items() if count)
    return f"LEFT: {left}" if left else "nothing left"


async def run(rounds: int, together: int, kills: int, levels: Sequence[str]) -> int:
    """Measure and print; answers the exit code, 1 where something was left."""
    permitted = await probe_all()
    await prepare()
    names = [level for level in levels if permitted[level] == "ok"]
    bare, rows = Row(BARE), [Row(name) for name in names]
    await asyncio.to_thread(int)  # the executor's first thread and what it opens belong to nobody
    await measure_bare(Row(BARE))
    for _ in range(rounds):
        await measure_bare(bare)
        for row in rows:
            await measure_level(row)
    for row in rows:
        await measure_memory(row)
    header = ("way", "start p50 ms", "start p99 ms", "end p50 ms", "PSS a program KiB", "")
    print(table(header, [row.cells() for row in (bare, *rows)]))
    failed = False
    for name in names:
        for said in (await run_together(name, together), await kill_in_a_row(name, kills)):
            failed = failed or "LEFT" in said
            print(f"{name}: {said}", flush=True)
    for level in levels:
        if level not in names:
            print(f"{level}: not permitted here: {permitted[level]}")
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m ops.bench.programs", description=__doc__)
    parser.add_argument("--rounds", type=int, default=200, help="starts of each kind (default: 200)")
    parser.add_argument("--together", type=int, default=100, help="programs at a time (default: 100)")
    parser.add_argument("--kills", type=int, default=1000, help="kills in a row (default: 1000)")
    parser.add_argument("--levels", nargs="+", default=list(LEVELS), choices=LEVELS, help="(default: all)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        # The user's other workers make directories too, and theirs are no leak of ours.
        before, tempfile.tempdir = tempfile.gettempdir(), directory
        try:
            return uvloop.run(run(args.rounds, args.together, args.kills, args.levels))
        finally:
            tempfile.tempdir = before


if __name__ == "__main__":
    sys.exit(main())
