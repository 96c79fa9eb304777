"""``python -m ops.chaos``: one run, from its seed to its verdict."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

import orjson
import uvloop
from ops.chaos.checks import Violation, check
from ops.chaos.collect import adopt_orphans, ask_provider, ask_store, look_around, quiet
from ops.chaos.facts import Remains, read_facts
from ops.chaos.faults import Faults
from ops.chaos.figures import figures, shown
from ops.chaos.ledger import Ledger, read_ledger
from ops.chaos.load import Load, producers
from ops.chaos.options import Command, Options, read_arguments
from ops.chaos.plan import HOW_READ, Reading, draw_faults, draw_jobs
from ops.chaos.system import running_system
from tests.support.store import keys_without_ttl

logger = logging.getLogger(__name__)

EXIT_HELD: Final = 0
EXIT_VIOLATED: Final = 1
EXIT_BROKEN: Final = 2
"""The run itself did not work: it says nothing about the system."""
LEDGER: Final = "ledger.jsonl"
_SHOWN_MAX: Final = 40
_LATE_READERS: Final = 12
_LATE_S: Final = 60.0


async def experiment(options: Options, directory: Path) -> None:
    """Run it; everything that is known at its end is in the ledger then."""
    chance = random.Random(f"system {options.seed}")
    remains = Remains()
    with Ledger(directory / LEDGER) as ledger:
        async with running_system(options, directory, ledger, chance) as system:
            async with producers(system) as made:
                load = Load(system, made, ledger)
                faults = Faults(system, load, ledger)
                async with asyncio.TaskGroup() as group:
                    group.create_task(load.run(draw_jobs(options)))
                    group.create_task(faults.run(draw_faults(options)))
                logger.info("all jobs are over, or were given up")
                await _read_late(load, chance)
                remains.waiting = await quiet(system)
                logger.info("the books are closed")
                await ask_store(system, load.submitted, ledger)
            for part in system.ours:
                await part.stop()
            # Behind the end of all who could write one more.
            remains.keys_without_ttl = await asyncio.to_thread(keys_without_ttl, system.store.url)
            ledger.write("found", what="provider", value=asdict(await ask_provider(system)))
        look_around(system, remains)
        ledger.write("found", what="remains", value=asdict(remains))
        ledger.write("found", what="pickup_p99_max_s", value=options.pickup_p99_max_s)


async def _read_late(load: Load, chance: random.Random) -> None:
    """Some readers come when all is over; the first jobs' logs are deleted by then in a run of more than a minute."""
    for n, job_id in enumerate(load.submitted[:_LATE_READERS]):
        if job_id not in load.open:
            reading = Reading(chance.choice(HOW_READ), 0.0, late=True)
            with contextlib.suppress(TimeoutError):  # then it has no end, and a check says so
                async with asyncio.timeout(_LATE_S):
                    await load.reader(f"late.{n}", job_id, reading).run()


async def _until_told(options: Options, directory: Path) -> None:
    """The experiment; TERM ends it as Ctrl-C does, with all of its parts."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await experiment(options, directory)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, and answer the exit code: 0 only where every check held."""
    command = read_arguments(argv)
    directory = command.directory or Path(tempfile.mkdtemp(prefix="chaos-"))
    directory.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        filename=directory / "harness.log", level=logging.INFO, format="%(asctime)s %(name)s %(message)s"
    )
    adopt_orphans()
    for name in [name for name in os.environ if name.startswith("PROMPTMILL_")]:
        del os.environ[name]  # what the parts are to know stands in the run's own configuration
    print(command.shown, flush=True)
    began = time.monotonic()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_until_told(command.options, directory))
    except (KeyboardInterrupt, asyncio.CancelledError):
        print(f"interrupted; its files are in {directory}")
        return EXIT_BROKEN
    except Exception:  # noqa: BLE001 - whatever it was: where the files are must be said
        traceback.print_exc()
        print(f"the run itself failed; its files are in {directory}")
        return EXIT_BROKEN
    return _verdict(command, directory, time.monotonic() - began)


def _verdict(command: Command, directory: Path, wall_s: float) -> int:
    facts = read_facts(read_ledger(directory / LEDGER))
    found, numbers = check(facts), figures(facts, wall_s)
    used = resource.getrusage(resource.RUSAGE_SELF)
    # Readers and proxies are this process: where it has no time to run, nothing is as fast as it seems slow.
    numbers["harness CPU, s"] = round(used.ru_utime + used.ru_stime, 1)
    numbers["load average of the machine"] = round(os.getloadavg()[1], 1)
    print(shown(numbers))
    if command.json is not None:
        told = {"command": command.shown, "options": asdict(command.options), "figures": numbers}
        told |= {"violations": [asdict(v) for v in found]}
        command.json.write_bytes(orjson.dumps(told, option=orjson.OPT_INDENT_2))
    if found:
        _show(found, command, directory)
        return EXIT_VIOLATED
    if command.directory is None:
        shutil.rmtree(directory)
    print("every check held")
    return EXIT_HELD


def _show(found: list[Violation], command: Command, directory: Path) -> None:
    print(f"\nVIOLATED, {len(found)} times, with seed {command.options.seed}:")
    for violation in found[:_SHOWN_MAX]:
        print(f"  {violation}")
    if len(found) > _SHOWN_MAX:
        print(f"  and {len(found) - _SHOWN_MAX} more")
    print(f"its ledger and logs are in {directory}; run it again with\n  {command.shown}")
