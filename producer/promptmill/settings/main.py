"""All of the configuration as one frozen object, and how it is read."""

from __future__ import annotations

import os
import tomllib
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, cast
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from promptmill.contract import Limits, Timeouts
from promptmill.errors import ConfigError
from promptmill.findings import findings
from promptmill.queues import API_FAMILY
from promptmill.settings.parts import (
    DEFAULT_TIMEOUTS,
    ECHO,
    PROGRAM_CONCURRENCY,
    PROGRAM_FAMILIES,
    ApiKey,
    Budget,
    Durability,
    FamilyConfig,
    FamilyName,
    ModelConfig,
    ModelName,
    PositiveSeconds,
    UserConfig,
    read_secret,
)
from promptmill.settings.secrets import SecretFiles, take_files, with_password
from promptmill.slots import check_slots

DEFAULT_FILE: Final = "promptmill.toml"
DEFAULT_REDIS_URL: Final = "redis://127.0.0.1:6379/0"

_file_values: ContextVar[dict[str, Any]] = ContextVar("_file_values", default={})  # noqa: B039 - never changed
"""What the file says while :func:`load_settings` builds the settings; the lowest of the sources."""


class Settings(BaseSettings):
    """All of promptmill's configuration. Build it with :func:`load_settings`."""

    model_config = SettingsConfigDict(env_prefix="PROMPTMILL_", env_nested_delimiter="__", extra="forbid", frozen=True)

    redis_password: str | None = Field(default=None, repr=False)
    """Put into redis_url, where that has none. This and other secrets can be files; see :mod:`.secrets`."""
    broker_password: str | None = Field(default=None, repr=False)
    redis_url: str | None = None
    """None: ``promptmill up`` brings its own store; everything else uses the running ``up`` or redis://127.0.0.1:6379/0."""
    broker_url: str | None = None
    """Celery's broker; None is redis_url. Never a Redis Cluster."""
    models: dict[ModelName, ModelConfig] = Field(default_factory=dict)
    roles: dict[ModelName, dict[str, str]] = Field(default_factory=dict)
    users: dict[str, UserConfig] = Field(default_factory=dict)
    default_model: str | None = None
    live_registry: bool = True
    """False: what operators change with ``promptmill models`` does not hold here; see :mod:`promptmill.live`."""

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
    max_readers_per_user: Annotated[int, Field(gt=0)] = 10_000
    """In one process, by the job's owner; not counted where there are no API keys."""
    max_connections: Annotated[int, Field(gt=0)] = 25_000
    """Of one gateway or relay; fewer where the process may not open so many files."""
    metrics_host: str = "127.0.0.1"
    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Where this process serves Prometheus its figures, on a port of its own; None: nowhere."""
    disconnect_grace_s: Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)] = 10
    """How long a reader of a job with ``cancel_on_disconnect`` may be away."""

    workers: Annotated[int, Field(ge=0, le=256)] = 1
    concurrency: Annotated[int, Field(gt=0, le=10_000)] = 1000
    families: dict[FamilyName, FamilyConfig] = Field(default_factory=dict)
    """Sizes by family, over ``workers`` and ``concurrency``."""
    batch_share: Annotated[float, Field(gt=0, le=1)] = 0.8
    """How much of a worker's ``concurrency`` batch jobs may hold; at least one slot."""
    batch_window: Annotated[int, Field(ge=1)] | None = None
    """How many lines of batches wait or run at once in a family; None: twice what its workers may run, at least 100."""
    batch_expires_s: PositiveSeconds = 7 * 24 * 3600
    """How long after its creation a batch that says nothing else is ended."""
    cache_ttl_s: PositiveSeconds = 24 * 3600
    """How long an answer is kept for requests with ``cache``."""
    celery_events: bool = True
    """Whether workers tell Flower of their jobs while one asks for it."""
    flower_host: str = "127.0.0.1"
    flower_port: Annotated[int, Field(ge=0, le=65535)] = 5555
    flower_user: str | None = None
    flower_password: str | None = None
    """With ``flower_user`` the login of ``promptmill flower``; needed where other machines can reach it."""
    flower_broker_api: str | None = None
    """RabbitMQ's management interface, for the lengths of the queues: ``http://user:password@host:15672/api/``."""
    loop_stall_s: PositiveSeconds = 30
    """A worker process whose event loop has not turned for so long is ended; its jobs are picked up elsewhere."""
    guard_level: Literal["auto", "pidns", "cgroup", "subreaper", "group"] = "auto"
    """How programs are kept together; ``auto`` is the best that the machine permits, shown by ``promptmill doctor``."""
    drain_s: Annotated[float, Field(ge=0)] = 30
    heartbeat_s: PositiveSeconds = 2
    dead_after_s: PositiveSeconds = 10
    max_attempts: Annotated[int, Field(gt=0, le=100)] = 3
    durability: Durability = "server"
    """When a submission counts as stored; see :mod:`promptmill.store.durable`."""
    timeouts: Timeouts = Timeouts()
    retention_s: PositiveSeconds = 24 * 3600
    ledger_retention_s: PositiveSeconds = 90 * 24 * 3600
    """How long a day's ledger of usage is kept after the last entry."""
    budget: Budget | None = None
    """What each user may use in a day."""
    max_queued: Annotated[int, Field(ge=0)] = 100_000
    """Jobs that may wait for a worker; 0: no bound. See :mod:`promptmill.backlog`."""
    limits: Limits = Limits()

    data_dir: Path | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    """For people, or one JSON object a line."""
    otlp_endpoint: str | None = None
    """Where spans go, as OTLP over HTTP: the address without ``/v1/traces``; None: nowhere."""
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
        variables = cast("EnvSettingsSource", env_settings).env_vars
        file = InitSettingsSource(settings_cls, init_kwargs=_file_values.get())
        return init_settings, env_settings, SecretFiles(settings_cls, variables), file

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
        # Passwords stand above the addresses, so they are checked already.
        password = info.data.get(info.field_name.replace("_url", "_password"))
        return with_password(value, password) if password else value

    @model_validator(mode="after")
    def _passwords_have_an_address(self) -> Self:
        for server, password, url in (
            ("redis", self.redis_password, self.redis_url),
            ("broker", self.broker_password, self.broker_url),
        ):
            if password and url is None:
                raise ValueError(f"{server}_password is for the address in {server}_url, which is not set: set it")
        return self

    @model_validator(mode="after")
    def _refers_to_known_models(self) -> Self:
        for role, slots in self.roles.items():
            self._check_slots(f"roles.{role}", slots)
            if "primary" not in slots:
                raise ValueError(f"roles.{role}: primary is missing")
        for user, config in self.users.items():
            for role, slots in config.roles.items():
                self._check_slots(f"users.{user}.roles.{role}", slots)
        if self.default_model is not None and self.default_model not in self.registry:
            raise ValueError(f"default_model: there is no model {self.default_model!r} under [models]")
        return self

    def _check_slots(self, key: str, slots: dict[str, str]) -> None:
        try:
            check_slots(slots, self.registry)
        except ValueError as err:
            raise ValueError(f"{key}.{err}") from None

    @property
    def registry(self) -> dict[str, ModelConfig]:
        """The configured models, and ``echo``, which needs no provider and is always there."""
        return {"echo": ECHO, **self.models}

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

    def budget_of(self, user: str) -> Budget | None:
        """The limits that hold for a user: their own, and the settings' where theirs say nothing. None: no limit."""
        config = self.users.get(user)
        own = config.budget if config else None
        if own is None or self.budget is None:
            return own or self.budget
        return self.budget.model_copy(update=own.model_dump(exclude_none=True))

    def timeouts_for(self, model: ModelConfig, asked: Timeouts) -> Timeouts:
        """The bounds of one attempt: the request's, then the model's, then the settings', then ours."""
        return asked.over(model.timeouts.over(self.timeouts.over(DEFAULT_TIMEOUTS)))


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
        values = take_files(_read_toml(path), path)
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
    source = str(path) if path else "configuration"
    lines = [f"{source}: {finding}" for finding in findings(err)]
    first = err.errors(include_url=False)[0]["loc"]
    return ConfigError("\n".join(lines), field=".".join(str(p) for p in first) or None)
