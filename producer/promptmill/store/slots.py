"""Where a command belongs on a Redis Cluster: which of its words is the key, and the key's slot."""

from __future__ import annotations

from typing import Final

from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from promptmill import keys
from promptmill.store import scripts
from promptmill.store.link import Command

SLOTS: Final = REDIS_CLUSTER_HASH_SLOTS

_SCRIPTED: Final = frozenset({b"EVALSHA", b"EVAL"})
_BEHIND_A_WORD: Final = frozenset({b"PUBSUB", b"XGROUP", b"XINFO", b"OBJECT", b"MEMORY"})
_ANYWHERE: Final = frozenset({b"TIME", b"CLIENT", b"CONFIG", b"INFO", b"DBSIZE"})
_EVERYWHERE: Final = frozenset({b"PING", b"SCRIPT", b"FLUSHALL"})

HOME: Final = key_slot(keys.WORKERS.encode())
"""Whoever asks for the time compares it with what workers' heartbeats say: the clock of the node that keeps them."""

_SHARDED: Final[dict[bytes, bytes]] = {
    old: new
    for script, other in ((script, script.sharded()) for script in scripts.ALL)
    for old, new in (
        (script.sha.encode(), other.sha.encode()),
        (script.source.encode(), other.source.encode()),
    )
}


def _bytes(word: bytes | str | float) -> bytes:
    return word if isinstance(word, bytes) else str(word).encode()


def everywhere(command: Command) -> bool:
    """Whether every primary is to be asked: PING (are all there, and is all done that was asked before?), and what
    loads a script, which must be known wherever it is called by its digest."""
    return _bytes(command[0]).upper() in _EVERYWHERE


def slot_of(command: Command) -> int:
    """The slot whose owner is to get a command. A channel counts as a key, so that messages on it keep their order."""
    name = _bytes(command[0]).upper()
    if name in _SCRIPTED:
        return key_slot(_bytes(command[3])) if int(command[2]) else HOME
    if name in _ANYWHERE or len(command) < 2:
        return HOME
    return key_slot(_bytes(command[2 if name in _BEHIND_A_WORD else 1]))


def sharded(command: Command) -> Command:
    """A call of a job's script as the one that publishes within the shard. Anything else is left as it is.

    Here and not where scripts are called: whoever forgot it would publish where no reader listens.
    """
    name = _bytes(command[0]).upper()
    place = 1 if name in _SCRIPTED else 2 if name == b"SCRIPT" and len(command) > 2 else 0
    if not place:
        return command
    other = _SHARDED.get(_bytes(command[place]))
    return command if other is None else (*command[:place], other, *command[place + 1 :])
