"""What a run does: its options, and the presets that people and the tests use."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Final


@dataclass(frozen=True, kw_only=True)
class Options:
    """One run. The same options draw the same jobs and the same faults; what they hit depends on the machine."""

    seed: int = 1
    seconds: float = 30.0
    """How long jobs are submitted and faults happen."""
    jobs: int = 150
    workers: int = 2
    concurrency: int = 40
    """Jobs at once in one worker process."""
    readers_per_job: int = 2
    broker: str = "redis"
    kill_every_s: float = 0.0
    """A worker is killed with -9 that often; 0 is never."""
    freezes: int = 0
    """Workers stopped for longer than ``dead_after_s``, then continued."""
    store_restarts: int = 0
    store_kills: int = 0
    store_outages: int = 0
    """The store is killed, and stays away."""
    store_outage_s: float = 30.0
    broker_kills: int = 0
    """With ``--broker amqp`` only: on Redis the store is the broker."""
    relay_restarts: int = 0
    relay_kills: int = 0
    gateway_restarts: int = 0
    gateway_kills: int = 0
    cuts: int = 0
    """Network faults between one part and the store or the broker."""
    cancels: int = 0
    lost_messages: int = 0
    doubled_messages: int = 0
    heartbeat_s: float = 2.0
    dead_after_s: float = 10.0
    settle_s: float = 150.0
    """How long after the last submission all jobs must have ended, and all books be closed."""
    pickup_p99_max_s: float | None = None
    """How soon the jobs of a killed worker must run again; None: no bound, as on a machine shared with others."""


PRESETS: Final = {
    "short": Options(
        seconds=22,
        jobs=150,
        workers=2,
        kill_every_s=6,
        freezes=1,
        store_kills=1,
        relay_restarts=1,
        cuts=4,
        cancels=8,
        lost_messages=4,
        doubled_messages=6,
        heartbeat_s=0.5,
        # Shorter, a quarantine process that waits that long for the processor passes for one that its job stopped.
        dead_after_s=5,
    ),
    "acceptance": Options(
        seconds=180,
        jobs=2000,
        workers=4,
        kill_every_s=3,
        store_restarts=2,
        relay_restarts=1,
        pickup_p99_max_s=12,
    ),
    "outage": Options(
        seconds=90,
        jobs=600,
        workers=4,
        store_outages=1,
    ),
    "storm": Options(
        seconds=180,
        jobs=1200,
        workers=4,
        kill_every_s=6,
        freezes=4,
        store_restarts=2,
        store_kills=2,
        relay_restarts=2,
        relay_kills=2,
        gateway_restarts=1,
        gateway_kills=1,
        cuts=24,
        cancels=80,
        lost_messages=40,
        doubled_messages=60,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Command:
    """What the command line asks for."""

    preset: str
    options: Options
    json: Path | None = None
    directory: Path | None = None
    """Where the run keeps its files; None is a temporary one, removed after a run that held."""

    @property
    def shown(self) -> str:
        """A command that repeats the run."""
        base, given = asdict(PRESETS[self.preset]), asdict(self.options)
        words = [
            f"--{name.replace('_', '-')} {value}"
            for name, value in given.items()
            if value is not None and (value != base[name] or name == "seed")
        ]
        return " ".join([f"python -m ops.chaos --preset {self.preset}", *words])


def read_arguments(argv: Sequence[str] | None = None) -> Command:
    """The command line: a preset, and whatever is given beside it instead of the preset's own value."""
    parser = argparse.ArgumentParser(prog="python -m ops.chaos", description="Kill, freeze and cut; then count.")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="short")
    for field in fields(Options):
        if field.name == "broker":
            parser.add_argument("--broker", choices=("redis", "amqp"))
        else:
            # The annotations are strings here: "int", "float" or "float | None".
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=int if field.type == "int" else float)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--directory", type=Path, help="keep the run's files there")
    given = vars(parser.parse_args(argv))
    preset, json, directory = given.pop("preset"), given.pop("json"), given.pop("directory")
    options = replace(PRESETS[preset], **{name: value for name, value in given.items() if value is not None})
    if options.broker_kills and options.broker != "amqp":
        parser.error("--broker-kills needs --broker amqp: on Redis the store is the broker")
    return Command(preset=preset, options=options, json=json, directory=directory)
