"""The two files that a batch leaves, results and failures: whole lines only, on the disk before they count.

A process that is killed leaves at most one torn line at the end of each. It is cut off by whoever opens the files next,
and fetched again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import orjson

from promptmill.batch.files.hashes import HashTable, hash_of_id
from promptmill.errors import BadRequest, PromptmillError

_BLOCK_BYTES: Final = 1 << 20
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NO_LOCKS: Final = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL})


@contextmanager
def writing(path: Path) -> Generator[None]:
    """Turns what the file system says into one error: ``cannot_write``, with the file and the reason."""
    try:
        yield
    except OSError as err:
        advice = "; make room and run the same command again" if err.errno in _NO_ROOM else ""
        raise PromptmillError(f"{path} cannot be written: {err.strerror}{advice}", code="cannot_write") from err


def sync_directory(path: Path) -> None:
    """Make a file's name as durable as its content."""
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(path: Path, data: bytes) -> None:
    """Put ``data`` in the place of a file, at once and durably. Raises ``cannot_write``."""
    temporary = path.with_name(f"{path.name}.tmp")
    with writing(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_directory(path)
        except BaseException:
            with contextlib.suppress(OSError):  # the first failure is the one to tell
                temporary.unlink()
            raise


def lock(file: BinaryIO, path: Path) -> None:
    """Hold a file until it is closed. Raises BadRequest where another process does."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadRequest(f"another command is writing {path}; wait for its end, or stop it", field="output") from None
    except OSError as err:
        # A file system without locks: two commands at once are then the user's own affair.
        if err.errno not in _NO_LOCKS:
            raise


class LineFile:
    """A file of lines that is only ever appended to. It is made with the first line, or by :meth:`open`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._file: BinaryIO | None = None
        self._waiting: list[bytes] = []

    @property
    def waiting(self) -> int:
        """How many lines are not written yet."""
        return len(self._waiting)

    def add(self, line: bytes) -> None:
        """A line, without its end, for the next :meth:`flush`."""
        self._waiting.append(line)

    def open(self) -> BinaryIO:
        """Open it, made where it is not, and hold it.

        Raises ``cannot_write``, and BadRequest where another process holds it.
        """
        if self._file is not None:
            return self._file
        with writing(self.path):
            file = self._held()
            while not os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                file.close()  # it was replaced by whoever held it before
                file = self._held()
            self._file = file
            self.size = os.fstat(file.fileno()).st_size
            sync_directory(self.path)
        return file

    def _held(self) -> BinaryIO:
        file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b", 0)
        try:
            lock(file, self.path)
        except BaseException:
            file.close()
            raise
        return file

    def empty(self) -> None:
        """Throw away what the file holds. Raises as :meth:`open` does."""
        file = self.open()
        with writing(self.path):
            file.truncate(0)
            os.fsync(file.fileno())
        self.size = 0

    def close(self) -> None:
        """Let it go. What was not flushed is not written."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def flush(self) -> None:
        """Write what waits and see it on the disk. Raises ``cannot_write``; the file is then as it was before."""
        if not self._waiting:
            return
        file = self.open()
        left = memoryview(b"".join([line + b"\n" for line in self._waiting]))
        end = self.size + len(left)
        with writing(self.path):
            try:
                file.seek(self.size)
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except BaseException:
                with contextlib.suppress(OSError):  # then the torn line is cut off at the next start
                    file.truncate(self.size)
                raise
        self.size = end
        self._waiting.clear()

    def repair(self, id_in: Callable[[bytes], str | None]) -> Iterator[tuple[str, int]]:
        """Give the id of every line and its place, and cut off a torn end.

        Raises BadRequest for a line that is neither torn nor has an id: it is not one of ours.
        """
        file = self.open()
        for number, offset, line in read_lines(file):
            line_id = id_in(line)
            if line_id is not None and line.endswith(b"\n"):
                yield line_id, offset
                continue
            # A machine that lost its power may leave zeros; whole lines behind them are fetched again.
            if b"\0" not in line and (line.endswith(b"\n") or not line.startswith(b"{")):
                message = (
                    f"{self.path}, line {number}, is not a line of this batch; choose another file, or --overwrite"
                )
                raise BadRequest(message, field="output")
            with writing(self.path):
                file.truncate(offset)
                os.fsync(file.fileno())
            self.size = offset
            return


def read_lines(file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """Number, place and bytes of every line, with its end."""
    offset = 0
    with os.fdopen(os.dup(file.fileno()), "rb", _BLOCK_BYTES) as buffered:
        buffered.seek(0)
        for number, line in enumerate(buffered, 1):
            yield number, offset, line
            offset += len(line)


def id_in(line: bytes, key: str) -> str | None:
    """The id in a line of results; None where it has none."""
    found = _fields(line).get(key)
    return found if isinstance(found, str) else None


def skipped_id(number: int) -> str:
    """What we call a line that was left out, which has no id of its own: nothing that a caller may use as an id."""
    return f"\udcff{number}"


def _failure_id(line: bytes) -> str | None:
    fields = _fields(line)
    found, number = fields.get("id"), fields.get("line")
    if found is None and "id" in fields and isinstance(number, int):
        return skipped_id(number)
    return found if isinstance(found, str) else None


def _fields(line: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        return {}
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


class OutputFiles:
    """Results and failures of one batch. ``written`` holds the ids of all lines that stand in one of them."""

    def __init__(self, results: Path, failures: Path, id_key: str) -> None:
        self.results = LineFile(results)
        self.failures = LineFile(failures)
        self.written = HashTable()
        self.succeeded = 0
        self.failed = 0
        self._id_key = id_key

    def open(self) -> None:
        """Open both, repair them, and learn what they have. Raises ``cannot_write`` and BadRequest."""
        for line_id, _ in self.results.repair(lambda line: id_in(line, self._id_key)):
            self.succeeded += self._note(line_id)
        if self.failures.path.exists():
            for line_id, _ in self.failures.repair(_failure_id):
                self.failed += self._note(line_id)

    def _note(self, line_id: str) -> bool:
        return self.written.add(hash_of_id(line_id), 0) is None

    def add_result(self, line_id: str, data: object) -> None:
        """An answer; one for a line that has its answer already is left out."""
        if self._note(line_id):
            self.results.add(orjson.dumps(data))
            self.succeeded += 1

    def add_failure(self, line_id: str, data: object) -> None:
        """A failure; likewise."""
        if self._note(line_id):
            self.failures.add(orjson.dumps(data))
            self.failed += 1

    def has(self, line_id: str) -> bool:
        """Whether a line stands in one of the files, or is about to."""
        return hash_of_id(line_id) in self.written

    @property
    def waiting(self) -> int:
        """How many lines are not written yet."""
        return self.results.waiting + self.failures.waiting

    def flush(self) -> None:
        """Write what waits, and see it on the disk. Raises ``cannot_write``."""
        self.results.flush()
        self.failures.flush()

    def close(self) -> None:
        """Let both go."""
        self.results.close()
        self.failures.close()
