"""A `promptmill up` for each test that wants one, started with the arguments that it wants."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Protocol

import pytest

from tests.support.up import Up

CONFIG = """
[models.slow]
type = "echo"
options = { text = "one two three ", repeat = 200, tokens_per_s = 20 }
[models.paced]
type = "echo"
options = { text = "één twee drie ", repeat = 10, tokens_per_s = 30 }
[models.broken]
type = "echo"
options = { fault = "refused" }
[roles.chat]
primary = "paced"
"""


class StartUp(Protocol):
    def __call__(
        self, *arguments: str, prefix: tuple[str, ...] = (), config: str = CONFIG, ready: bool = True, **variables: str
    ) -> Up: ...


@pytest.fixture
def start_up(tmp_path: Path) -> Generator[StartUp]:
    started: list[Up] = []

    def start(
        *arguments: str, prefix: tuple[str, ...] = (), config: str = CONFIG, ready: bool = True, **variables: str
    ) -> Up:
        (tmp_path / "promptmill.toml").write_text(config)
        up = Up(tmp_path, arguments, prefix, variables)
        started.append(up)
        return up.wait_ready() if ready else up

    yield start
    for up in started:
        up.close()


@pytest.fixture(scope="module")
def shared_up(tmp_path_factory: pytest.TempPathFactory) -> Generator[Up]:
    """One for the tests of a module that leave it as it is."""
    home = tmp_path_factory.mktemp("up")
    (home / "promptmill.toml").write_text(CONFIG)
    up = Up(home)
    try:
        yield up.wait_ready()
    finally:
        up.close()
