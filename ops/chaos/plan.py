"""What a run is going to do, drawn from its seed before anything starts. Nothing here touches the outside."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from ops.chaos.options import Options

HOW_READ: Final = ("relay", "gateway", "library")
CUTS: Final = ("cut", "torn", "mute", "stall", "slow", "refuse")
"""Ways in which a network fails; see :mod:`ops.chaos.proxy`."""

MODELS: Final = {
    "quick": ("local_openai", "sim:echo=1,rate=60"),
    "steady": ("local_openai", "sim:echo=1,rate=30"),
    "gemini": ("gemini_api", "sim:echo=1,rate=40,first=0.2"),
    "broken": ("local_openai", "sim:echo=1,rate=60,fault=cut,after=6"),
}
"""Name, type and the simulator's script. Each answers with the prompt, word by word: a text that no other job has.

None needs a provider's own library, which takes longer to load than the rest of a worker to start.
"""
ROLES: Final = {"shaky": ("broken", "steady"), "safe": ("quick", "steady")}
_ASKED: Final = ("quick",) * 4 + ("steady",) * 4 + ("gemini",) * 3 + ("safe",) * 2 + ("shaky",)
_WORDS: Final = ("alpha ", "naïve ", "日本語 ", "line\u2028sep ", "nel\u0085 ", "data: x\n\n", "👩‍🚀 ", "omega ")
_WORDS_OF: Final = {"quick": (25, 120), "steady": (15, 75), "gemini": (15, 80), "safe": (25, 90), "shaky": (15, 60)}
_EDGE: Final = 0.05
"""The first and the last part of a run without faults, so that each of them meets jobs."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One reader: when it comes, and behind how many events each time it leaves, to come back ``away_s`` later."""

    how: str
    joins_s: float
    leaves_after: tuple[int, ...] = ()
    away_s: float = 0.0
    late: bool = False
    """It comes when the job is long over, and its log may be deleted."""


@dataclass(frozen=True, slots=True)
class PlannedJob:
    """One job: when it is submitted, by which way, and who reads it."""

    number: int
    at_s: float
    prompt: str
    asked: str
    priority: str
    via: str
    readings: tuple[Reading, ...]
    cancel_after_s: float | None = None
    message: str = "sent"
    """``lost``: its message never reaches the broker; ``doubled``: it does twice."""

    @property
    def key(self) -> str:
        """Its idempotency key."""
        return f"chaos-{self.number}"


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. ``target`` chooses among what can be hit at that moment, whatever its number."""

    at_s: float
    kind: str
    target: int = 0
    lasts_s: float = 0.0


def draw_jobs(options: Options) -> list[PlannedJob]:
    """The jobs, in the order of submission: in bursts, because a queue that is always empty loses nothing."""
    chance = random.Random(f"jobs {options.seed}")
    times = sorted(_bursts(options, chance))
    numbers = range(options.jobs)
    by_library = [n for n in numbers if n % 4]
    # Early ones, because what a cancelled attempt used may be booked half a minute later.
    cancelled = set(chance.sample(numbers[: options.jobs // 2 + 1], min(options.cancels, options.jobs // 2)))
    hinted = chance.sample(by_library, min(options.lost_messages + options.doubled_messages, len(by_library)))
    lost, doubled = set(hinted[: options.lost_messages]), set(hinted[options.lost_messages :])
    jobs: list[PlannedJob] = []
    for number, at_s in enumerate(times):
        asked = chance.choice(_ASKED)
        words = chance.randint(*_WORDS_OF[asked])
        prompt = f"chaos-{number}- " + "".join(f"w{i}" + chance.choice(_WORDS) for i in range(words))
        readings = tuple(_reading(chance) for _ in range(options.readers_per_job))
        after = chance.uniform(0, 2.5) if number in cancelled else None
        priority = "batch" if chance.random() < 0.25 else "interactive"
        message = "lost" if number in lost else "doubled" if number in doubled else "sent"
        via = "library" if number % 4 else "gateway"
        jobs.append(PlannedJob(number, at_s, prompt, asked, priority, via, readings, after, message))
    return jobs


def _bursts(options: Options, chance: random.Random) -> Iterator[float]:
    left = options.jobs
    while left:
        size = min(left, chance.choice((1, 1, 2, 4, 8, 16)))
        begin = chance.uniform(0, options.seconds)
        yield from (min(begin + i * 0.01, options.seconds) for i in range(size))
        left -= size


def _reading(chance: random.Random) -> Reading:
    leaves = tuple(chance.randint(1, 25) for _ in range(chance.choice((0, 0, 1, 2))))
    joins_s = chance.choice((0.0, 0.0, chance.uniform(0, 1), chance.uniform(0, 4)))
    return Reading(chance.choice(HOW_READ), joins_s, leaves, chance.uniform(0, 1.0))


def draw_faults(options: Options) -> list[Fault]:
    """The faults, in the order of time. Kills come regularly, everything else at any moment."""
    chance = random.Random(f"faults {options.seed}")
    begin, end = options.seconds * _EDGE, options.seconds * (1 - _EDGE)

    def some(count: int, kind: str, lasts: tuple[float, float] = (0, 0)) -> list[Fault]:
        return [
            Fault(chance.uniform(begin, end), kind, chance.randrange(1 << 16), chance.uniform(*lasts))
            for _ in range(count)
        ]

    faults: list[Fault] = []
    at_s = begin
    while options.kill_every_s and at_s <= end:
        faults.append(Fault(at_s, "kill", chance.randrange(1 << 16)))
        at_s += options.kill_every_s * chance.uniform(0.8, 1.2)
    dead = options.dead_after_s
    faults += some(options.freezes, "freeze", (dead + 1, dead + 3))
    faults += some(options.store_restarts, "store_restart", (0, 1))
    faults += some(options.store_kills, "store_kill", (0, 1))
    # Not at the end: jobs are to be submitted after it, too.
    last_s = max(begin, end - options.store_outage_s)
    for _ in range(options.store_outages):
        faults.append(Fault(chance.uniform(begin, last_s), "store_outage", 0, options.store_outage_s))
    faults += some(options.broker_kills, "broker_kill", (0, 3))
    for part in ("relay", "gateway"):
        faults += some(getattr(options, f"{part}_restarts"), f"{part}_restart")
        faults += some(getattr(options, f"{part}_kills"), f"{part}_kill")
    for _ in range(options.cuts):
        faults += some(1, chance.choice(CUTS), (0.2, 3))
    faults += some(options.doubled_messages, "double")
    return sorted(faults, key=lambda fault: fault.at_s)
