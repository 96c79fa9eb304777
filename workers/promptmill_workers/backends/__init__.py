"""Backends by type: the built-in ones, and those that other distributions bring.

A third party names its factory ``(name, config) -> Backend`` in the entry-point group ``promptmill.backends``.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module, metadata
from typing import Final, cast

from promptmill.errors import ConfigError, MissingExtra
from promptmill.settings import ModelConfig
from promptmill_workers.backends.base import Backend

Factory = Callable[[str, ModelConfig], Backend]

ENTRY_POINTS: Final = "promptmill.backends"
_BUILTIN: Final = {
    "anthropic_api": ("promptmill_workers.backends.anthropic_api", "AnthropicApi"),
    "claude_cli": ("promptmill_workers.backends.claude_cli", "ClaudeCli"),
    "echo": ("promptmill_workers.backends.echo", "Echo"),
    "gemini_api": ("promptmill_workers.backends.gemini_api", "GeminiApi"),
    "gemini_cli": ("promptmill_workers.backends.gemini_cli", "GeminiCli"),
    "local_openai": ("promptmill_workers.backends.local_openai", "LocalOpenAI"),
}


def load_backend(name: str, config: ModelConfig) -> Backend:
    """The backend of the registry's model ``name``; its module is imported now, its connections are made later.

    A built-in type wins over an entry point of the same name.

    Raises
    ------
    ConfigError
        No such type, or a configuration that cannot work.
    MissingExtra
        The type is known but its libraries are not installed; the message says what to install.
    """
    return _factory(name, config.type)(name, config)


def _factory(name: str, kind: str) -> Factory:
    try:
        if kind in _BUILTIN:
            module, attribute = _BUILTIN[kind]
            return cast("Factory", getattr(import_module(module), attribute))
        for entry in metadata.entry_points(group=ENTRY_POINTS, name=kind):
            return cast("Factory", entry.load())
    except ModuleNotFoundError as err:
        missing = err.name or str(err)
        if kind in _BUILTIN and missing.startswith("promptmill_workers"):
            raise  # our own module: a broken installation, which no extra mends
        hint = 'pip install "promptmill[workers]"' if kind in _BUILTIN else f"install {missing}"
        raise MissingExtra(f"models.{name}: {kind} needs {missing}, which is not installed: {hint}") from err
    known = ", ".join(sorted(_BUILTIN))
    raise ConfigError(
        f"models.{name}.type: unknown backend type {kind!r}; built in: {known}", field=f"models.{name}.type"
    )
