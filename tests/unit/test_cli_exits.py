"""Exit codes: every error has one, and a job's own error is never taken for ours."""

from __future__ import annotations

import pytest

from promptmill.cli import exits
from promptmill.errors import (
    BadRequest,
    ConfigError,
    JobCancelled,
    JobFailed,
    MissingExtra,
    NotFound,
    Overloaded,
    PromptmillError,
    StoreUnavailable,
    WaitTimeout,
)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BadRequest("x"), 2),
        (BadRequest("x", code="unknown_model"), 2),
        (Overloaded("x"), 2),
        (NotFound("x"), 3),
        (StoreUnavailable("x"), 5),
        (ConfigError("x"), 6),
        (MissingExtra("x"), 6),
        (PromptmillError("x", code="port_in_use"), 6),
        (PromptmillError("x", code="data_dir_in_use"), 6),
        (PromptmillError("x", code="part_died"), 7),
        (PromptmillError("x", code="not_ready"), 7),
        (WaitTimeout("x"), 8),
        (PromptmillError("x", code="internal"), 9),
        (JobFailed("x", job_id="j", code="not_found"), 1),
        (JobFailed("x", job_id="j", code="expired"), 1),
        (JobCancelled("x", job_id="j"), 4),
    ],
)
def test_an_error_has_its_exit_code(error: PromptmillError, code: int) -> None:
    assert exits.exit_code(error) == code


def test_the_documentation_names_every_exit_code() -> None:
    named = {name: value for name, value in vars(exits).items() if name.isupper() and isinstance(value, int)}
    assert exits.__doc__
    for name, value in named.items():
        assert f"{value:<6}{name}" in exits.__doc__
    assert len(set(named.values())) == len(named)
