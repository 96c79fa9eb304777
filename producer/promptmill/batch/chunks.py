"""Lines as they are packed in the store: a chunk is a compressed JSON list; similar requests shrink each other."""

from __future__ import annotations

import hashlib
import zlib
from base64 import urlsafe_b64encode
from collections.abc import Sequence
from typing import Final

import orjson

from promptmill.batch.models import BatchLine
from promptmill.errors import BadRequest

CHUNK_MAX_BYTES: Final = 128 * 1024 * 1024
"""Of a chunk before it is packed: the store holds everybody up while it takes one value."""
_LEVEL: Final = 4
_ID_LENGTH: Final = 22


def pack(lines: Sequence[BatchLine]) -> bytes:
    """A chunk. Raises ``too_large`` where the store should not take it in one piece."""
    raw = orjson.dumps([line.to_dict() for line in lines])
    if len(raw) > CHUNK_MAX_BYTES:
        raise BadRequest(
            f"{len(lines)} lines of together {len(raw)} bytes are too much for one chunk: "
            "make the batch with a smaller chunk_lines",
            code="too_large",
            field="chunk_lines",
            limit=CHUNK_MAX_BYTES,
        )
    return zlib.compress(raw, _LEVEL)


def unpack(data: bytes) -> list[BatchLine]:
    """The lines of a chunk."""
    return [BatchLine.from_dict(line) for line in orjson.loads(zlib.decompress(data))]


def line_job_id(secret: str, index: int) -> str:
    """The id of a line's job, the same each time: whoever feeds a line again submits the same job.

    Begins with a letter or digit, as all job ids do; nobody who lacks the secret can tell it.
    """
    salt = 0
    while True:
        digest = hashlib.sha256(f"{secret}:{index}:{salt}".encode()).digest()
        job_id = urlsafe_b64encode(digest)[:_ID_LENGTH].decode()
        if job_id[0].isalnum():
            return job_id
        salt += 1
