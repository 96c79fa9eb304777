"""Numbers from samples: percentiles, medians over rounds, spread."""

from __future__ import annotations

import math
from collections.abc import Sequence


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile of ``ordered`` (ascending); NaN if it is empty.

    Raises ``ValueError`` for a percent outside 0 to 100.
    """
    if not 0 <= percent <= 100:
        raise ValueError(f"percent must lie between 0 and 100, not {percent}")
    if not ordered:
        return math.nan
    rank = max(1, math.ceil(percent / 100 * len(ordered)))
    return ordered[rank - 1]


def median(values: Sequence[float]) -> float:
    """Return the median without the NaN values; NaN if none is left."""
    ordered = sorted(value for value in values if not math.isnan(value))
    if not ordered:
        return math.nan
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def spread_percent(values: Sequence[float]) -> float:
    """Return (maximum - minimum) / median in percent: how far rounds lie apart. NaN below two values."""
    known = [value for value in values if not math.isnan(value)]
    middle = median(known)
    if len(known) < 2 or not middle:
        return math.nan
    return (max(known) - min(known)) / middle * 100
