"""Which model answers a request: one pure function, used by producers to check and by workers to run."""

from __future__ import annotations

from dataclasses import dataclass

from promptmill.contract import JobRequest
from promptmill.errors import BadRequest
from promptmill.settings import ModelConfig, Settings


@dataclass(frozen=True, slots=True)
class Route:
    """The chosen model: its name in the registry and its configuration."""

    name: str
    config: ModelConfig


def resolve(settings: Settings, request: JobRequest) -> Route:
    """The route of a request.

    ====================  =====================================================
    the request names     what answers
    ====================  =====================================================
    ``model``             that entry of the registry; the name of a backend's
                          type, where no entry has it, stands for the first
                          entry of that type
    ``gemini_api``        where no entry has that name or type: the first entry
                          of type ``gemini_cli``
    ``role`` and ``slot`` that slot of the role
    ``role``              the role's ``primary``
    nothing               ``default_model``; else the first configured model;
                          else ``echo``
    ====================  =====================================================

    Raises
    ------
    BadRequest
        ``unknown_model`` or ``unknown_role``; the message lists what there is.
    """
    registry = settings.registry
    if request.model is not None:
        name = _named(settings, request.model)
    elif request.role is not None:
        name = _slot(settings, request.role, request.slot or "primary")
    else:
        name = settings.default_model or next(iter(settings.models), "echo")
    return Route(name, registry[name])


def _named(settings: Settings, name: str) -> str:
    if name in settings.registry:
        return name
    # The program does what the API does, so where only the program is configured it answers for the API.
    for kind in (name, "gemini_cli") if name == "gemini_api" else (name,):
        for model, config in settings.models.items():
            if config.type == kind:
                return model
    known = ", ".join(settings.registry)
    raise BadRequest(f"there is no model {name!r}; configured: {known}", code="unknown_model", field="model")


def _slot(settings: Settings, role: str, slot: str) -> str:
    slots = settings.roles.get(role)
    if slots is None:
        known = ", ".join(settings.roles) or "none"
        raise BadRequest(f"there is no role {role!r}; configured: {known}", code="unknown_role", field="role")
    if slot not in slots:
        raise BadRequest(
            f"role {role!r} has no slot {slot!r}; it has {', '.join(slots)}", code="unknown_role", field="slot"
        )
    return slots[slot]
