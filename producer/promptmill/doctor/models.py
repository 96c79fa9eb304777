"""Does each configured model have its key, and does its server answer?"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Final

from promptmill.doctor.machine import looked_at_here
from promptmill.doctor.report import Check
from promptmill.errors import ConfigError
from promptmill.live import LiveRegistry
from promptmill.settings import ModelConfig, Settings, read_secret

_ANSWER_S: Final = 5.0
_TITLE: Final = "model "
_OWN_KEYS: Final = {"anthropic_api": "ANTHROPIC_API_KEY", "gemini_api": "GEMINI_API_KEY"}
_MODELS_PATH: Final = {"openai": "/models", "openwebui": "/api/models"}


async def check_models(settings: Settings, live: LiveRegistry) -> list[Check]:
    """One finding a model that a server answers for, asked side by side. No job is run and nothing is billed.

    ``settings.models`` holds the live ones too; ``live`` knows which they are, and what of it could not be read.
    """
    broken = [
        Check("configured", f"live entry {key}", "fail", problem, "workers of this version leave it out: set it anew")
        for key, problem in live.entries.problems.items()
    ]
    if not settings.models:
        advice = "add [models.NAME] to promptmill.toml; `echo` is always there, for tests"
        return [Check("configured", "models", "off", "none", advice), *broken]
    asked = {name: model for name, model in settings.models.items() if not looked_at_here(model)}
    found = await asyncio.gather(*(_check(name, model) for name, model in asked.items()))
    return [*(_tell_origin(check, live) for check in found), *_on_workers(settings, live), *broken]


def _tell_origin(check: Check, live: LiveRegistry) -> Check:
    origin = live.origin(check.name.removeprefix(_TITLE))
    return replace(check, found=f"{check.found} ({origin})") if origin.startswith("live") else check


def _on_workers(settings: Settings, live: LiveRegistry) -> list[Check]:
    """Live models that only a worker's machine can look at."""
    return [
        Check(
            "configured", f"{_TITLE}{name}", "ok", f"{model.type} ({live.origin(name)}); try `promptmill models test`"
        )
        for name, model in settings.models.items()
        if name in live.entries.models and looked_at_here(model)
    ]


def find_model_key(model: ModelConfig) -> str | None:
    """The key that a model would use on this machine; None where it needs none that is known of.

    Raises
    ------
    ConfigError
        Its variable is not set, or its file cannot be read.
    """
    if model.api_url is None and model.api_key_env is None and model.api_key_file is None:
        # What the backend itself takes for its provider's own address.
        return read_secret(_OWN_KEYS.get(model.type), None)
    return model.secret()


async def _check(name: str, model: ModelConfig) -> Check:
    title = f"{_TITLE}{name}"
    try:
        key = find_model_key(model)
    except ConfigError as err:
        return Check("reachable", title, "fail", err.message, "set it, or take the model out")
    about = f"{model.type} {model.model_name or ''}".strip()
    if model.api_url is None:
        return Check("reachable", title, "ok", f"{about}{', key present' if key else ''}; its server was not asked")
    status = await _ask(model.api_url + _MODELS_PATH.get(model.host_type, ""), key)
    if isinstance(status, str):
        return Check(
            "reachable", title, "fail", f"{model.api_url}: {status}", "see that it runs and that api_url is right"
        )
    if status in {401, 403}:
        return Check("reachable", title, "fail", f"{model.api_url} refuses the key ({status})", "give it the right key")
    return Check("reachable", title, "ok", f"{about} at {model.api_url} answers")


async def _ask(url: str, key: str | None) -> int | str:
    """The status of a GET, or why there is none. Whatever the status, something answers there."""
    import httpx  # noqa: PLC0415 - a tenth of a second that only this check needs

    headers = {"Authorization": f"Bearer {key}", "x-api-key": key} if key else {}
    try:
        async with httpx.AsyncClient(timeout=_ANSWER_S) as client:
            return (await client.get(url, headers=headers)).status_code
    except (httpx.HTTPError, httpx.InvalidURL) as err:
        return str(err) or type(err).__name__
