"""Files beside the prompt of ``promptmill run``."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from promptmill.cli.attachments import image_part, read_json
from promptmill.contract import parse_request
from promptmill.errors import BadRequest

PNG = b"\x89PNG\r\n\x1a\n" + b"rest"


@pytest.mark.parametrize(
    ("data", "media_type"),
    [
        (PNG, "image/png"),
        (b"\xff\xd8\xff\xe0..", "image/jpeg"),
        (b"GIF89a..", "image/gif"),
        (b"RIFF\x10\x00\x00\x00WEBPVP8 ", "image/webp"),
    ],
)
def test_a_picture_is_known_by_its_content_and_not_by_its_name(tmp_path: Path, data: bytes, media_type: str) -> None:
    file = tmp_path / "picture.txt"
    file.write_bytes(data)
    part = image_part(str(file), 1000)
    assert part == {"type": "image", "media_type": media_type, "data": base64.b64encode(data).decode()}
    parse_request({"messages": [{"role": "user", "content": [part]}]})


def test_an_address_is_passed_on() -> None:
    assert image_part("https://example.org/a.png", 1) == {"type": "image", "url": "https://example.org/a.png"}


def test_what_cannot_be_attached_names_the_file_and_the_reason(tmp_path: Path) -> None:
    (tmp_path / "a.bmp").write_bytes(b"BM......")
    (tmp_path / "big.png").write_bytes(PNG)
    for name, limit, code, reason in (
        ("a.bmp", 100, "bad_request", "neither PNG"),
        ("big.png", 4, "too_large", "more than 4 bytes"),
        ("none.png", 100, "bad_request", "No such file"),
    ):
        with pytest.raises(BadRequest, match=reason) as caught:
            image_part(str(tmp_path / name), limit)
        assert (caught.value.code, caught.value.field) == (code, "image")
        assert name in caught.value.message


def test_a_schema_that_is_no_json_names_the_option(tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text("{")
    with pytest.raises(BadRequest, match=r"--json-schema .*schema\.json: not JSON"):
        read_json(file, "--json-schema")
    file.write_text('{"type": "object"}')
    assert read_json(file, "--json-schema") == {"type": "object"}
