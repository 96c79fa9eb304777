"""Lines that are hard to write."""

from __future__ import annotations

import json
import logging

import pytest

from promptmill.logs import set_up_logs
from promptmill.settings import Settings


def test_a_line_with_what_is_no_utf_8_is_written_all_the_same(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else `logging` writes the call's arguments as they are, over many lines, in a log of JSON."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    level = root.level
    try:
        set_up_logs(Settings(log_format="json"), "worker")
        capsys.readouterr()
        logging.getLogger("promptmill").warning("no file %s", "a\udc80b", extra={"job_id": "abc"})
    finally:
        root.setLevel(level)
        logging.captureWarnings(capture=False)
    said = capsys.readouterr().err
    assert "Logging error" not in said
    (line,) = said.splitlines()
    event = json.loads(line)
    assert (event["event"], event["job_id"], event["process"]) == ("no file a\ufffdb", "abc", "worker")
