"""The real programs, scripted ones in their place, and a provider that knows what the programs add to a prompt."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import psutil
import pytest

from promptmill.contract import Timeouts
from promptmill.errors import BackendError
from promptmill.settings import load_settings
from promptmill_workers.backends import load_backend
from promptmill_workers.backends.base import Backend, Call, Finished, Item, TextDelta
from promptmill_workers.deadlines import Deadlines
from promptmill_workers.testing import call, failure, text_of
from tests.support.docs import blocks
from tests.support.processes import PATIENCE_S
from tests.support.simulator import Plan, RequestRecord, Simulator

_ROOT = Path(__file__).resolve().parents[2]
_INSTALLED_IN = _ROOT / ".programs" / "node_modules" / ".bin"
WARDEN = "pm-warden"
INSTALL = "ops/programs/install"

# Claude Code puts the day into a block before the prompt, Gemini CLI the day and its directories.
_ADDED = re.compile(
    r"\A(?:<system-reminder>.*?</system-reminder>\n\n|<session_context>.*?</session_context>)", re.DOTALL
)


def installed(name: str) -> str | None:
    """The path of ``claude`` or ``gemini``, on PATH or in ``.programs``."""
    return shutil.which(name) or shutil.which(name, path=str(_INSTALLED_IN))


def real_program(name: str) -> str:
    """The path of ``claude`` or ``gemini``; without it a skipped test, in CI a failure."""
    found = installed(name)
    if found is None:
        reason = f"the program {name} is not installed: run {INSTALL}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def script(directory: Path, body: str, name: str = "program") -> str:
    """A Python script that stands for a program; answers its path."""
    path = directory / name
    path.write_text(f"#!{sys.executable} -IS\n{textwrap.dedent(body)}")
    path.chmod(0o755)
    return str(path)


def printing(*lines: str, end: str = "") -> str:
    """A body for :func:`script`: print ``lines``, then do ``end``."""
    return (
        f"import os, signal, sys, time\nsys.stdout.write({chr(10).join(lines) + chr(10)!r})\nsys.stdout.flush()\n{end}"
    )


KEY: Final = "planted-key-0123456789"
"""What the provider of a test of programs wants."""


async def ends_of_faults(
    make: Callable[[str], Backend], faults: Iterable[str], at_once: int
) -> dict[str, tuple[str, int]]:
    """The code in which each fault of the provider ends, after how many of six tokens; no program stays behind."""
    few = asyncio.Semaphore(at_once)
    ends: dict[str, tuple[str, int]] = {}

    async def one(fault: str) -> None:
        async with few:
            items, error = await failure(make(f"sim:tokens=6,rate=20,fault={fault}"), call())
        assert KEY not in str(error)
        assert not any(isinstance(item, Finished) for item in items)
        ends[fault] = (error.code, text_of(items).count("tok"))

    async with leaving_none():
        await asyncio.gather(*map(one, faults))
    return ends


async def end_of_silence(backend: Backend, bounds: dict[str, float]) -> tuple[str, str]:
    """The code and the text of a call that passes one of its bounds; no program stays behind."""
    seen: list[Item] = []
    async with leaving_none():
        with pytest.raises(BackendError) as caught:
            await bounded(backend, replace(call(), timeouts=Timeouts(**bounds)), seen)
    return caught.value.code, text_of(seen)


def check_examples_load(page: str, program: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every configuration on a page of the documentation makes a backend, with ``program`` installed."""
    script(directory, "", name=program)
    monkeypatch.setenv("PATH", str(directory), prepend=":")
    examples = [block for block in blocks(page) if block.language == "toml"]
    assert examples
    for block in examples:
        path = directory / "promptmill.toml"
        path.write_text(block.text)
        for name, config in load_settings(path).models.items():
            load_backend(name, config)


class ProgramSimulator(Simulator):
    """A provider whose ``echo`` answers with the prompt alone, without what the program put before it."""

    def _accept(self, request: Any, dialect: Any, record: RequestRecord) -> Plan:
        plan = super()._accept(request, dialect, record)
        dialect.ask.user_text = _ADDED.sub("", dialect.ask.user_text)
        return plan


def descendants() -> list[psutil.Process]:
    """What runs below this process but for the warden, which stays; zombies left out."""
    found: list[psutil.Process] = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.name() != WARDEN:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


async def wait_for_none(before: set[int], timeout_s: float = PATIENCE_S) -> None:
    """Until nothing runs below this process but what ran ``before``; fails with what still does."""
    deadline = time.monotonic() + timeout_s
    while left := [process for process in descendants() if process.pid not in before]:
        assert time.monotonic() < deadline, f"still there after {timeout_s} s: {left}"
        await asyncio.sleep(0.02)


@asynccontextmanager
async def leaving_none(timeout_s: float = PATIENCE_S) -> AsyncIterator[None]:
    """What is started within is gone soon after."""
    before = {process.pid for process in descendants()}
    yield
    await wait_for_none(before, timeout_s)


async def bounded(backend: Backend, asked: Call, into: list[Item]) -> None:
    """One attempt with its bounds, as the runner makes it; what came is in ``into``, also where this raises."""
    async with Deadlines(asked.timeouts) as deadlines, aclosing(backend.complete(asked)) as items:
        async for item in items:
            if isinstance(item, TextDelta):
                deadlines.touch()
            into.append(item)


def seen_from_outside() -> str:
    """The command lines and environments of all that runs below this process, as ``ps`` shows them."""
    shown: list[str] = []
    for process in descendants():
        try:
            shown += [*process.cmdline(), *(f"{k}={v}" for k, v in process.environ().items())]
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return "\n".join(shown)
