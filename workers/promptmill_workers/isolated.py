"""``isolation = "process"``: each call of a model in a guarded process of its own.

What a backend does there cannot touch the worker: it may block its event loop, leak memory or threads, crash the
interpreter or leave programs behind. The process runs in private directories with an environment from an allow-list;
however the call ends, it and all that it started are gone when the call's generator is closed. The price is a Python
start a call (see ``docs/backends/your-own.md``).

The order goes over a pipe, see :mod:`promptmill_workers.items`. It carries the values of exactly those environment
variables that the model's configuration names, so no secret is in the arguments or in the environment that the process
starts with:

- ``api_key_env``, and where a built-in backend would take its usual variable, that one;
- each text below an option whose name ends in ``_env`` (``headers_env`` of ``local_openai``, and a plug-in's own).

Home and working directory are other ones in the child. ``api_key_file``, and each text of an option whose name ends in
``_file``, are therefore made absolute here.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final, cast

from promptmill.errors import BackendError, ConfigError
from promptmill.settings import FAMILIES, PROGRAM_FAMILIES, ModelConfig, read_secret
from promptmill.text import clean_text
from promptmill_workers.backends import load_backend
from promptmill_workers.backends.base import Backend, Call, Finished, Item
from promptmill_workers.backends.options import with_default_key
from promptmill_workers.items import Order, decode_line
from promptmill_workers.programs import Program, ProgramLimits, open_sandbox

logger = logging.getLogger(__name__)

_COMMAND: Final = (sys.executable, "-P", "-m", "promptmill_workers.child")
_EXIT_S: Final = 1.0
"""How long a child may take to end by itself after its last line."""
_MARGIN_S: Final = 30.0
_TRACE_BYTES: Final = 4000
USUAL_KEYS: Final = {
    "anthropic_api": ("https://api.anthropic.com", "ANTHROPIC_API_KEY"),
    "gemini_api": ("https://generativelanguage.googleapis.com", "GEMINI_API_KEY"),
}
"""Backends that take a variable nobody named, for the address of their provider."""


def make_backend(name: str, config: ModelConfig) -> Backend:
    """The backend of the registry's model ``name``, isolated where its configuration says so.

    Raises
    ------
    ConfigError
        As :func:`~promptmill_workers.backends.load_backend`; or the backend is a program, or its options are not JSON.
    MissingExtra
        As :func:`~promptmill_workers.backends.load_backend`.
    """
    return Isolated(name, config) if config.isolation == "process" else load_backend(name, config)


class Isolated:
    """Any backend, each call in a child. Holds nothing open between calls.

    The backend itself is also made here, once, so that a configuration that cannot work is found at the start and not
    by a job; it is never called.
    """

    def __init__(self, name: str, config: ModelConfig) -> None:
        key = f"models.{name}"
        if FAMILIES.get(config.type) in PROGRAM_FAMILIES:
            raise ConfigError(
                f"{key}.isolation: {config.type} already runs in a guarded process of its own: leave isolation out",
                field=f"{key}.isolation",
            )
        self._name = name
        self._config = _for_child(name, config)
        self._checked = load_backend(name, self._config)

    async def complete(self, call: Call) -> AsyncGenerator[Item, None]:
        """See :class:`~promptmill_workers.backends.base.Backend`.

        Besides the backend's own errors raises BackendError ``crashed`` where the child ended without its last line
        (the message names its exit status or signal), and ``malformed`` where it wrote what is no line of the protocol.
        """
        variables = dict(_variables(self._config))
        order = Order.of(self._name, self._config, variables, call)
        limits = ProgramLimits(run_s=call.timeouts.total_s + _MARGIN_S) if call.timeouts.total_s else ProgramLimits()
        async with (
            open_sandbox(self._name) as box,
            box.run(_COMMAND, environment=_environment(), stdin=order.to_json(), limits=limits) as program,
            aclosing(program.lines()) as lines,
        ):
            async for line in lines:
                item = decode_line(line)
                if isinstance(item, BackendError):
                    await _ended(lines)
                    self._log_trace(program, item.code, variables)
                    raise item
                yield item
                if isinstance(item, Finished):
                    await _ended(lines)
                    return
            self._log_trace(program, "crashed", variables)
            raise BackendError(f"the isolated backend ended {_how(program.status)} in mid-answer", code="crashed")

    def login_fingerprint(self) -> str | None:
        """As the backend itself answers; None where it knows nothing of logins."""
        asked = getattr(self._checked, "login_fingerprint", None)
        return asked() if asked is not None else None

    async def aclose(self) -> None:
        """Close what the backend that was made here may hold."""
        await self._checked.aclose()

    def _log_trace(self, program: Program, code: str, variables: dict[str, str]) -> None:
        """What a crashed child said last, for who has to find out why. What others say is dropped."""
        if code != "crashed" or not program.stderr_tail:
            return
        said = program.stderr_tail.decode(errors="replace")
        # Before it is cut: half a secret would not be recognised.
        for value in (*variables.values(), self._config.secret() or ""):
            said = said.replace(value, "***") if value else said
        said = said[-_TRACE_BYTES:].strip()
        logger.error("the isolated backend of model %r said last:\n%s", self._name, said)


async def _ended(lines: AsyncGenerator[bytes, None]) -> None:
    """Wait for the end of a child that has said its last line; one that dawdles is ended by who leaves its block."""
    try:
        async with asyncio.timeout(_EXIT_S):
            async for _ in lines:
                pass
    except TimeoutError:
        return


def _how(status: int | None) -> str:
    if status is None:
        return "without a status"
    return f"by signal {-status}" if status < 0 else f"with status {status}"


def _environment() -> dict[str, str]:
    # The same modules as here, whichever way they came onto the path; a plug-in may stand in a directory of its own.
    path = [str(Path(entry).absolute()) for entry in sys.path if entry]
    return {"PYTHONPATH": os.pathsep.join(path)}


def _for_child(name: str, config: ModelConfig) -> ModelConfig:
    """``config`` as the child reads it: without isolation, and with paths that hold from anywhere."""
    options: dict[str, Any] = _portable(f"models.{name}.options", config.options)
    files = {k: v for k, v in options.items() if k.endswith("_file") and isinstance(v, str)}
    options |= {k: str(Path(v).expanduser().absolute()) for k, v in files.items()}
    key_file = config.api_key_file.expanduser().absolute() if config.api_key_file else None
    if config.type in USUAL_KEYS:
        config = with_default_key(config, *USUAL_KEYS[config.type])
    return config.model_copy(update={"isolation": "none", "options": options, "api_key_file": key_file})


def _portable(key: str, value: Any) -> Any:
    """``value`` as JSON can say it. Raises ConfigError naming ``key``."""
    if isinstance(value, dict):
        given = cast("dict[Any, Any]", value)
        return {clean_text(str(k)): _portable(f"{key}.{k}", inner) for k, inner in given.items()}
    if isinstance(value, list | tuple):
        return [_portable(f"{key}.{i}", inner) for i, inner in enumerate(cast("list[Any]", value))]
    if isinstance(value, str):
        return clean_text(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    raise ConfigError(f"{key}: a {type(value).__name__} cannot be handed to an isolated backend", field=key)


def _variables(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """The variables that the configuration names and that are set, read now: a rotated key is used at once."""
    names = list(_named(config.options))
    if config.api_key_env:
        names.append(config.api_key_env)
    for name in names:
        try:
            value = read_secret(name, None)
        except ConfigError:
            continue  # the backend finds that it is missing, and says so in its own words
        if value:
            yield name, value


def _named(value: Any, *, wanted: bool = False) -> Iterator[str]:
    """Every text below a key that ends in ``_env``."""
    if isinstance(value, dict):
        for key, inner in cast("dict[Any, Any]", value).items():
            yield from _named(inner, wanted=wanted or str(key).endswith("_env"))
    elif isinstance(value, list):
        for inner in cast("list[Any]", value):
            yield from _named(inner, wanted=wanted)
    elif wanted and isinstance(value, str):
        yield value
