"""What processes of ours hand on to each other through the environment."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from promptmill.errors import ConfigError
from promptmill.settings.main import load_settings
from promptmill.settings.secrets import SECRETS


def lifeline_fd() -> int | None:
    """The read end of the pipe of the ``promptmill up`` that started this process; see :mod:`promptmill.lifeline`."""
    return _inherited_fd("PROMPTMILL_LIFELINE_FD")


def listen_fd() -> int | None:
    """The listening socket that ``promptmill up`` bound for this gateway; None: bind host and port."""
    return _inherited_fd("PROMPTMILL_LISTEN_FD")


def _inherited_fd(name: str) -> int | None:
    value = os.environ.get(name)
    if value is None:
        return None
    if not value.isdecimal():
        raise ConfigError(f"{name}: {value!r} is not a file descriptor", field=name)
    return int(value)


def child_environment(settings: Mapping[str, object], **handed_on: int) -> dict[str, str]:
    """The environment for a process of ours: this one's, with ``settings`` (by field name) and descriptors put in.

    Values of None are left out. Descriptors that were handed to *this* process are never passed on.
    """
    env = {k: v for k, v in os.environ.items() if k not in {"PROMPTMILL_LIFELINE_FD", "PROMPTMILL_LISTEN_FD"}}
    for name, value in (*settings.items(), *handed_on.items()):
        if value is not None:
            env[f"PROMPTMILL_{name.upper()}"] = str(value)
            if name in SECRETS:
                env.pop(f"PROMPTMILL_{name.upper()}_FILE", None)  # the two together would be refused
    return env


def addresses_to_hand_on(config_file: Path | None, redis_url: str | None, broker_url: str | None) -> dict[str, object]:
    """The two addresses as settings for :func:`child_environment`: those that the child would not find out by itself.

    An address holds a password, which may come from a file so that it stands in no process's environment. A child that
    reads the same configuration reads that file too. Raises ConfigError, as the child would.
    """
    own = load_settings(config_file)
    wanted = {"redis_url": redis_url, "broker_url": broker_url}
    found = {"redis_url": own.redis_url, "broker_url": own.broker_url or own.redis_url}
    if broker_url is None:
        found["broker_url"] = None
    return {name: url for name, url in wanted.items() if url != found[name]}


def inherited(wanted: Callable[[str], bool]) -> dict[str, str]:
    """The environment's variables whose names are ``wanted``, for a process that is to see no others."""
    return {name: value for name, value in os.environ.items() if wanted(name)}


def take_variables(variables: Mapping[str, str]) -> None:
    """Set variables of this process that another one handed over: libraries and plug-ins read them there."""
    os.environ.update(variables)


def default_data_dir() -> Path:
    """``$XDG_DATA_HOME/promptmill``, or its usual place."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "promptmill"
