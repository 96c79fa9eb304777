"""What pydantic found, in words for operators. Values are never told: one may be a secret."""

from __future__ import annotations

from pydantic import ValidationError


def findings(err: ValidationError) -> list[str]:
    """Each finding as ``key: reason``."""
    found: list[str] = []
    for item in err.errors(include_url=False, include_context=False, include_input=False):
        key = ".".join(str(part) for part in item["loc"])
        reason = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            reason = "no such setting"
        found.append(f"{key}: {reason}" if key else reason)
    return found


def in_one_line(err: ValidationError) -> str:
    """All findings, joined."""
    return "; ".join(findings(err))
