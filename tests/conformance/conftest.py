"""The public suite's bound on how soon a cancelled call returns, as wide as a busy machine needs it."""

from __future__ import annotations

import pytest

from promptmill_workers import testing
from tests.support.processes import PATIENCE_S


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testing, "PROMPT_S", PATIENCE_S)
