"""CPU and memory of processes and of the machine, read from /proc (Linux)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PROC = Path("/proc")


@dataclass(frozen=True, kw_only=True)
class MachineCpu:
    """Seconds since boot, summed over all cores: working, taken by the host's other guests, and in all."""

    busy_s: float
    steal_s: float
    total_s: float


def machine_cpu() -> MachineCpu:
    """Return the machine's CPU time from /proc/stat."""
    fields = [int(field) for field in (PROC / "stat").read_text().splitlines()[0].split()[1:9]]
    user, nice, system, idle, iowait, irq, softirq, steal = fields
    busy = user + nice + system + irq + softirq
    total = busy + idle + iowait + steal
    return MachineCpu(busy_s=busy / TICKS_PER_S, steal_s=steal / TICKS_PER_S, total_s=total / TICKS_PER_S)


def parse_stat(text: str) -> tuple[int, float]:
    """Return (parent's pid, CPU seconds with reaped children) from the text of /proc/PID/stat.

    The command's name stands in parentheses and may itself hold spaces and parentheses: count fields after the last.
    """
    fields = text[text.rindex(")") + 2 :].split()
    ticks = sum(int(field) for field in fields[11:15])  # utime, stime, cutime, cstime
    return int(fields[1]), ticks / TICKS_PER_S


def _all_stats() -> dict[int, tuple[int, float]]:
    stats: dict[int, tuple[int, float]] = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            try:
                stats[int(entry.name)] = parse_stat((entry / "stat").read_text())
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended while we were listing
    return stats


def owners(parents: Mapping[int, int], roots: Mapping[str, Iterable[int]]) -> dict[int, str]:
    """Say which role each process belongs to: that of its nearest ancestor (or itself) among the roots.

    A process that is a root of two roles belongs to the first.
    """
    role_of_root: dict[int, str] = {}
    for role, pids in roots.items():
        for pid in pids:
            role_of_root.setdefault(pid, role)
    found: dict[int, str] = {}
    for pid in parents:
        current = pid
        while current not in role_of_root and parents.get(current, 0) > 0:
            current = parents[current]
        if current in role_of_root:
            found[pid] = role_of_root[current]
    return found


def cpu_seconds(roots: Mapping[str, Iterable[int]]) -> dict[str, float]:
    """Return CPU seconds a role so far: its root processes, their living descendants and those already reaped.

    A descendant that is a root of another role is counted there. Resolution: one clock tick (10 ms) a process.
    """
    stats = _all_stats()
    result = dict.fromkeys(roots, 0.0)
    for pid, role in owners({pid: parent for pid, (parent, _) in stats.items()}, roots).items():
        result[role] += stats[pid][1]
    return result


def _field_bytes(path: Path, name: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0  # it ended while we were listing
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


def memory(roots: Mapping[str, Iterable[int]], role: str) -> tuple[int, int]:
    """Return (highest RSS since each process started, PSS now) in bytes, summed over the role's living processes.

    The peak is the kernel's own (VmHWM): nothing has to be sampled, so nothing disturbs the run.
    """
    parents = {pid: parent for pid, (parent, _) in _all_stats().items()}
    pids = [pid for pid, owner in owners(parents, roots).items() if owner == role]
    peak = sum(_field_bytes(PROC / str(pid) / "status", "VmHWM:") for pid in pids)
    return peak, sum(_field_bytes(PROC / str(pid) / "smaps_rollup", "Pss:") for pid in pids)
