"""Results in the order of the input: one sorted copy is written beside the file and put in its place."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from typing import BinaryIO, Final

from promptmill.batch.files.hashes import HashTable, hash_of_id
from promptmill.batch.files.writing import LineFile, id_in, read_lines, sync_directory, writing

_BLOCK_BYTES: Final = 1 << 20


def put_in_order(results: LineFile, id_key: str, ids: Iterable[str]) -> None:
    """Sort the lines of a file by ``ids``, the order wanted; lines of other ids stay, behind them.

    In memory are 16 to 48 bytes a line. However it is interrupted, the file is either as it was or sorted. Raises
    ``cannot_write``.
    """
    places = HashTable()
    source = results.open()
    for _, offset, line in read_lines(source):
        line_id = id_in(line, id_key)
        if line_id is not None:
            places.add(hash_of_id(line_id), offset)
    temporary = results.path.with_name(f"{results.path.name}.tmp")
    with writing(results.path):
        try:
            with temporary.open("wb", _BLOCK_BYTES) as target:
                _copy(source, target, places, id_key, ids)
                target.flush()
                os.fsync(target.fileno())
            temporary.replace(results.path)
            sync_directory(results.path)
            results.close()
        except BaseException:
            with contextlib.suppress(OSError):  # the first failure is the one to tell
                temporary.unlink()
            raise


def _copy(source: BinaryIO, target: BinaryIO, places: HashTable, id_key: str, ids: Iterable[str]) -> None:
    wanted = HashTable()
    with os.fdopen(os.dup(source.fileno()), "rb") as reading:
        for line_id in ids:
            key = hash_of_id(line_id)
            offset = places.get(key)
            if offset is not None and wanted.add(key, 0) is None:
                reading.seek(offset)
                target.write(reading.readline())
        for _, _, line in read_lines(source):
            line_id = id_in(line, id_key)
            if line_id is None or hash_of_id(line_id) not in wanted:
                target.write(line)
