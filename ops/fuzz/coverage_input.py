"""How a fuzzer's one string of bytes says both what is read and where it is cut."""

from __future__ import annotations

from typing import Final

MOST_CUTS: Final = 6


def split(data: bytes) -> tuple[bytes, list[int]]:
    """The bytes to be read, and where to cut them: the last twelve of a fuzzer's input say that."""
    tail = data[-MOST_CUTS * 2 :] if len(data) > MOST_CUTS * 2 else b""
    return data[: len(data) - len(tail)], [int.from_bytes(tail[i : i + 2]) for i in range(0, len(tail), 2)]
