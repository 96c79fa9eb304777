"""What a change would write, decided from what stands there. Pure functions: planned anew where another was quicker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson
from pydantic import TypeAdapter, ValidationError

from promptmill.errors import BadRequest
from promptmill.findings import in_one_line
from promptmill.live.entries import DEFAULT, Entries, config_data, named_in, plain
from promptmill.live.keylike import ADVICE, find_key
from promptmill.registry import Registry
from promptmill.settings import ModelConfig, ModelName
from promptmill.slots import check_slots

MAX_BYTES: Final = 64 * 1024
"""Every worker reads every entry: they stay small."""

_NAME: Final = TypeAdapter[str](ModelName)


@dataclass(frozen=True, slots=True)
class View:
    """What a change is planned on: the file's part, the live part, and both together."""

    base: Registry
    entries: Entries
    merged: Registry


@dataclass(frozen=True, slots=True)
class Plan:
    """A field of the hash, what stands in it and what will: JSON values, None where there is none."""

    field: str
    action: str
    name: str
    before: Any
    after: Any
    notes: tuple[str, ...] = ()


def add_model(view: View, name: str, config: Mapping[str, Any], *, replace: bool) -> Plan:
    """See :meth:`promptmill.live.changes.Editor.add_model`."""
    _check_name(name)
    data = config_data(_checked(name, config))
    before = _model_before(view, name)
    live = view.entries.models.get(name)
    if live is not None and before is not None and before["config"] == data:
        return Plan(f"model:{name}", "add", name, before, before)
    # What cannot be read here was written by a newer version: covering it is a decision too.
    known = name in view.merged.models or name in view.entries.unreadable
    if known and not replace:
        raise BadRequest(f"there is a model {name!r} already: --replace puts this one in its place", field="name")
    added = live.added if live is not None else view.entries.version + 1
    after = {"config": data, "added": added}
    _check_size(after)
    notes = () if name in view.merged.models else _family_notes(view, data)
    return Plan(f"model:{name}", "replace" if known else "add", name, before, after, notes)


def remove_model(view: View, name: str, *, force: bool) -> Plan:
    """See :meth:`promptmill.live.changes.Editor.remove_model`."""
    field, before = f"model:{name}", _model_before(view, name)
    if name in view.entries.hidden:
        raise BadRequest(f"{name} is removed already; `models restore {name}` brings the file's back", field="name")
    if before is not None:
        if name in view.base.models:
            return Plan(field, "remove", name, before, None, (f"the configuration file's {name} answers again",))
        return Plan(field, "remove", name, before, None, _still_named(view, name, force=force))
    _check_there(view, name)
    if name == "echo":
        raise BadRequest("echo is built in and is always there", field="name")
    note = f"{name} stands in the configuration file and is hidden; `models restore {name}` brings it back"
    return Plan(field, "hide", name, None, {"hidden": True}, (*_still_named(view, name, force=force), note))


def restore_model(view: View, name: str) -> Plan:
    """See :meth:`promptmill.live.changes.Editor.restore_model`."""
    if name not in view.base.models:
        raise BadRequest(f"the configuration file has no model {name!r}", code="unknown_model", field="name")
    return Plan(f"model:{name}", "restore", name, _model_before(view, name), None)


def set_role(view: View, role: str, slots: dict[str, str], user: str | None) -> Plan:
    """See :meth:`promptmill.live.changes.Editor.set_role`."""
    _check_name(role)
    if not slots:
        raise BadRequest("give at least one SLOT=MODEL", field="slots")
    try:
        check_slots(slots, None)
    except ValueError as err:
        raise BadRequest(str(err), field="slots") from None
    for model in slots.values():
        _check_there(view, model)
    if user is not None:
        return _set_own(view, role, slots, user)
    if "primary" not in slots:
        raise BadRequest(f"role {role}: primary is missing; what is given is all that it has", field="slots")
    return _plan_role(view, role, "set-role", slots)


def unset_role(view: View, role: str, user: str | None) -> Plan:
    """See :meth:`promptmill.live.changes.Editor.unset_role`."""
    if user is not None:
        return _set_own(view, role, None, user)
    if f"role:{role}" in view.entries.problems or role in view.entries.roles:
        return _plan_role(view, role, "unset-role", None)
    if role in view.base.roles:
        raise BadRequest(
            f"role {role} stands in the configuration file: take it out there, or set it anew", field="role"
        )
    raise _no_role(view, role)


