"""Groups of tests stay together: a version of pytest or pytest-xdist that spreads them fails here, and not by load."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.up import ENDED_S

ROOT = Path(__file__).resolve().parents[2]
CONFTEST = """
import pytest
from tests.support.distribution import mark_groups

@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    mark_groups(config, items)
"""
TESTS = """
import os, pytest

@pytest.mark.parametrize("group", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in "ab"])
@pytest.mark.parametrize("number", range(8))
def test_tells_its_process(group, number):
    with open("ran", "a") as ran:
        ran.write(f"{group} {os.getpid()}\\n")
"""


def test_a_group_of_tests_runs_in_one_process(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_groups.py").write_text(TESTS)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadgroup", "-p", "xdist"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=ENDED_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ran = (tmp_path / "ran").read_text().splitlines()
    assert len(ran) == 16
    assert len(set(ran)) == 2, "each group in one process, and the two in one or two"
