"""The levels at which programs can be kept together on this machine."""

from __future__ import annotations

import asyncio

import pytest

from promptmill_workers.programs import LEVELS, probe_all


@pytest.fixture(scope="session")
def permitted_levels() -> dict[str, str]:
    """``ok``, or why not, by level."""
    return asyncio.run(probe_all())


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, permitted_levels: dict[str, str]) -> str:
    """Each level that this machine permits."""
    if permitted_levels[request.param] != "ok":
        pytest.skip(f"{request.param}: {permitted_levels[request.param]}")
    return request.param
