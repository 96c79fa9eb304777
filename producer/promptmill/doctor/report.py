"""What was looked at, and what was found."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["ok", "off", "fail"]
"""``off``: not installed, not configured or not running, and nothing that is configured needs it."""


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. ``group`` is installed, configured or reachable; ``advice`` says what to do, if anything."""

    group: str
    name: str
    status: Status
    found: str
    advice: str | None = None


@dataclass(slots=True)
class Report:
    """All findings, in the order in which they are shown. Holds no secret."""

    checks: list[Check] = field(default_factory=list[Check])

    @property
    def ok(self) -> bool:
        """True where nothing that is configured fails."""
        return all(check.status != "fail" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """``{"ok": …, "checks": [{"group", "name", "status", "found", "advice"}, …]}``."""
        return {"ok": self.ok, "checks": [asdict(check) for check in self.checks]}
