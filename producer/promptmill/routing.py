"""Which models answer a request, in which order: one pure function, for producers to check and for workers to run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from promptmill.contract import JobRequest
from promptmill.errors import BadRequest
from promptmill.registry import Registry
from promptmill.settings import ModelConfig

OLD_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "claude": ("claude_cli", "anthropic_api"),
    "gemini": ("gemini_cli", "gemini_api"),
    "local": ("local_openai",),
}
"""Names from before there was a registry, and the types of backend that they stand for, best first."""

COUNTERPARTS: Final[Mapping[str, str]] = {
    "anthropic_api": "claude",
    "claude_cli": "gemini",
    "gemini_api": "claude",
    "gemini_cli": "claude",
    "local_openai": "claude",
}
"""Which of :data:`OLD_NAMES` answers where the default model of a type does not."""


@dataclass(frozen=True, slots=True)
class Route:
    """A model that may answer: its name in the registry, its configuration, and the slot of the role that named it."""

    name: str
    config: ModelConfig
    slot: str | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """What answers a request.

    ``routes``, never empty and each model once, are asked in this order. ``automatic``: nobody chose the first one, so
    a failure may go on to the next; a chosen model's failure surfaces. ``note`` tells readers where the request named
    something that is not there. ``why`` says in words how it came to this.
    """

    routes: tuple[Route, ...]
    automatic: bool
    why: tuple[str, ...]
    note: str | None = None

    @property
    def first(self) -> Route:
        """Who is asked first."""
        return self.routes[0]


def decide(registry: Registry, request: JobRequest) -> Decision:
    """The models for a request, first match wins.

    ==========================  ===============================================================  ===========
    the request names           what answers                                                     falls back
    ==========================  ===============================================================  ===========
    ``model``, an entry         that entry                                                       no
    ``model``, a backend type   the first entry of that type                                     no
    ``model`` ``gemini_api``    where there is no such entry or type: the first ``gemini_cli``   no
    ``model`` ``claude``        the first ``claude_cli``, else the first ``anthropic_api``       no
    ``model`` ``gemini``        the first ``gemini_cli``, else the first ``gemini_api``          no
    ``model`` ``local``         the user's best local model for the role: the first              no
                                ``local_openai`` among its slots, else of the registry
    ``role`` and ``slot``       that slot of the role                                            no
    ``role`` and ``slot``,      as ``role`` alone; a ``progress`` event says so                  yes
    the slot not configured
    ``role``                    its slots: ``primary``, ``backup_1`` …; the user's own in        yes
                                the place of the role's
    nothing                     ``default_model``, else the first configured model, else         yes
                                ``echo``; then its counterpart
    ==========================  ===============================================================  ===========

    The counterpart of a ``claude_cli`` is what ``gemini`` stands for; that of any other but ``echo`` and plug-ins is
    what ``claude`` stands for. What ``exclude`` names, by entry or by type, is never asked.

    Raises
    ------
    BadRequest
        ``unknown_model`` or ``unknown_role``, where there is no such thing or all is excluded; the message lists what
        there is. ``bad_request`` with the field ``exclude``: the model that was chosen is excluded.
    """
    if request.model is not None:
        name, why = _named(registry, request)
        return _chosen(registry, request, name, None, why)
    if request.role is not None:
        return _by_role(registry, request, request.role)
    return _by_default(registry, request)


def _by_role(registry: Registry, request: JobRequest, role: str) -> Decision:
    slots = registry.slots(role, request.user)
    if slots is None:
        known = ", ".join({**registry.roles, **registry.users.get(request.user, {})}) or "none"
        raise BadRequest(f"there is no role {role!r}; configured: {known}", code="unknown_role", field="role")
    own = registry.users.get(request.user, {}).get(role, {})
    note = None
    if request.slot is not None:
        if request.slot in slots:
            why = f"slot {request.slot} of role {role} was asked for: no other answers"
            return _chosen(registry, request, slots[request.slot], request.slot, why)
        note = f"role {role} has no slot {request.slot}; it has {', '.join(slots)}: routed automatically"
    named = ", ".join(f"{slot} = {model}{' (own)' if slot in own else ''}" for slot, model in slots.items())
    why = f"role {role} for user {request.user}: {named}"
    routes = [Route(model, registry.models[model], slot) for slot, model in slots.items() if model in registry.models]
    if not routes:
        gone = ", ".join(slots.values())
        raise BadRequest(f"role {role} names only models that are gone: {gone}", code="unknown_model", field="role")
    return _automatic(routes, request, [*([note] if note else []), why], note)


def _by_default(registry: Registry, request: JobRequest) -> Decision:
    first = registry.default_model
    if first is not None:
        why = [f"neither model nor role was named: the default model {first}"]
    else:
        first = next((name for name in registry.models if name != "echo"), "echo")
        why = [f"neither model nor role was named, and there is no default_model: the first model, {first}"]
    names = [first]
    other = COUNTERPARTS.get(registry.models[first].type)
    found = _of_types(registry, OLD_NAMES[other]) if other else None
    if found is not None and found != first:
        names.append(found)
        why.append(f"its counterpart, {other}: {found}")
    return _automatic([Route(name, registry.models[name]) for name in names], request, why, None)


def _automatic(routes: Iterable[Route], request: JobRequest, why: list[str], note: str | None) -> Decision:
    left: dict[str, Route] = {}
    for route in routes:
        if _excluded(request, route.name, route.config):
            why.append(f"{route.name} is excluded by the request")
        else:
            left.setdefault(route.name, route)
    if not left:
        raise BadRequest("every model that could answer is excluded", code="unknown_model", field="exclude")
    return Decision(tuple(left.values()), True, tuple(why), note)


def _chosen(registry: Registry, request: JobRequest, name: str, slot: str | None, why: str) -> Decision:
    config = registry.models.get(name)
    if config is None:
        raise BadRequest(f"slot {slot} names the model {name!r}, which is gone", code="unknown_model", field="slot")
    if _excluded(request, name, config):
        raise BadRequest(f"{name} was chosen and excluded", field="exclude")
    return Decision((Route(name, config, slot),), False, (why,))


def _excluded(request: JobRequest, name: str, config: ModelConfig) -> bool:
    return name in (request.exclude or ()) or config.type in (request.exclude or ())


def _named(registry: Registry, request: JobRequest) -> tuple[str, str]:
    name = request.model or ""
    if name in registry.models:
        return name, f"model {name} was asked for: no other answers"
    if name == "local":
        return _local(registry, request)
    # The program does what the API does, so where only the program is configured it answers for the API.
    types = OLD_NAMES.get(name) or ((name, "gemini_cli") if name == "gemini_api" else (name,))
    found = _of_types(registry, types)
    if found is None:
        known = ", ".join(registry.models)
        raise BadRequest(f"there is no model {name!r}; configured: {known}", code="unknown_model", field="model")
    return found, f"{name} stands for the first model of type {' or '.join(types)}: {found}; no other answers"


def _local(registry: Registry, request: JobRequest) -> tuple[str, str]:
    slots = (registry.slots(request.role, request.user) or {}) if request.role else {}
    for slot, model in slots.items():
        config = registry.models.get(model)
        if config is not None and config.type in OLD_NAMES["local"]:
            return model, f"the best local model of role {request.role} for user {request.user}: {slot} = {model}"
    found = _of_types(registry, OLD_NAMES["local"])
    if found is None:
        advice = "configure one of type local_openai (Ollama, vLLM, llama.cpp), or name another model"
        raise BadRequest(f"there is no local model: {advice}", code="unknown_model", field="model")
    return found, f"local stands for the first model of type local_openai: {found}"


def _of_types(registry: Registry, types: Iterable[str]) -> str | None:
    for kind in types:
        for name, config in registry.models.items():
            if config.type == kind and name != "echo":
                return name
    return None
