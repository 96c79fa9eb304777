"""Tests of one ``xdist_group`` run in one process, one after the other.

With ``--dist loadgroup`` pytest-xdist writes the group behind the test's id, into a field that pytest 9.2 does not read
any more: groups are then spread like all other tests, and nothing says so. This writes it where it is read.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest


def mark_groups(config: pytest.Config, items: Iterable[pytest.Item]) -> None:
    """Put each test's group behind its id, where pytest-xdist looks for it and did not put it itself."""
    if not config.getoption("loadgroup", False):  # set in xdist's workers
        return
    for item in items:
        groups = sorted({str(mark.args[0]) for mark in item.iter_markers("xdist_group")})
        suffix = f"@{'_'.join(groups)}"
        if groups and not item.nodeid.endswith(suffix):
            item._id = type(item.id).parse(item.nodeid + suffix)  # pyright: ignore[reportPrivateUsage]
