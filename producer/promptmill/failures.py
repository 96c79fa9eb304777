"""What is done about a failed attempt, by its error code: tried again here, given to the next model, or surfaced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class FailureClass:
    """``retry``: the same model may answer the next time. ``fall_back``: another model may answer.

    ``sick``: it says something of the model's health, and counts towards its cooldown.
    """

    name: str
    retry: bool
    fall_back: bool
    sick: bool


_CLASSES: Final = {
    # code: class, tried again here, given to the next model, says something of the model's health
    "refused": ("refused by content", False, True, False),
    "bad_request": ("bad request", False, False, False),
    "context_too_long": ("too long", False, True, False),
    "auth": ("auth", False, True, False),
    "auth_expired": ("auth", False, True, False),
    "rate_limited": ("rate limited", True, True, True),
    "overloaded": ("overloaded", True, True, True),
    "unreachable": ("unreachable", True, True, True),
    "timeout_connect": ("timeout", True, True, True),
    "timeout_first_token": ("timeout", False, True, True),
    "timeout_idle": ("timeout", False, True, True),
    "timeout_total": ("timeout", False, True, False),
    "cut": ("cut", False, True, False),
    "empty": ("empty", True, True, False),
    "malformed": ("malformed", False, True, False),
    "crashed": ("crashed", False, True, False),
}
CLASSES: Final[dict[str, FailureClass]] = {code: FailureClass(*row) for code, row in _CLASSES.items()}
_SURFACES: Final = FailureClass("surfaces", False, False, False)


def classify(code: str) -> FailureClass:
    """The class of an error code; one that no attempt ends with surfaces."""
    return CLASSES.get(code, _SURFACES)
