"""Changing the live part: each change is checked, written where nobody else wrote meanwhile, and audited, in one act.

A change is planned on what was read and written by a script that compares the version; where another writer was
quicker it is planned anew on what that one left, so no update is lost. What is as it should be already is not written
again: repeating a command whose reply was lost is harmless.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

from promptmill import keys
from promptmill.errors import ConfigError, StoreUnavailable
from promptmill.live import plans
from promptmill.live.entries import Entries, read_entries
from promptmill.live.plans import Plan, View
from promptmill.registry import Registry
from promptmill.settings import Settings
from promptmill.store import Store
from promptmill.store.connection import store_errors
from promptmill.store.scripts import Script

_TRIES: Final = 50

# KEYS: registry, audit, channel. ARGV: version read, field, value ('' removes it), ttl s, who, action, name, before,
# after, audit length. Answers the new version, or nil where another writer was quicker.
_WRITE: Final = Script(
    "registry",
    """
local now = redis.call('HGET', KEYS[1], 'version') or '0'
if now ~= ARGV[1] then return false end
local t = redis.call('TIME')
local at = tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
local version = string.format('%.0f', math.max(tonumber(now) + 1, at))
redis.call('HSET', KEYS[1], 'version', version)
if ARGV[3] == '' then redis.call('HDEL', KEYS[1], ARGV[2]) else redis.call('HSET', KEYS[1], ARGV[2], ARGV[3]) end
redis.call('XADD', KEYS[2], 'MAXLEN', ARGV[10], '*', 'at', string.format('%.0f', at), 'version', version,
  'who', ARGV[5], 'action', ARGV[6], 'name', ARGV[7], 'before', ARGV[8], 'after', ARGV[9])
redis.call('EXPIRE', KEYS[1], ARGV[4])
redis.call('EXPIRE', KEYS[2], ARGV[4])
redis.call('PUBLISH', KEYS[3], version)
return version
""",
    prelude="",
)


@dataclass(frozen=True, slots=True)
class Change:
    """What was done. ``version`` is the registry's after it; ``changed`` is False where it was so already."""

    action: str
    name: str
    before: Any
    after: Any
    version: int
    changed: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One change of the past; ``at_ms`` is Redis's time. ``before`` and ``after`` are the entry's, None where it was
    not (any more)."""

    at_ms: int
    version: int
    who: str
    action: str
    name: str
    before: Any
    after: Any


class Editor:
    """Changes the live part over one configuration file, in the name of ``who`` (user@host).

    All methods raise BadRequest where the change is refused (``unknown_model`` and ``unknown_role`` among the codes),
    and StoreUnavailable, after which it is not known whether the change was made: repeat it.
    """

    def __init__(self, store: Store, settings: Settings, who: str) -> None:
        self._store = store
        self._base = Registry.of(settings)
        self._who = who
        self._wanted = settings.live_registry

    async def add_model(self, name: str, config: Mapping[str, Any], *, replace: bool = False) -> Change:
        """A new model, or with ``replace`` another configuration in the place of the one that there is."""
        return await self._change(lambda view: plans.add_model(view, name, config, replace=replace))

    async def remove_model(self, name: str, *, force: bool = False) -> Change:
        """Take the live entry away, which uncovers the file's; or hide the file's, where there is no live one.

        Refused for a model that roles or ``default_model`` name and that would be gone, unless ``force``.
        """
        return await self._change(lambda view: plans.remove_model(view, name, force=force))

    async def restore_model(self, name: str) -> Change:
        """Let the file's own model answer again: takes off what hides or covers it."""
        return await self._change(lambda view: plans.restore_model(view, name))

    async def set_role(self, role: str, slots: Mapping[str, str], user: str | None = None) -> Change:
        """All the slots of a role; or those that are asked for one user in the place of the role's own."""
        return await self._change(lambda view: plans.set_role(view, role, dict(slots), user))

    async def unset_role(self, role: str, user: str | None = None) -> Change:
        """Take a live role away, which uncovers the file's."""
        return await self._change(lambda view: plans.unset_role(view, role, user))

    async def set_default(self, name: str | None) -> Change:
        """The model that answers where a request names none; None: what the file says."""
        return await self._change(lambda view: plans.set_default(view, name))

    async def audit(self, count: int = 50) -> list[AuditEntry]:
        """The last changes, newest first; 1,000 are kept."""
        with store_errors(self._store.address):
            (rows,) = await self._store.ask([("XREVRANGE", keys.REGISTRY_AUDIT, "+", "-", "COUNT", count)])
        return [_audited(dict(zip(row[::2], row[1::2], strict=True))) for _, row in rows]

    async def _read(self) -> Entries:
        with store_errors(self._store.address):
            (flat,) = await self._store.ask([("HGETALL", keys.REGISTRY)])
        return read_entries(dict(zip(flat[::2], flat[1::2], strict=True)))

    async def _change(self, plan: Callable[[View], Plan]) -> Change:
        if not self._wanted:
            raise ConfigError("live_registry is false: here only the configuration file counts", field="live_registry")
        for _ in range(_TRIES):
            entries = await self._read()
            made = plan(View(self._base, entries, entries.over(self._base)))
            if made.after == made.before:
                return Change(made.action, made.name, made.before, made.after, entries.version, False, made.notes)
            version = await self._write(entries.version, made)
            if version is not None:
                return Change(made.action, made.name, made.before, made.after, version, True, made.notes)
        raise StoreUnavailable(f"others changed the registry {_TRIES} times meanwhile; try again")

    async def _write(self, expected: int, plan: Plan) -> int | None:
        after = b"" if plan.after is None else orjson.dumps(plan.after)
        before = b"" if plan.before is None else orjson.dumps(plan.before)
        ttl, length = int(keys.REGISTRY_TTL.total_seconds()), keys.REGISTRY_AUDIT_LENGTH
        touched = (keys.REGISTRY, keys.REGISTRY_AUDIT, keys.REGISTRY_CHANGES)
        args = (expected, plan.field, after, ttl, self._who, plan.action, plan.name, before, after, length)
        with store_errors(self._store.address):
            reply = await self._store.wire.call("EVAL", _WRITE.source, len(touched), *touched, *args)
        return None if reply is None else int(reply)


def _audited(row: dict[bytes, bytes]) -> AuditEntry:
    def text(name: bytes) -> str:
        return row.get(name, b"").decode(errors="replace")

    def value(name: bytes) -> Any:
        return orjson.loads(row[name]) if row.get(name) else None

    return AuditEntry(
        int(text(b"at") or 0),
        int(text(b"version") or 0),
        text(b"who"),
        text(b"action"),
        text(b"name"),
        value(b"before"),
        value(b"after"),
    )
