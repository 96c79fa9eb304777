"""What a dashboard is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal


@dataclass(frozen=True)
class Panel:
    """One panel. ``asks`` are expressions and their legends; ``bad`` is from where on a figure is shown in red."""

    title: str
    description: str
    unit: str
    asks: tuple[tuple[str, str], ...]
    kind: Literal["timeseries", "stat", "table"] = "timeseries"
    width: int = 12
    height: int = 8
    stacked: bool = False
    bad: float | None = None


@dataclass(frozen=True)
class Page:
    """One dashboard, the file ``name``.json; ``variables`` are those of ``ops.grafana.make``."""

    name: str
    title: str
    description: str
    variables: tuple[str, ...]
    panels: tuple[Panel, ...]


def stat(title: str, description: str, unit: str, expr: str, bad: float | None = None) -> Panel:
    return Panel(title, description, unit, ((expr, ""),), kind="stat", width=3, height=4, bad=bad)


def quantiles(metric: str, by: str, matchers: str, *quantiles: float) -> tuple[tuple[str, str], ...]:
    """Quantiles of a histogram, by a label (none where it is empty)."""
    labels = f"{by}, le" if by else "le"
    inner = f"sum by ({labels}) (rate({metric}_bucket{{{matchers}}}[$__rate_interval]))"
    legend = f"{{{{{by}}}}} " if by else ""
    return tuple((f"histogram_quantile({q}, {inner})", f"{legend}p{q * 100:g}") for q in quantiles)


def rate(metric: str, by: str, matchers: str = "") -> tuple[tuple[str, str], ...]:
    """What a counter counts a second, by labels."""
    chosen = f"{{{matchers}}}" if matchers else ""
    legend = " ".join(f"{{{{{label}}}}}" for label in by.split(", "))
    return ((f"sum by ({by}) (rate({metric}{chosen}[$__rate_interval]))", legend),)


FAMILY: Final = 'family=~"$family"'
MODEL: Final = 'model=~"$model"'
INSTANCE: Final = 'instance=~"$instance"'
NOT_OURS: Final = 'code!~"refused|bad_request|context_too_long|unknown_model|unknown_role|budget_exceeded"'
