"""What answers: models, roles and users' own choices, as one snapshot.

A snapshot is made from the configuration file (:meth:`Registry.of`) and from what operators changed since, which stands
in the store (:mod:`promptmill.live`). It never changes; whoever needs the newest asks for it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

from promptmill.settings import ModelConfig, Settings

Slots = Mapping[str, str]
"""Slot (``primary``, ``backup_1`` …) to model, in the order in which they are asked."""


def ordered(slots: Slots) -> dict[str, str]:
    """``primary`` first, then the backups by number."""
    return dict(sorted(slots.items(), key=lambda item: (item[0] != "primary", len(item[0]), item[0])))


@dataclass(frozen=True, slots=True)
class Registry:
    """A snapshot. ``version`` rises with each change of the live part; 0 where there is none.

    ``users`` holds roles by user; a slot named there is asked in the place of the role's own.
    """

    models: Mapping[str, ModelConfig]
    roles: Mapping[str, Slots] = field(default_factory=dict[str, Slots])
    users: Mapping[str, Mapping[str, Slots]] = field(default_factory=dict[str, Mapping[str, Slots]])
    default_model: str | None = None
    version: int = 0

    @classmethod
    def of(cls, settings: Settings) -> Registry:
        """The configuration's own part."""
        users = {user: config.roles for user, config in settings.users.items()}
        return cls(settings.registry, settings.roles, users, settings.default_model)

    def slots(self, role: str, user: str) -> dict[str, str] | None:
        """A role's slots as they are for ``user``, in order; None where there is no such role for them."""
        own = self.users.get(user, {}).get(role)
        common = self.roles.get(role)
        if own is None and common is None:
            return None
        return ordered({**(common or {}), **(own or {})})

    def having(self, **parts: object) -> Self:
        """A copy with some parts replaced."""
        return replace(self, **parts)  # pyright: ignore[reportArgumentType]
