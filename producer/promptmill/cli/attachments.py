"""What ``promptmill run`` reads from files beside the prompt."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any, Final

from promptmill.errors import BadRequest

_MAGIC: Final = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
)
_HEAD_BYTES: Final = 12


def image_part(where: str, limit_bytes: int) -> dict[str, Any]:
    """A picture's part of a message: by its address, or with the file's content.

    Raises
    ------
    BadRequest
        The file cannot be read, is larger than ``limit_bytes`` (``too_large``), or is none of PNG, JPEG, GIF and WebP.
    """
    if where.startswith(("http://", "https://")):
        return {"type": "image", "url": where}
    path = Path(where)
    try:
        with path.open("rb") as file:
            data = file.read(limit_bytes + 1)
    except OSError as err:
        raise BadRequest(f"--image {path}: {err.strerror}", field="image") from None
    if len(data) > limit_bytes:
        message = f"--image {path}: more than {limit_bytes} bytes"
        raise BadRequest(message, code="too_large", field="image", limit=limit_bytes)
    return {"type": "image", "media_type": _media_type(data, path), "data": base64.b64encode(data).decode()}


def _media_type(data: bytes, path: Path) -> str:
    # By content: what a file is called may be wrong, and providers refuse a picture of another type than was said.
    for magic, kind in _MAGIC:
        if data.startswith(magic):
            return kind
    if data[:4] == b"RIFF" and data[8:_HEAD_BYTES] == b"WEBP":
        return "image/webp"
    raise BadRequest(f"--image {path}: neither PNG nor JPEG, GIF or WebP", field="image")


def read_json(path: Path, option: str) -> Any:
    """A file's JSON. Raises BadRequest, naming the option, where it cannot be read or is none."""
    try:
        return json.loads(path.read_bytes())
    except OSError as err:
        raise BadRequest(f"{option} {path}: {err.strerror}", field="response_format") from None
    except ValueError as err:
        raise BadRequest(f"{option} {path}: not JSON: {err}", field="response_format") from None
