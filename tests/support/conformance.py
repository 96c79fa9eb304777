"""How a scenario of the public conformance suite is told to the echo backend and to the provider simulator."""

from __future__ import annotations

from promptmill_workers.testing import Scenario
from tests.support.simulator import Plan


def echo_options(scenario: Scenario) -> dict[str, object]:
    """The options of an echo backend that does as ``scenario`` says."""
    options: dict[str, object] = {"fault_after": scenario.after}
    if scenario.pieces is not None:
        options["text"] = "".join(scenario.pieces)
    if scenario.fault:
        options["fault"] = scenario.fault
    if scenario.times is not None:
        options["times"] = scenario.times
    return options


def simulator_plan(scenario: Scenario) -> Plan:
    """The answer of a provider that does as ``scenario`` says."""
    return Plan(
        chunks=scenario.pieces,
        echo=scenario.pieces is None,
        fault=scenario.fault,
        after=scenario.after if scenario.fault in {"cut", "stall"} else None,
        times=scenario.times,
    )
