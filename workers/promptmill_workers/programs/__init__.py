"""Running a program so that nothing of it outlives its job.

``async with open_sandbox(name) as box``, then ``async with box.run(command, …) as program``; see :mod:`.program`, and
:mod:`.levels` for what is promised.
"""

from promptmill_workers.programs.levels import LEVELS, best_level, configure, prepare, probe_all
from promptmill_workers.programs.program import Program, ProgramLimits, Sandbox, find_program, open_sandbox

__all__ = [
    "LEVELS",
    "Program",
    "ProgramLimits",
    "Sandbox",
    "best_level",
    "configure",
    "find_program",
    "open_sandbox",
    "prepare",
    "probe_all",
]
