"""How the slots of a role are named, in the configuration file and in the live part of the registry alike."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

_SLOT: Final = re.compile(r"primary|backup_[1-9][0-9]?")


def check_slots(slots: Mapping[str, str], models: Mapping[str, object] | None) -> None:
    """Raise ValueError, beginning with the slot, for one that has no slot's name or names a model that is not there.

    Without ``models`` only the names of the slots are checked.
    """
    for slot, model in slots.items():
        if not _SLOT.fullmatch(slot):
            raise ValueError(f"{slot}: a slot is named primary, backup_1, backup_2 …")
        if models is not None and model not in models:
            raise ValueError(f"{slot}: there is no model {model!r} under [models]")
