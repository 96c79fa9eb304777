"""The demo's batch: a file of twenty prompts, answered into another by what ``promptmill batch run`` is made of."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Final

from promptmill.batch.files.formats import FormatOptions
from promptmill.batch.files.records import Input
from promptmill.settings import Settings
from promptmill.up.signals import StopRequest

from . import exits
from .batch_options import BatchOptions
from .batch_outputs import Outputs
from .batch_progress import Silent
from .batch_run import BatchRun
from .output import out, printable, yes

COUNTRIES: Final = (
    *("Japan", "Kenya", "Peru", "Norway", "Egypt", "Cuba", "Greece", "Nepal", "Chad", "Italy"),
    *("Chile", "India", "Spain", "Ghana", "Iran", "Oman", "Laos", "Qatar", "Fiji", "Malta"),
)
_MAX_TOKENS: Final = 8
_SHOWN: Final = 3
_WIDTH: Final = 60


async def batch_tour(settings: Settings, directory: Path, stop: StopRequest, model: str) -> bool:
    """Answer the file, then run the same again, which asks nobody. True where each line has its one answer."""
    prompts, results = directory / "prompts.txt", directory / "results.jsonl"
    prompts.write_text("".join(f"What is the capital of {name}?\n" for name in COUNTRIES))
    options = f"--model {model} --max-tokens {_MAX_TOKENS} --temperature 0"
    out(f"6. promptmill batch run prompts.txt -o results.jsonl --ordered {options}")
    began = time.monotonic()
    code = await _run(settings, prompts, results, stop, model)
    all_s = time.monotonic() - began
    answers = _lines(results)
    for answer in answers[:_SHOWN]:
        text = " ".join(printable(str(answer["text"])).split())
        out(f"   line {answer['id']}: {text if len(text) <= _WIDTH else text[:_WIDTH] + ' …'}")
    whole = [answer["id"] for answer in answers] == [str(n + 1) for n in range(len(COUNTRIES))]
    good = code == exits.OK and whole and all(answer["text"] for answer in answers)
    out(f"   … {len(answers)} answers to {len(COUNTRIES)} lines in {all_s:.1f} s, each line once: {yes(good)}")
    again = await _run(settings, prompts, results, stop, model) == exits.OK and _lines(results) == answers
    out(f"   the same command once more asks nobody and changes nothing: {yes(again)}\n")
    return good and again


async def _run(settings: Settings, prompts: Path, results: Path, stop: StopRequest, model: str) -> int:
    outputs = Outputs.of(results, None, None, overwrite=False, ordered=True)
    options = BatchOptions(
        str(prompts), FormatOptions("text"), {"model": model, "max_tokens": _MAX_TOKENS, "temperature": 0}
    )
    with Input.open(str(prompts)) as source:
        run = BatchRun(settings, options, outputs, source, Silent(), stop, time.monotonic())
        return await run.run()


def _lines(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()]
