"""Secrets as files: each setting of :data:`SECRETS` may be given as ``<name>_file``, the path of a file with it.

The environment's ``PROMPTMILL_<NAME>_FILE`` and the configuration file's ``<name>_file`` are taken each where they
stand, before the two are laid over each other: a value of the environment wins over a configured file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit

from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

from promptmill.errors import ConfigError

SECRETS: Final = (
    "redis_url",
    "redis_password",
    "broker_url",
    "broker_password",
    "api_key",
    "signing_key",
    "flower_password",
    "flower_broker_api",
)
"""The settings that are a secret, or hold one."""
_MOST_BYTES: Final = 65_536


class SecretFiles(PydanticBaseSettingsSource):
    """The settings that the environment gives as files. ``environment`` has the variables by their lower-case names."""

    def __init__(self, settings_cls: type[BaseSettings], environment: Mapping[str, str | None]) -> None:
        super().__init__(settings_cls)
        self._environment = environment

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Not asked: all values are read at once."""
        raise NotImplementedError

    def __call__(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        prefix = str(self.config.get("env_prefix", ""))
        for name in SECRETS:
            path = self._environment.get(f"{prefix}{name}_file".lower())
            if path is not None:
                variable = f"{prefix}{name}".upper()
                if f"{prefix}{name}".lower() in self._environment:
                    raise ConfigError(f"give {variable} or {variable}_FILE, not both", field=f"{variable}_FILE")
                found[name] = read_file(f"{variable}_FILE", path)
        return found


def take_files(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What the configuration file at ``path`` says, each ``<name>_file`` replaced by what that file holds.

    Raises ConfigError.
    """
    taken = dict(values)
    for name in SECRETS:
        key = f"{name}_file"
        if key not in taken:
            continue
        where = taken.pop(key)
        if name in taken:
            raise ConfigError(f"{path}: give {name} or {key}, not both", field=key)
        if not isinstance(where, str):
            raise ConfigError(f"{path}: {key}: must be the path of a file", field=key)
        taken[name] = read_file(key, where, f"{path}: ")
    return taken


def read_file(given_by: str, path: str, place: str = "") -> str:
    """The secret in a file, without one newline at its end. ``given_by`` is the variable or key that named the file.

    Raises ConfigError, which tells the path and never the content.
    """
    if not path:
        raise ConfigError(f"{place}{given_by} is empty: name a file, or leave it out", field=given_by)
    try:
        with Path(path).expanduser().open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ConfigError(f"{place}{given_by}: {path} is too long for a secret: name another file", field=given_by)
        text = content.decode()
    except OSError as err:
        raise ConfigError(
            f"{place}{given_by}: cannot read {path}: {err.strerror}; see that it is there and may be read by this user",
            field=given_by,
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{place}{given_by}: {path} is not UTF-8: write it anew as text", field=given_by) from None
    secret = text.removesuffix("\n").removesuffix("\r")
    if not secret.strip():
        raise ConfigError(f"{place}{given_by}: {path} is empty: write the secret into it", field=given_by)
    return secret


def with_password(url: str, password: str) -> str:
    """The address with the password in it, unless it has one already."""
    parts = urlsplit(url)
    if parts.password:
        return url
    user, _, host = parts.netloc.rpartition("@")
    return parts._replace(netloc=f"{user.removesuffix(':')}:{quote(password, safe='')}@{host}").geturl()
