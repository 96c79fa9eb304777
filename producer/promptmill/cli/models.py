"""``promptmill models``: what answers, and changing it while everything runs."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import socket
import tomllib
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final, cast

import typer

from promptmill.doctor.models import find_model_key
from promptmill.errors import BadRequest, ConfigError
from promptmill.live import Change, Editor, LiveRegistry, named_in
from promptmill.settings import ModelConfig, Settings
from promptmill.store import Store
from promptmill.traffic import Cooldown, Traffic

from .common import ConfigOption, DataDirOption, JsonOption, client_settings, open_producer
from .models_ask import explain, look, probe
from .output import note, out, out_json, printable, show_time, table

app = typer.Typer(no_args_is_help=True, help="What answers: models, roles and users' own slots, changed while it runs.")
app.command("explain")(explain)
app.command("test")(probe)

_SETTINGS: Final = ("type", "model_name", "api_url", "api_key_env", "api_key_file", "family", "isolation")

NameArgument = Annotated[str, typer.Argument(help="The model's name in the registry.")]
RoleArgument = Annotated[str, typer.Argument(help="The role.")]
UserOption = Annotated[str | None, typer.Option(help="Only for this user, in the place of the role's own slots.")]


def whoami() -> str:
    """user@host, for the audit."""
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


@asynccontextmanager
async def _editor(settings: Settings) -> AsyncGenerator[Editor]:
    async with open_producer(settings) as producer:
        yield Editor(await producer.store(), settings, whoami())


def _change(
    config: Path | None, data_dir: Path | None, as_json: bool, act: Callable[[Editor], Awaitable[Change]]
) -> None:
    """Make a change and say what it was."""

    async def make() -> Change:
        async with _editor(client_settings(config, data_dir)) as editor:
            return await act(editor)

    change = asyncio.run(make())
    if as_json:
        out_json(asdict(change))
        return
    done = "" if change.changed else " (it was so already)"
    out(f"{change.action} {change.name}{done}")
    if change.changed:
        out(f"  before: {_shown(change.before)}\n  after:  {_shown(change.after)}")
    for line in change.notes:
        note(f"({line})")


def _shown(value: Any) -> str:
    if isinstance(value, dict) and "config" in value:
        value = cast("dict[str, Any]", value)["config"]
    return "-" if value is None else printable(json.dumps(value, ensure_ascii=False))


# -- looking ------------------------------------------------------------------------------------------------------


@app.command("list")
def list_models(*, as_json: JsonOption = False, config: ConfigOption = None, data_dir: DataDirOption = None) -> None:
    """List the models, the roles and users' own slots, and where each comes from."""
    held: list[Cooldown] = []

    async def also(store: Store) -> None:
        held.extend(await Traffic(store, "models-list").cooldowns())

    live = asyncio.run(look(client_settings(config, data_dir), also))
    if as_json:
        out_json({**_listed(live), "cooldowns": [asdict(cooldown) for cooldown in held]})
        return
    registry = live.registry
    head = ("name", "type", "model", "family", "from", "key here", "named by")
    rows = [
        (
            m["name"],
            m["type"],
            m["model_name"] or "-",
            m["family"],
            m["from"],
            m["key"] or "-",
            ", ".join(m["named_by"]),
        )
        for m in _listed(live)["models"]
    ]
    out(printable(table([head, *rows])))
    roles = [(role, "everybody", slots) for role, slots in registry.roles.items()]
    roles += [(role, user, slots) for user, own in registry.users.items() for role, slots in own.items()]
    if roles:
        shown = [
            (role, user, ", ".join(f"{s} = {m}{'' if m in registry.models else ' (gone)'}" for s, m in slots.items()))
            for role, user, slots in roles
        ]
        out("\n" + printable(table([("role", "user", "slots"), *shown])))
    if held:
        shown = [(c.kind, c.name, c.state, f"{c.for_s:.0f} s" if c.for_s else "-", c.code or "-") for c in held]
        out("\n" + printable(table([("held back", "name", "state", "for", "last failure"), *shown])))
    for name in sorted(live.entries.hidden):
        note(f"({name} of the configuration file is hidden: `promptmill models restore {name}` brings it back)")
    for key, problem in live.entries.problems.items():
        note(f"(the entry {key} is left out here: {problem})")


def _listed(live: LiveRegistry) -> dict[str, Any]:
    registry = live.registry
    return {
        "version": registry.version,
        "default_model": registry.default_model,
        "models": [
            {
                "name": name,
                "type": model.type,
                "model_name": model.model_name,
                "family": model.worker_family,
                "from": live.origin(name),
                "key": _key_here(model),
                "named_by": named_in(registry, name),
            }
            for name, model in registry.models.items()
        ],
        "roles": {role: dict(slots) for role, slots in registry.roles.items()},
        "users": {user: {r: dict(s) for r, s in own.items()} for user, own in registry.users.items()},
        "hidden": sorted(live.entries.hidden),
        "problems": dict(live.entries.problems),
    }


