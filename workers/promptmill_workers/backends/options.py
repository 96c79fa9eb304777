"""What every backend does with its configuration before the first call."""

from __future__ import annotations

from typing import TypeVar

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
