"""A provider simulator: OpenAI-compatible, Anthropic Messages and Gemini over real HTTP, faults included.

In process: `async with Simulator() as sim`, then `sim.url`, `sim.plan(...)`, `sim.requests`, `sim.stats()`. From
synchronous code: `with running_simulator() as sim`. As a process: `python -m tests.support.simulator`, or
`with spawned_simulator() as sim`. Scripts without state go into the model name: `sim:tokens=100,rate=50,fault=cut`.
A refused connection: `with refusing_url() as url`. One that never opens: `with unanswering_url() as url`.
"""

from tests.support.simulator.records import RequestRecord
from tests.support.simulator.runner import (
    SimulatorHandle,
    SpawnedSimulator,
    refusing_url,
    running_simulator,
    spawned_simulator,
    unanswering_url,
)
from tests.support.simulator.script import FAULTS, NASTY_PIECES, Plan, PlanError, well_formed
from tests.support.simulator.server import Simulator

__all__ = [
    "FAULTS",
    "NASTY_PIECES",
    "Plan",
    "PlanError",
    "RequestRecord",
    "Simulator",
    "SimulatorHandle",
    "SpawnedSimulator",
    "refusing_url",
    "running_simulator",
    "spawned_simulator",
    "unanswering_url",
    "well_formed",
]
