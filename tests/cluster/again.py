"""Tests of another module once more, with the fixtures of the module that asks for them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import ModuleType
from typing import Any


def again(
    module: ModuleType, *, only: Collection[str] | None = None, without: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """A module's names: all of its tests, ``only`` some, or all ``without`` those that say nothing here, and why."""
    named = {*(only or ()), *(without or ())}
    missing = [name for name in named if not hasattr(module, name)]
    assert not missing, f"{module.__name__} has no {missing}"
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("__")
        and name not in (without or {})
        and (only is None or name in only or not name.startswith("test_"))
    }
