"""What every backend does with its configuration before the first call."""

from __future__ import annotations

from typing import TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, ValidationError

from promptmill.errors import BackendError, ConfigError
from promptmill.settings import ModelConfig


class Options(BaseModel):
    """Base of a backend's own options; a misspelt one is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


_Options = TypeVar("_Options", bound=Options)


def parse_options(kind: type[_Options], name: str, config: ModelConfig) -> _Options:
    """``config.options`` as ``kind``.

    Raises
    ------
    ConfigError
        Names the key under ``models.NAME.options`` and the reason.
    """
    try:
        return kind.model_validate(config.options)
    except ValidationError as err:
        item = err.errors(include_url=False, include_context=False, include_input=False)[0]
        key = ".".join(("models", name, "options", *(str(part) for part in item["loc"])))
        reason = "no such option" if item["type"] == "extra_forbidden" else item["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{key}: {reason}", field=key) from None


def with_default_key(config: ModelConfig, own_url: str, variable: str) -> ModelConfig:
    """``config`` with the provider's usual variable for the key, where none is configured and the address is its own.

    For another address there is no default: a key must not travel to a host that it was not meant for.
    """
    own, asked = urlsplit(own_url), urlsplit(config.api_url or own_url)
    if config.api_key_env or config.api_key_file or (asked.scheme, asked.netloc) != (own.scheme, own.netloc):
        return config
    return config.model_copy(update={"api_key_env": variable})


def secret_for_call(name: str, config: ModelConfig) -> str | None:
    """The key as it is now, so that a rotated one is used from the next call on; None where none is configured.

    Raises
    ------
    BackendError
        ``auth``: the variable is not set or the file cannot be read; the message says which.
    """
    try:
        return config.secret()
    except ConfigError as err:
        raise BackendError(f"no key for the model {name}: {err.message}", code="auth") from None
