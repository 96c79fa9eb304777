"""What operators changed, as it stands in the store, and how it lies over the configuration file. No I/O.

Fields of the hash, each value JSON:

=================  ====================================================================================
``version``        rises with each change and is never used twice: ``max(version + 1, Redis TIME in ms)``
``model:NAME``     ``{"config": {…}, "added": VERSION}``; or ``{"hidden": true}``: the file's is not asked
``role:NAME``      slot to model
``user:NAME``      role to (slot to model)
``default``        name of a model
=================  ====================================================================================

An entry that cannot be read (a newer version wrote it, or a type of backend is not installed here) is left out, with a
problem that says so; everything else holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import orjson
from pydantic import TypeAdapter, ValidationError

from promptmill.findings import in_one_line
from promptmill.registry import Registry, Slots
from promptmill.settings import ModelConfig, ModelName
from promptmill.slots import check_slots

VERSION: Final = "version"
DEFAULT: Final = "default"

T = TypeVar("T")

_NAME: Final = TypeAdapter[str](ModelName)
_SLOTS: Final = TypeAdapter[dict[str, str]](dict[str, str])
_USER: Final = TypeAdapter[dict[str, dict[str, str]]](dict[str, dict[str, str]])


@dataclass(frozen=True, slots=True)
class LiveModel:
    """A model of the store. ``added`` is the version at which its name came, and orders those that no file has."""

    config: ModelConfig
    added: int


@dataclass(frozen=True, slots=True)
class Entries:
    """The live part. ``problems`` says by field what was left out, and why."""

    version: int = 0
    models: Mapping[str, LiveModel] = field(default_factory=dict[str, LiveModel])
    hidden: frozenset[str] = frozenset()
    roles: Mapping[str, Slots] = field(default_factory=dict[str, Slots])
    users: Mapping[str, Mapping[str, Slots]] = field(default_factory=dict[str, Mapping[str, Slots]])
    default_model: str | None = None
    problems: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def unreadable(self) -> frozenset[str]:
        """The models that stand in the store and cannot be read here; elsewhere they may work."""
        return frozenset(_split(key)[1] for key in self.problems if key.startswith("model:"))

    def over(self, base: Registry) -> Registry:
        """The registry that holds: the live part wins by name."""
        models = {
            name: self.models[name].config if name in self.models else config
            for name, config in base.models.items()
            if name not in self.hidden
        }
        added = sorted((live.added, name) for name, live in self.models.items() if name not in models)
        models |= {name: self.models[name].config for _, name in added}
        users = {user: {**base.users.get(user, {}), **roles} for user, roles in self.users.items()}
        return base.having(
            models=models,
            roles={**base.roles, **self.roles},
            users={**base.users, **users},
            default_model=next((n for n in (self.default_model, base.default_model) if n in models), None),
            version=self.version,
        )


def read_entries(raw: Mapping[bytes, bytes]) -> Entries:
    """The entries of a hash as Redis gives it."""
    models: dict[str, LiveModel] = {}
    hidden: set[str] = set()
    roles: dict[str, Slots] = {}
    users: dict[str, Mapping[str, Slots]] = {}
    defaults: list[str] = []
    problems: dict[str, str] = {}
    readers: dict[str, Callable[[str, Any], object]] = {
        "model": lambda name, value: _model(name, value, models, hidden),
        "role": lambda name, value: roles.update({name: read_slots(value)}),
        "user": lambda name, value: users.update({name: read_user(value)}),
        DEFAULT: lambda _, value: defaults.append(_NAME.validate_python(value)),
    }
    for key, value in sorted(raw.items()):
        text = key.decode(errors="replace")
        kind, name = _split(text)
        if text == VERSION:
            continue
        if kind not in readers:
            problems[text] = "no such kind of entry"
            continue
        try:
            readers[kind](name, orjson.loads(value))
        except ValidationError as err:
            problems[text] = in_one_line(err)
        except (ValueError, TypeError, KeyError, AttributeError) as err:
            problems[text] = f"{type(err).__name__}: {err}"
    default = defaults[0] if defaults else None
    return Entries(read_version(raw.get(VERSION.encode())), models, frozenset(hidden), roles, users, default, problems)


def read_version(raw: bytes | None) -> int:
    """The version; 0 where there is none, or none that a script of ours wrote."""
    return int(raw) if raw is not None and raw.isdigit() else 0


def _split(key: str) -> tuple[str, str]:
    kind, _, name = key.partition(":")
    return kind, name


def _model(name: str, value: Any, models: dict[str, LiveModel], hidden: set[str]) -> None:
    _NAME.validate_python(name)
    if value.get("hidden"):
        hidden.add(name)
    else:
        models[name] = LiveModel(ModelConfig.model_validate(value["config"]), int(value["added"]))


def read_slots(value: Any) -> dict[str, str]:
    """Slot to model. Raises ValueError (pydantic's ValidationError is one)."""
    slots = _SLOTS.validate_python(value, strict=True)
    check_slots(slots, None)
    return slots


def read_user(value: Any) -> dict[str, dict[str, str]]:
    """Role to slots. Raises ValueError."""
    roles = _USER.validate_python(value, strict=True)
    for slots in roles.values():
        check_slots(slots, None)
    return roles


def config_data(config: ModelConfig) -> dict[str, Any]:
    """A model's configuration as it is stored: what is not as by default."""
    return config.model_dump(mode="json", exclude_defaults=True)


def plain(roles: Mapping[str, Slots]) -> dict[str, dict[str, str]]:
    """Roles as dicts, which JSON can say."""
    return {role: dict(slots) for role, slots in roles.items()}


def named_in(registry: Registry, model: str) -> list[str]:
    """What names a model: ``role chat (primary)``, ``role chat of user eva (backup_1)``, ``default_model``."""

    def of(roles: Mapping[str, Slots], suffix: str) -> Iterable[str]:
        for role, slots in roles.items():
            found = [slot for slot, named in slots.items() if named == model]
            if found:
                yield f"role {role}{suffix} ({', '.join(found)})"

    names = list(of(registry.roles, ""))
    for user, roles in registry.users.items():
        names += of(roles, f" of user {user}")
    return [*names, "default_model"] if registry.default_model == model else names
