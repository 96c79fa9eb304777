"""What the configuration consists of: models with their limits and prices, families, users, budgets, keys."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from promptmill.contract import Timeouts
from promptmill.errors import ConfigError
from promptmill.queues import API_FAMILY

FAMILIES: Final = {
    "anthropic_api": API_FAMILY,
    "claude_cli": "claude",
    "echo": API_FAMILY,
    "gemini_api": API_FAMILY,
    "gemini_cli": "gemini",
    "local_openai": API_FAMILY,
}
"""The built-in backends, and the family of workers that each belongs to. Others belong to the API family."""
ISOLATED_FAMILY: Final = "isolated"
"""Models with ``isolation = "process"``: a process a call must not stand beside thousands of streams."""
PROGRAM_FAMILIES: Final = frozenset({"claude", "gemini", ISOLATED_FAMILY})
PROGRAM_CONCURRENCY: Final = 8
_NAME: Final = r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,199}$"
LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})

ModelName = Annotated[str, Field(pattern=_NAME)]
FamilyName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")]
PositiveSeconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Durability = Literal["server", "local", "replica"]
"""When a submission counts as stored: as the server's ``appendfsync`` has it; on its disk; on that of a replica too."""

DEFAULT_TIMEOUTS: Final = Timeouts(queue_s=3600, connect_s=10, first_token_s=120, idle_s=60, total_s=900)


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelLimits(Part):
    """What all workers together may ask of one model. None: no limit but the provider's own."""

    concurrency: Annotated[int, Field(gt=0, le=1_000_000)] | None = None
    """Calls at once."""
    requests_per_minute: Annotated[float, Field(gt=0, le=1e7, allow_inf_nan=False)] | None = None
    tokens_per_minute: Annotated[float, Field(gt=0, le=1e10, allow_inf_nan=False)] | None = None
    """Of the prompt and of the answer together."""


Dollars = Annotated[float, Field(ge=0, le=1_000_000, allow_inf_nan=False)]


class Price(Part):
    """What a model costs, in dollars per million tokens; cached tokens cost as much as ``input`` where not told."""

    input: Dollars
    output: Dollars
    cache_read: Dollars | None = None
    cache_write: Dollars | None = None


class Budget(Part):
    """What a user may use in a UTC day. Past a soft limit jobs are taken with a warning, past a hard one refused."""

    soft_usd: Dollars | None = None
    hard_usd: Dollars | None = None
    soft_tokens: Annotated[int, Field(ge=0)] | None = None
    hard_tokens: Annotated[int, Field(ge=0)] | None = None


class ModelConfig(Part):
    """One entry of the registry: which backend answers under this name, and how it is reached."""

    type: str
    model_name: str | None = None
    api_url: str | None = None
    api_key_env: str | None = None
    api_key_file: Path | None = None
    host_type: Literal["openai", "openwebui"] = "openai"
    timeouts: Timeouts = Timeouts()
    family: FamilyName | None = None
    """Which workers run it; None is the family of its type. Any name makes a family of its own."""
    isolation: Literal["none", "process"] = "none"
    """``process`` runs each call in a guarded process of its own."""
    price: Price | None = None
    """What it costs; None is what the provider says, else the table of prices that is installed."""
    limits: ModelLimits = ModelLimits()
    """Held by all workers together; see :mod:`promptmill.traffic`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """What only this type of backend knows; checked by the backend."""

    @field_validator("type")
    @classmethod
    def _known_type(cls, value: str) -> str:
        if value in FAMILIES:
            return value  # reading the entry points of everything installed takes tens of milliseconds
        known = FAMILIES.keys() | {e.name for e in metadata.entry_points(group="promptmill.backends")}
        if value not in known:
            raise ValueError(f"unknown backend type {value!r}; known: {', '.join(sorted(known))}")
        return value

    @field_validator("api_url")
    @classmethod
    def _http_url(cls, value: str | None) -> str | None:
        if value is not None:
            parts = urlsplit(value)
            if parts.scheme not in {"http", "https"} or not parts.hostname:
                raise ValueError("must be an http:// or https:// address")
        return value.rstrip("/") if value else value

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.type == "local_openai" and not self.api_url:
            raise ValueError("local_openai needs api_url")
        if self.type in {"local_openai", "anthropic_api", "gemini_api", "gemini_cli"} and not self.model_name:
            raise ValueError(f"{self.type} needs model_name")
        if self.api_key_env and self.api_key_file:
            raise ValueError("give api_key_env or api_key_file, not both")
        return self

    @property
    def worker_family(self) -> str:
        """The family of workers that runs it: its queue is theirs."""
        return self.family or (ISOLATED_FAMILY if self.isolation == "process" else FAMILIES.get(self.type, API_FAMILY))

    def secret(self) -> str | None:
        """The key, read now; None where none is configured. Never print, log or store it.

        Raises
        ------
        ConfigError
            The variable is not set or the file cannot be read.
        """
        return read_secret(self.api_key_env, self.api_key_file)


ECHO: Final = ModelConfig(type="echo")


class FamilyConfig(Part):
    """How a family of workers is sized; see :meth:`Settings.workers_of` and :meth:`Settings.concurrency_of`."""

    workers: Annotated[int, Field(ge=0, le=256)] | None = None
    concurrency: Annotated[int, Field(gt=0, le=10_000)] | None = None


class UserConfig(Part):
    """What is different for one user: slots of roles, asked in the place of the roles' own, and the budget."""

    roles: dict[str, dict[str, str]] = Field(default_factory=dict)
    budget: Budget | None = None
    """In the place of the settings' own, limit by limit."""


class ApiKey(Part):
    """Where the key of one user of the gateway stands: a variable or a file."""

    key_env: str | None = None
    key_file: Path | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.key_env is None) == (self.key_file is None):
            raise ValueError("give key_env or key_file")
        return self


def read_secret(env: str | None, file: Path | None) -> str | None:
    """A secret from a variable or a file, without surrounding white space. Raises ConfigError where it is missing."""
    if env:
        value = os.environ.get(env, "").strip()
        if not value:
            raise ConfigError(f"the environment variable {env} is not set", field=env)
        return value
    if file:
        try:
            value = file.expanduser().read_text().strip()
        except (OSError, UnicodeDecodeError) as err:
            raise ConfigError(f"cannot read {file}: {err}", field=str(file)) from None
        if not value:
            raise ConfigError(f"{file} is empty", field=str(file))
        return value
    return None
