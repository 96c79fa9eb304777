"""One target under atheris, which follows the branches that the code takes. Ends the process that it runs in."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ops.fuzz.coverage_input import MOST_CUTS, split

try:
    import atheris
except ImportError:
    sys.exit("atheris is not installed: uv run --group fuzz python -m ops.fuzz …")

WORDS = (
    "data: ",
    "event: ",
    "id: ",
    "retry: ",
    "\\x0d\\x0a",
    "\\x0a\\x0a",
    "\\xe2\\x80\\xa8",
    "\\xef\\xbb\\xbf",
    "[DONE]",
    '\\"choices\\":[{',
    '\\"delta\\":{',
    '\\"content\\":',
    '\\"type\\":',
    '\\"usage\\":{',
    '\\"error\\":{',
    "\\\\ud83d",
    "\\\\ude00",
    "null",
    "true",
    "1e999",
)


def run(target: str, seconds: int, seed: int, directory: Path) -> None:
    """Fuzz for so long; a crash's input and all new inputs go to ``directory``. Never returns."""
    with atheris.instrument_imports(include=["promptmill_workers", "promptmill_relay", "promptmill.text"]):
        from ops.fuzz.framers import SEEDS, TARGETS  # noqa: PLC0415 - imported while it is instrumented
    corpus = directory / target
    corpus.mkdir(parents=True, exist_ok=True)
    for number, sample in enumerate(SEEDS[target]):
        (corpus / f"seed-{number}").write_bytes(sample + bytes(MOST_CUTS * 2))
    words = directory / f"{target}.dict"
    words.write_text("".join(f'"{word}"\n' for word in WORDS))
    check = TARGETS[target]

    def once(data: bytes) -> None:
        check(*split(data))

    arguments: list[Any] = [f"-max_total_time={seconds}", f"-seed={seed}", f"-dict={words}", "-max_len=4096"]
    atheris.Setup([sys.argv[0], *arguments, f"-artifact_prefix={directory}/", str(corpus)], once)
    atheris.Fuzz()
