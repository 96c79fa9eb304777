"""Configuration: ``promptmill.toml`` and ``PROMPTMILL_*``, validated once at an entry point and passed down frozen.

The environment wins over the file, arguments over both. No other module reads the environment.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from contextvars import ContextVar
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from promptmill.contract import Limits, Timeouts
from promptmill.errors import ConfigError
from promptmill.queues import API_FAMILY

DEFAULT_FILE: Final = "promptmill.toml"
DEFAULT_REDIS_URL: Final = "redis://127.0.0.1:6379/0"
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
_SLOT: Final = re.compile(r"^(primary|backup_[1-9][0-9]?)$")
LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})

ModelName = Annotated[str, Field(pattern=_NAME)]
FamilyName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")]
PositiveSeconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]

DEFAULT_TIMEOUTS: Final = Timeouts(queue_s=3600, connect_s=10, first_token_s=120, idle_s=60, total_s=900)


_file_values: ContextVar[dict[str, Any]] = ContextVar("_file_values", default={})  # noqa: B039 - never changed
"""What the file says while :func:`load_settings` builds the settings; the lowest of the sources."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(_Part):
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


_ECHO: Final = ModelConfig(type="echo")


class FamilyConfig(_Part):
    """How a family of workers is sized; see :meth:`Settings.workers_of` and :meth:`Settings.concurrency_of`."""

    workers: Annotated[int, Field(ge=0, le=256)] | None = None
    concurrency: Annotated[int, Field(gt=0, le=10_000)] | None = None


class ApiKey(_Part):
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


class Settings(BaseSettings):
    """All of promptmill's configuration. Build it with :func:`load_settings`."""

    model_config = SettingsConfigDict(env_prefix="PROMPTMILL_", env_nested_delimiter="__", extra="forbid", frozen=True)

    redis_url: str | None = None
    """None: ``promptmill up`` brings its own store; everything else uses the running ``up`` or redis://127.0.0.1:6379/0."""
    broker_url: str | None = None
    """Celery's broker; None is redis_url. Never a Redis Cluster."""
    models: dict[ModelName, ModelConfig] = Field(default_factory=dict)
    roles: dict[ModelName, dict[str, str]] = Field(default_factory=dict)
    default_model: str | None = None

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    api_key: str | None = None
    """One key for the user ``default``; more users go in ``api_keys``."""
    api_keys: dict[str, ApiKey] = Field(default_factory=dict)
    cors_origins: list[str] = Field(default_factory=list)
    signing_key: str | None = None
    stream_url_ttl_s: PositiveSeconds = 3600
    keepalive_s: PositiveSeconds = 20
    retry_ms: Annotated[int, Field(ge=0, le=60_000)] = 1000
    """What readers are told to wait before they reconnect."""
    max_readers: Annotated[int, Field(gt=0)] = 20_000

    workers: Annotated[int, Field(ge=0, le=256)] = 1
    concurrency: Annotated[int, Field(gt=0, le=10_000)] = 1000
    families: dict[FamilyName, FamilyConfig] = Field(default_factory=dict)
    """Sizes by family, over ``workers`` and ``concurrency``."""
    loop_stall_s: PositiveSeconds = 30
    """A worker process whose event loop has not turned for so long is ended; its jobs are picked up elsewhere."""
    guard_level: Literal["auto", "pidns", "cgroup", "subreaper", "group"] = "auto"
    """How programs are kept together; ``auto`` is the best that the machine permits, shown by ``promptmill doctor``."""
    drain_s: Annotated[float, Field(ge=0)] = 30
    heartbeat_s: PositiveSeconds = 2
    dead_after_s: PositiveSeconds = 10
    max_attempts: Annotated[int, Field(gt=0, le=100)] = 3
    timeouts: Timeouts = Timeouts()
    retention_s: PositiveSeconds = 24 * 3600
    limits: Limits = Limits()

    data_dir: Path | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    config_file: Path | None = None
    """The file that was read; set by :func:`load_settings`."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # Arguments, then the environment, then the file; a .env is never read behind the operator's back.
        del dotenv_settings, file_secret_settings
        return init_settings, env_settings, InitSettingsSource(settings_cls, init_kwargs=_file_values.get())

    @field_validator("redis_url", "broker_url")
    @classmethod
    def _url(cls, value: str | None, info: Any) -> str | None:
        if value is None:
            return None
        allowed = {"redis", "rediss", "unix"}
        if info.field_name == "broker_url":
            allowed |= {"amqp", "amqps"}
        if urlsplit(value).scheme not in allowed:
            raise ValueError(f"must begin with one of {', '.join(f'{s}://' for s in sorted(allowed))}")
        return value

    @model_validator(mode="after")
    def _refers_to_known_models(self) -> Self:
        for role, slots in self.roles.items():
            for slot, model in slots.items():
                if not _SLOT.match(slot):
                    raise ValueError(f"roles.{role}.{slot}: a slot is named primary, backup_1, backup_2 …")
                if model not in self.registry:
                    raise ValueError(f"roles.{role}.{slot}: there is no model {model!r} under [models]")
            if "primary" not in slots:
                raise ValueError(f"roles.{role}: primary is missing")
        if self.default_model is not None and self.default_model not in self.registry:
            raise ValueError(f"default_model: there is no model {self.default_model!r} under [models]")
        return self

    @property
    def registry(self) -> dict[str, ModelConfig]:
        """The configured models, and ``echo``, which needs no provider and is always there."""
        return {"echo": _ECHO, **self.models}

    @property
    def served_families(self) -> list[str]:
        """The families that the configured models need, the API family first; it is always among them."""
        return list(dict.fromkeys([API_FAMILY, *(m.worker_family for m in self.models.values())]))

    def workers_of(self, family: str) -> int:
        """How many worker processes ``promptmill up`` runs for a family: its own setting, else ``workers`` for the API
        family, else one (none where ``workers`` is 0)."""
        own = self.families.get(family, FamilyConfig()).workers
        if own is not None:
            return own
        return self.workers if family == API_FAMILY else min(self.workers, 1)

    def concurrency_of(self, family: str) -> int:
        """How many jobs one worker process of a family runs at once: its own setting, else 8 for programs, which take
        200 to 400 MB each, else ``concurrency``."""
        own = self.families.get(family, FamilyConfig()).concurrency
        if own is not None:
            return own
        return PROGRAM_CONCURRENCY if family in PROGRAM_FAMILIES else self.concurrency

    @property
    def store_url(self) -> str:
        """Where the store is when nobody said otherwise."""
        return self.redis_url or DEFAULT_REDIS_URL

    @property
    def queue_url(self) -> str:
        """Where Celery's broker is."""
        return self.broker_url or self.store_url

    def keys_by_user(self) -> dict[str, str]:
        """The gateway's API keys, read now, by user. Raises ConfigError where one cannot be read."""
        keys = {"default": self.api_key} if self.api_key else {}
        for user, where in self.api_keys.items():
            secret = read_secret(where.key_env, where.key_file)
            if secret:
                keys[user] = secret
        return keys

    def timeouts_for(self, model: ModelConfig, asked: Timeouts) -> Timeouts:
        """The bounds of one attempt: the request's, then the model's, then the settings', then ours."""
        return asked.over(model.timeouts.over(self.timeouts.over(DEFAULT_TIMEOUTS)))


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
    return env


