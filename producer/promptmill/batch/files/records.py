"""An input as records: its lines, or the rows of a CSV, each with its number and its place in the file.

A file is read from its beginning to its end with bounded memory, however long a line is; single records are read again
by their place.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Self

from promptmill.errors import BadRequest

STDIN: Final = "-"
_BLOCK_BYTES: Final = 1 << 20
_BOM: Final = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Record:
    """One record, as it stands in the file, without its line end.

    ``number`` is that of its first line, from 1; ``offset`` and ``size`` are its place in bytes. ``row`` holds a CSV
    record's fields where they were read already. ``problem`` says why it cannot be read; ``raw`` is then only its
    beginning, or empty.
    """

    number: int
    offset: int
    size: int
    raw: bytes
    row: list[str] | None = None
    problem: BadRequest | None = None

    def text(self) -> str:
        """The record as text. Raises BadRequest where it is not UTF-8."""
        if self.problem is not None:
            raise self.problem
        try:
            return self.raw.decode()
        except UnicodeDecodeError as err:
            raise BadRequest(f"not UTF-8 (byte {err.start} of the line)") from None


class Input:
    """An open input. ``name`` is what the user called it; ``size`` and ``sha256`` are known after it was read once."""

    def __init__(self, file: BinaryIO, name: str, suffix: str) -> None:
        self.name = name
        self.suffix = suffix
        self.sha256: str | None = None
        self._file = file
        self._stamp = self._now()

    @classmethod
    @contextmanager
    def open(cls, path: str) -> Generator[Self]:
        """A file, or standard input, or another pipe; these are copied into a temporary file first.

        Raises BadRequest where it cannot be read.
        """
        try:
            # Not closed by the error that a body raises for itself: only what opening says is the input's fault.
            file = _opened(path)
        except OSError as err:
            raise BadRequest(f"{path}: cannot be read: {err.strerror}", field="input") from None
        with file:
            yield cls(file, "standard input" if path == STDIN else path, Path(path).suffix.lower())

    @property
    def size(self) -> int:
        """The size in bytes when it was opened."""
        return self._stamp[0]

    def digest(self) -> str:
        """The SHA-256 of all of it."""
        if self.sha256 is None:
            hashing = _Hashing(self._file.fileno())
            while hashing.read(_BLOCK_BYTES):
                continue
            self.sha256 = hashing.hexdigest()
        return self.sha256

    def check_unchanged(self) -> None:
        """Raise BadRequest where somebody wrote to the file since it was opened: places in it mean nothing then."""
        if self._now() != self._stamp:
            raise BadRequest(f"{self.name} was changed while it was read; run the command again", field="input")

    def _now(self) -> tuple[int, int]:
        about = os.fstat(self._file.fileno())
        return about.st_size, about.st_mtime_ns

    def lines(self, limit_bytes: int, *, blank: bool = False) -> Iterator[Record]:
        """Every line, blank ones only where asked; sets ``sha256`` at the end.

        A line beyond the limit is a record with a problem.
        """
        hashing = _Hashing(self._file.fileno())
        for line in _lines(io.BufferedReader(hashing, _BLOCK_BYTES), limit_bytes):
            if blank or (line.raw and not line.raw.isspace()):
                yield line
        self.sha256 = hashing.hexdigest()

    def rows(self, limit_bytes: int, delimiter: str) -> Iterator[Record]:
        """Every row of a CSV, its heading too, but no blank ones. Sets ``sha256`` at the end."""
        # A blank line may belong to a quoted field.
        return _rows(self.lines(limit_bytes, blank=True), limit_bytes, delimiter)

    def read(self, offset: int, size: int) -> bytes:
        """What stands at a place."""
        data = os.pread(self._file.fileno(), size, offset)
        if len(data) != size:
            self.check_unchanged()
        return data


def _opened(path: str) -> BinaryIO:
    if path == STDIN:
        return _spooled(sys.stdin.buffer)
    file = Path(path).open("rb")  # noqa: SIM115 - the caller closes it
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    with file:
        return _spooled(file)


def _spooled(source: BinaryIO) -> BinaryIO:
    spool = tempfile.TemporaryFile(prefix="promptmill-")  # noqa: SIM115 - the caller closes it
    try:
        shutil.copyfileobj(source, spool, _BLOCK_BYTES)
        spool.flush()
    except BaseException:
        spool.close()
        raise
    return spool


class _Hashing(io.RawIOBase):
    """A file read from its beginning, by its own position; what was read is hashed on the way."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._position = 0
        self._hash = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview, /) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        count = os.preadv(self._descriptor, [buffer], self._position)
        self._hash.update(buffer[:count])
        self._position += count
        return count

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _lines(file: io.BufferedReader, limit_bytes: int) -> Iterator[Record]:
    number = offset = 0
    # Two more, so that a line of just the limit is read with its line end.
    while raw := file.readline(limit_bytes + 2):
        number += 1
        start = offset
        offset += len(raw)
        if number == 1 and raw.startswith(_BOM):
            raw, start = raw[len(_BOM) :], start + len(_BOM)
        text = raw.rstrip(b"\r\n")
        if len(text) > limit_bytes:
            offset += 0 if raw.endswith(b"\n") else _skip_line(file)
            message = f"the line is longer than {limit_bytes} bytes"
            problem = BadRequest(message, code="too_large", field="line", limit=limit_bytes)
            yield Record(number, start, offset - start, text[:200], problem=problem)
        else:
            yield Record(number, start, len(text), text)


def _skip_line(file: io.BufferedReader) -> int:
    skipped = 0
    while part := file.readline(_BLOCK_BYTES):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


def _rows(lines: Iterator[Record], limit_bytes: int, delimiter: str) -> Iterator[Record]:
    csv.field_size_limit(limit_bytes)
    taken: list[Record] = []

    def texts() -> Iterator[str]:
        for line in lines:
            taken.append(line)
            # What is not UTF-8 is told of the row as a whole: the reader must go on to find where it ends.
            yield line.raw.decode(errors="surrogateescape") + "\n"

    reader = csv.reader(texts(), delimiter=delimiter, strict=True)
    while True:
        taken.clear()
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as err:
            yield _row(taken, None, BadRequest(f"not CSV: {err}"))
        else:
            if row:
                yield _row(taken, row, next((line.problem for line in taken if line.problem), None))


def _row(lines: list[Record], row: list[str] | None, problem: BadRequest | None) -> Record:
    first, last = lines[0], lines[-1]
    raw = first.raw if len(lines) == 1 else b"\n".join(line.raw for line in lines)
    size = last.offset + last.size - first.offset
    if row is not None and problem is None and any(not _encodable(field) for field in row):
        problem = BadRequest("not UTF-8")
    return Record(first.number, first.offset, size, raw, row, problem)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_row(text: str, delimiter: str) -> list[str]:
    """The fields of a row that was read again by its place, as :meth:`Input.rows` gave them; it is not blank."""
    lines = [line.rstrip("\r") + "\n" for line in text.split("\n")]
    return next(csv.reader(lines, delimiter=delimiter, strict=True))


def delimiter_of(heading: str) -> str:
    """The delimiter of a CSV: of comma, semicolon and tab the one that its heading has most often."""
    return max(",;\t", key=heading.count)
