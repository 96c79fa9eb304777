"""Bytes into lines, without I/O."""

from __future__ import annotations


class LineTooLong(ValueError):
    """A line is longer than was allowed; nothing of it is kept."""


class LineFramer:
    """Lines split at ``\\n`` only, without it. Each byte is copied twice at most, however small the pieces are."""

    def __init__(self, line_bytes: int) -> None:
        self._line_bytes = line_bytes
        self._pieces: list[bytes] = []
        self._size = 0

    def push(self, chunk: bytes) -> list[bytes]:
        """The lines that ``chunk`` completes, in order.

        Raises
        ------
        LineTooLong
            A line, complete or not, is over ``line_bytes`` bytes. Lines before it in ``chunk`` are lost.
        """
        head, *lines = chunk.split(b"\n")
        self._keep(head)
        if not lines:
            return []
        lines.insert(0, self.flush())
        rest = lines.pop()
        if any(len(line) > self._line_bytes for line in lines):
            raise LineTooLong(f"a line of more than {self._line_bytes} bytes")
        self._keep(rest)
        return lines

    def flush(self) -> bytes:
        """What came after the last line end, which is then forgotten."""
        line = b"".join(self._pieces)
        self._pieces, self._size = [], 0
        return line

    def _keep(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size > self._line_bytes:
            self._pieces, self._size = [], 0
            raise LineTooLong(f"a line of more than {self._line_bytes} bytes")
        if piece:
            self._pieces.append(piece)
