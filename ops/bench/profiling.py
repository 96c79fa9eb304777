"""Where the time goes: py-spy records of the worker and the relay while a run is measured."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

SAMPLES_PER_S = 200
LONGEST_RUN_S = 600
PROFILED = ("worker", "relay")


class ProfilingError(RuntimeError):
    """py-spy is missing, or wrote no record."""


def py_spy_path() -> str:
    """Return the path of py-spy, beside this interpreter or on PATH; raises ``ProfilingError`` if there is none."""
    beside = Path(sys.executable).with_name("py-spy")
    found = str(beside) if beside.exists() else shutil.which("py-spy")
    if found is None:
        raise ProfilingError("py-spy is not installed: install the dependency group bench, or leave --profile out")
    return found


def hot_spots(collapsed: str, top: int = 25) -> str:
    """Return two tables from collapsed stacks (``a;b;c count`` a line): functions by own time and with callees."""
    own: Counter[str] = Counter()
    inclusive: Counter[str] = Counter()
    total = 0
    for line in collapsed.splitlines():
        stack, _, count = line.rpartition(" ")
        if not stack:
            continue
        frames = stack.split(";")
        total += int(count)
        own[frames[-1]] += int(count)
        for frame in set(frames):
            inclusive[frame] += int(count)
    lines = [f"{total} samples"]
    for title, counter in (("own time", own), ("with callees", inclusive)):
        lines += ["", title]
        lines += [f"{count / total * 100:5.1f} %  {frame}" for frame, count in counter.most_common(top)]
    return "\n".join(lines) + "\n"


@contextmanager
def recording(roots: Mapping[str, list[int]], name: str, directory: Path | None) -> Generator[list[int]]:
    """Record worker and relay while the block runs; yields the recorders' pids (none without a directory).

    Writes ``NAME-ROLE.collapsed`` (for flame graphs) and ``NAME-ROLE.txt`` (the hottest functions). A recorded run is
    slower: its figures are not for the table. Raises ``ProfilingError`` if py-spy is not installed or a record fails.
    """
    if directory is None or not roots:
        yield []
        return
    py_spy = py_spy_path()
    directory.mkdir(parents=True, exist_ok=True)
    recorders: dict[Path, subprocess.Popen[bytes]] = {}
    try:
        for role in (known for known in PROFILED if known in roots):
            output = directory / f"{name}-{role}.collapsed"
            options = ["--pid", str(roots[role][0]), "--format", "raw", "--rate", str(SAMPLES_PER_S), "--function"]
            options += ["--duration", str(LONGEST_RUN_S), "--output", str(output)]
            recorders[output] = subprocess.Popen(
                [py_spy, "record", *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        yield [recorder.pid for recorder in recorders.values()]
    finally:
        for recorder in recorders.values():
            recorder.send_signal(signal.SIGINT)  # py-spy writes what it has and ends
        for recorder in recorders.values():
            recorder.wait()
    for output in recorders:
        if not output.exists():
            raise ProfilingError(f"py-spy wrote no {output}: is it permitted to trace other processes?")
        output.with_suffix(".txt").write_text(hot_spots(output.read_text()))
