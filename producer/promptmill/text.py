"""Text that can always be written: no lone surrogates.

JSON may escape half of a surrogate pair (``"\\ud83d"``), and Python keeps such a string. It cannot be encoded as
UTF-8, so one such token would make every later write of its job fail.
"""

from __future__ import annotations

_HIGH_FIRST, _HIGH_LAST = "\ud800", "\udbff"


def clean_text(text: str) -> str:
    """``text`` with surrogate halves that belong together joined and lone ones replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


class SurrogateJoiner:
    """Cleans a stream of pieces: a pair that was cut between two pieces is joined again.

    ``push`` returns what can be written now and holds a trailing high half back; ``flush`` returns what is left.
    """

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held = ""

    def push(self, piece: str) -> str:
        """The cleaned text that ``piece`` completes; may be empty."""
        if self._held:
            piece, self._held = self._held + piece, ""
        if piece and _HIGH_FIRST <= piece[-1] <= _HIGH_LAST:
            piece, self._held = piece[:-1], piece[-1]
        return clean_text(piece)

    def flush(self) -> str:
        """What was held back, as U+FFFD, or nothing."""
        held, self._held = self._held, ""
        return clean_text(held)