def set_default(view: View, name: str | None) -> Plan:
    """See :meth:`promptmill.live.changes.Editor.set_default`."""
    if name is not None:
        _check_there(view, name)
    action = "set-default" if name is not None else "unset-default"
    return Plan(DEFAULT, action, DEFAULT, view.entries.default_model, name)


def _plan_role(view: View, role: str, action: str, after: dict[str, str] | None) -> Plan:
    live = view.entries.roles.get(role)
    before = dict(live) if live is not None else _unreadable(view, f"role:{role}")
    notes = ("the configuration file's role holds again",) if after is None and role in view.base.roles else ()
    return Plan(f"role:{role}", action, role, before, after, notes)


def _set_own(view: View, role: str, slots: dict[str, str] | None, user: str) -> Plan:
    field = f"user:{user}"
    _check_secret(user, "the user")
    if field in view.entries.problems:
        raise BadRequest(f"the entry {field} cannot be read here: {view.entries.problems[field]}", field="user")
    own = plain(view.entries.users.get(user, {}))
    after = {name: given for name, given in own.items() if name != role}
    if slots is not None:
        after[role] = slots
        _check_size(after)
    elif role not in own:
        where = "it stands in the configuration file" if role in view.base.users.get(user, {}) else "none is set"
        raise BadRequest(f"user {user} has no live slots of role {role}: {where}", code="unknown_role", field="role")
    action = "set-role" if slots is not None else "unset-role"
    return Plan(field, action, f"{role} of user {user}", own or None, after or None)


def _model_before(view: View, name: str) -> dict[str, Any] | None:
    live = view.entries.models.get(name)
    if live is not None:
        return {"config": config_data(live.config), "added": live.added}
    if name in view.entries.hidden:
        return {"hidden": True}
    return _unreadable(view, f"model:{name}")


def _unreadable(view: View, field: str) -> dict[str, Any] | None:
    problem = view.entries.problems.get(field)
    return {"unreadable": problem} if problem is not None else None


def _check_name(name: str) -> None:
    try:
        _NAME.validate_python(name)
    except ValidationError:
        raise BadRequest(
            f"{name[:80]!r} is no name: letters, digits and . _ : / -, a letter or digit first", field="name"
        ) from None
    _check_secret(name, "the name")


def _check_secret(value: Any, place: str) -> None:
    found = find_key(value, place)
    if found is not None:
        raise BadRequest(f"{found} looks like a key: {ADVICE}", field=found)


def _checked(name: str, data: Mapping[str, Any]) -> ModelConfig:
    # Before pydantic sees it: what is wrong with a key is first of all that it is one.
    _check_secret(dict(data), name)
    try:
        config = ModelConfig.model_validate(dict(data))
    except ValidationError as err:
        raise BadRequest(f"model {name}: {in_one_line(err)}", field="config") from None
    if config.api_key_env and not config.api_key_env.isidentifier():
        raise BadRequest("api_key_env is the name of a variable, not its value", field="api_key_env")
    return config


def _check_size(value: Any) -> None:
    try:
        size = len(orjson.dumps(value))
    except TypeError as err:
        raise BadRequest(f"it cannot be stored as JSON: {err}", field="config") from None
    if size > MAX_BYTES:
        raise BadRequest(
            f"the entry has {size} bytes, the limit is {MAX_BYTES}", code="too_large", field="config", limit=MAX_BYTES
        )


def _check_there(view: View, model: str) -> None:
    if model not in view.merged.models:
        known = ", ".join(view.merged.models)
        raise BadRequest(f"there is no model {model!r}; there are: {known}", code="unknown_model", field="model")


def _no_role(view: View, role: str) -> BadRequest:
    known = ", ".join(view.merged.roles) or "none"
    return BadRequest(f"there is no role {role!r}; there are: {known}", code="unknown_role", field="role")


def _still_named(view: View, name: str, *, force: bool) -> tuple[str, ...]:
    named = named_in(view.merged, name)
    if named and not force:
        raise BadRequest(
            f"{name} is named by {', '.join(named)}: set these anew first, or remove it with --force", field="name"
        )
    return tuple(f"{where} still names it and goes without it" for where in named)


def _family_notes(view: View, data: Mapping[str, Any]) -> tuple[str, ...]:
    family = ModelConfig.model_validate(data).worker_family
    if any(config.worker_family == family for config in view.merged.models.values()):
        return ()
    return (f"it is the first model of the family {family}: start `promptmill worker --family {family}`",)