def _key_here(model: ModelConfig) -> str | None:
    try:
        return "present" if find_model_key(model) else None
    except ConfigError:
        return "missing"


@app.command("audit")
def audit(
    *,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many at most.")] = 20,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """List who changed what, newest first; the last 1,000 changes are kept."""

    async def read() -> list[Any]:
        async with _editor(client_settings(config, data_dir)) as editor:
            return list(await editor.audit(limit))

    for entry in asyncio.run(read()):
        at = datetime.fromtimestamp(entry.at_ms / 1000, UTC)
        if as_json:
            out_json({**asdict(entry), "at": at.isoformat()})
        else:
            out(printable(f"{show_time(at)}  {entry.who}  {entry.action} {entry.name}"))
            out(f"  before: {_shown(entry.before)}\n  after:  {_shown(entry.after)}")


# -- changing -----------------------------------------------------------------------------------------------------


@app.command("add")
def add(
    name: NameArgument,
    *,
    kind: Annotated[str | None, typer.Option("--type", help="The backend: anthropic_api, local_openai, echo …")] = None,
    model_name: Annotated[str | None, typer.Option(help="What the provider calls the model.")] = None,
    api_url: Annotated[str | None, typer.Option(help="The provider's address.")] = None,
    api_key_env: Annotated[str | None, typer.Option(help="The workers' variable that holds the key.")] = None,
    api_key_file: Annotated[str | None, typer.Option(help="The workers' file that holds the key.")] = None,
    family: Annotated[str | None, typer.Option(help="Which workers run it.")] = None,
    isolation: Annotated[str | None, typer.Option(help="none, or process: each call in a process of its own.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="An option of the backend; JSON, else text. May be given again."),
    ] = None,
    limit: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A limit of the model. May be given again.")
    ] = None,
    from_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A TOML file with the model, as in promptmill.toml.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="In the place of the model of this name.")] = False,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Add a model to the registry. All workers know it within seconds. Keys are named, never stored."""
    data = _read_model(from_file, name) if from_file else {}
    given = (kind, model_name, api_url, api_key_env, api_key_file, family, isolation)
    data |= {key: value for key, value in zip(_SETTINGS, given, strict=True) if value is not None}
    for part, pairs in (("options", option), ("limits", limit)):
        if pairs:
            data[part] = {**data.get(part, {}), **dict(_pair(pair, f"--{part[:-1]}") for pair in pairs)}
    if "type" not in data:
        raise BadRequest("give --type or --from-file", field="type")
    _change(config, data_dir, as_json, lambda editor: editor.add_model(name, data, replace=replace))


@app.command("remove")
def remove(
    name: NameArgument,
    *,
    force: Annotated[bool, typer.Option("--force", help="Even where roles name it: they go without it.")] = False,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Remove a model. One of the file that was changed is as in the file again; one of the file alone is hidden."""
    _change(config, data_dir, as_json, lambda editor: editor.remove_model(name, force=force))


@app.command("restore")
def restore(
    name: NameArgument, *, as_json: JsonOption = False, config: ConfigOption = None, data_dir: DataDirOption = None
) -> None:
    """Let the configuration file's own model answer again, whatever hides or covers it."""
    _change(config, data_dir, as_json, lambda editor: editor.restore_model(name))


@app.command("set-role")
def set_role(
    role: RoleArgument,
    slots: Annotated[list[str], typer.Argument(metavar="SLOT=MODEL…", help="All the slots: primary=…, backup_1=… …")],
    *,
    user: UserOption = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Set which models answer for a role. The slots that are given are all that it has then."""
    wanted = {slot: str(model) for slot, model in (_pair(pair, "SLOT=MODEL", text_only=True) for pair in slots)}
    _change(config, data_dir, as_json, lambda editor: editor.set_role(role, wanted, user))


@app.command("unset-role")
def unset_role(
    role: RoleArgument,
    *,
    user: UserOption = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Take back what `set-role` set; the configuration file's role then holds, where it has one."""
    _change(config, data_dir, as_json, lambda editor: editor.unset_role(role, user))


@app.command("set-default")
def set_default(
    name: Annotated[str | None, typer.Argument(help="The model; none: what the configuration file says.")] = None,
    *,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Set the model that answers where a request names neither model nor role."""
    _change(config, data_dir, as_json, lambda editor: editor.set_default(name))


def _pair(text: str, what: str, *, text_only: bool = False) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key or not value:
        raise BadRequest(f"{what}: {text[:80]!r} has not the form NAME=VALUE", field=what)
    if text_only:
        return key, value
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _read_model(path: Path, name: str) -> dict[str, Any]:
    try:
        data = tomllib.loads(path.read_text())
    except (OSError, ValueError) as err:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise BadRequest(f"--from-file: {path}: {err}", field="from_file") from None
    if "models" not in data:
        return data
    models = cast("dict[str, Any]", data["models"]) if isinstance(data["models"], dict) else {}
    if not isinstance(models.get(name), dict):
        raise BadRequest(f"--from-file: {path} has no [models.{name}]", field="from_file")
    return models[name]
