"""What this machine's workers could do: keep programs together, start programs, log in.

Asked of the workers' own code in a process of its own, because producers do not import it.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any, Final

import orjson

from promptmill.doctor.report import Check
from promptmill.extras import missing_modules
from promptmill.queues import API_FAMILY
from promptmill.settings import ModelConfig, Settings, child_environment

_LIMIT_S: Final = 20.0
_LEVELS: Final = {
    "pidns": "a PID namespace a program: nothing survives, whatever is killed",
    "cgroup": "a cgroup a program: nothing survives its guard's end; see docs/isolation.md",
    "subreaper": "a guard that adopts what a program leaves: see docs/isolation.md for what it cannot promise",
    "group": "process groups alone: what leaves its group survives",
}
_ADVICE: Final = {
    "auth": "give it a key, or log in",
    "auth_expired": "log in again",
    "missing_extra": "install what it names",
}


def looked_at_here(model: ModelConfig) -> bool:
    """Whether a model is looked at on this machine, because no server could be asked about it."""
    return model.worker_family != API_FAMILY or model.isolation == "process" or model.type.endswith("_cli")


async def check_machine(settings: Settings) -> list[Check]:
    """How programs are kept together, and whether each program can be started and is logged in. Asks no provider."""
    if missing_modules("workers"):
        return []  # said already, as an extra that is not installed
    found = await _ask(settings)
    if isinstance(found, str):
        return [Check("configured", "programs", "fail", found, "run `python -m promptmill_workers.check`")]
    checks = [_level(settings, found["guard"]["level"], found["guard"]["levels"])]
    for name, model in settings.models.items():
        if looked_at_here(model):
            checks.append(_model(f"model {name}", model, found["models"][name]))
    return checks


def _level(settings: Settings, level: str | None, levels: dict[str, str]) -> Check:
    missing = "; ".join(f"{name}: {why}" for name, why in levels.items() if why != "ok")
    if level is None:
        found = f"none can be kept together ({missing})"
        if settings.guard_level != "auto":
            found = f"guard_level {settings.guard_level}: {levels[settings.guard_level]}"
        return Check("configured", "programs", "fail", found, 'set guard_level = "auto"')
    return Check("configured", "programs", "ok", f"{level}, {_LEVELS[level]}" + (f" ({missing})" if missing else ""))


def _model(title: str, model: ModelConfig, found: dict[str, Any]) -> Check:
    error = found.get("error")
    if error is None:
        return Check("configured", title, "ok", f"{model.type}: {found['found']}")
    advice = _ADVICE.get(error["code"], "correct its entry")
    return Check("configured", title, "fail", error["message"], advice)


async def _ask(settings: Settings) -> dict[str, Any] | str:
    config = ("--config", str(settings.config_file)) if settings.config_file else ()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "promptmill_workers.check", *config),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=child_environment({}),
    )
    try:
        async with asyncio.timeout(_LIMIT_S):
            out, err = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        return f"no answer within {_LIMIT_S:g} s"
    if process.returncode:
        return err.decode("utf-8", "replace").strip()[-500:] or f"exit code {process.returncode}"
    return orjson.loads(out)