def default_data_dir() -> Path:
    """``$XDG_DATA_HOME/promptmill``, or its usual place."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "promptmill"


def load_settings(config: Path | str | None = None, **overrides: Any) -> Settings:
    """Settings from ``config`` (or ``$PROMPTMILL_CONFIG``, or ``./promptmill.toml`` where it exists).

    ``overrides`` that are None are ignored; the others win over file and environment.

    Raises
    ------
    ConfigError
        Names the file, the key and the reason; ``field`` is the key.
    """
    chosen = config or os.environ.get("PROMPTMILL_CONFIG")
    path = Path(chosen) if chosen else Path(DEFAULT_FILE)
    values: dict[str, Any] = {}
    if chosen or path.is_file():
        values = _read_toml(path)
        values["config_file"] = path.resolve()
    token = _file_values.set(values)
    try:
        return Settings(**{k: v for k, v in overrides.items() if v is not None})
    except ValidationError as err:
        raise _config_error(err, path if values else None) from None
    except SettingsError as err:
        raise ConfigError(f"PROMPTMILL_*: {err}") from None
    finally:
        _file_values.reset(token)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file", field=str(path)) from None
    except OSError as err:
        raise ConfigError(f"{path}: cannot be read: {err.strerror}", field=str(path)) from None
    except UnicodeDecodeError as err:
        raise ConfigError(f"{path}: not UTF-8 (byte {err.start})", field=str(path)) from None
    except tomllib.TOMLDecodeError as err:
        raise ConfigError(f"{path}: not TOML: {err}", field=str(path)) from None


def _config_error(err: ValidationError, path: Path | None) -> ConfigError:
    lines: list[str] = []
    for item in err.errors(include_url=False, include_context=False, include_input=False):
        key = ".".join(str(part) for part in item["loc"])
        reason = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            reason = "no such setting"
        source = str(path) if path else "configuration"
        lines.append(f"{source}: {key}: {reason}" if key else f"{source}: {reason}")
    first = err.errors(include_url=False)[0]["loc"]
    return ConfigError("\n".join(lines), field=".".join(str(p) for p in first) or None)
