"""What a provider says of its own limits, in the headers of an answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Counted = Literal["requests", "tokens"]


@dataclass(frozen=True, slots=True)
class RateWindow:
    """One limit: how much it allows in all, how much is left, and in how many seconds it is whole again."""

    limit: int | None = None
    remaining: int | None = None
    reset_s: float | None = None


@dataclass(frozen=True, slots=True)
class RateInfo:
    """The provider's limits as an answer told them; None for what it did not name.

    Comes before the first token, with failures too. Limits are shown and not acted on: headers do not say over which
    time they hold. What is acted on is that nothing remains; see :meth:`used_up`.
    """

    requests: RateWindow | None = None
    tokens: RateWindow | None = None
    input_tokens: RateWindow | None = None
    output_tokens: RateWindow | None = None

    def used_up(self) -> tuple[Counted, float] | None:
        """What has run out and for how many seconds, the longest first; None where something of everything is left."""
        windows: tuple[tuple[Counted, RateWindow | None], ...] = (
            ("requests", self.requests),
            ("tokens", self.tokens),
            ("tokens", self.input_tokens),
            ("tokens", self.output_tokens),
        )
        longest: tuple[Counted, float] | None = None
        for what, window in windows:
            if window is not None and window.remaining == 0 and window.reset_s:
                longest = max(longest or (what, 0.0), (what, window.reset_s), key=lambda item: item[1])
        return longest
