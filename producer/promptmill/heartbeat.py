"""Workers' heartbeats: who is there, and who may be given up.

Each worker process raises one counter every few seconds; the counter vouches for all its claims. Times in a heartbeat
are Redis's own, so clocks of different machines are never compared.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, Literal

import orjson

from promptmill import keys
from promptmill.queues import API_FAMILY
from promptmill.store import Store
from promptmill.store.connection import store_errors
from promptmill.store.scripts import Script

WorkerState = Literal["starting", "ready", "draining", "quarantine"]
"""``quarantine``: it runs the jobs of one worker that lost others, and claims nothing by itself."""

# KEYS: workers. ARGV: worker, beat (JSON), workers' ttl s
_BEAT: Final = Script(
    "beat",
    """
local t = redis.call('TIME')
local beat = cjson.decode(ARGV[2])
beat.at = tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
redis.call('HSET', KEYS[1], ARGV[1], cjson.encode(beat))
redis.call('EXPIRE', KEYS[1], ARGV[3])
return 1
""",
    prelude="",
)


@dataclass(frozen=True, slots=True)
class Done:
    """What a worker has done since it began, for people and dashboards.

    ``ended``: jobs by how they ended there, ``succeeded``, ``failed``, or ``stopped`` (cancelled, taken away, handed
    back). ``pieces`` of text came from backends; mostly a piece is a token. The rates are of the last ten seconds,
    ``failures`` are jobs by error code within the last five minutes.
    """

    up_s: float
    ended: dict[str, int]
    pieces: int
    jobs_per_s: float
    pieces_per_s: float
    failures: dict[str, int]


@dataclass(frozen=True, slots=True)
class Beat:
    """One heartbeat. ``count`` rises with each; ``at_ms`` is Redis's time; ``every_s`` the worker's own period.

    ``family`` is whose queues it serves, ``level`` how it keeps programs together (None: it has run none), ``paused``
    the models that it does not ask until their login is renewed, ``registry`` the version that it goes by. ``done`` is
    None of workers that do not tell.
    """

    worker: str
    count: int
    state: WorkerState
    every_s: float
    at_ms: int
    running: int = 0
    concurrency: int = 0
    family: str = API_FAMILY
    level: str | None = None
    paused: list[str] = field(default_factory=list[str])
    registry: int = 0
    done: Done | None = None

    def fresh(self, now_ms: int) -> bool:
        """True where the last beat is younger than three periods."""
        return now_ms - self.at_ms < self.every_s * 3000 + 1000


async def beat(store: Store, worker: str, count: int, state: WorkerState, every_s: float, **facts: Any) -> None:
    """Record a heartbeat and renew the worker's set of claims. Raises StoreUnavailable."""
    data = orjson.dumps({"n": count, "state": state, "every": every_s, **facts})
    args = (worker, data, int(keys.WORKERS_TTL.total_seconds()))
    with store_errors(store.address):
        await store.wire.call("EVAL", _BEAT.source, 1, keys.WORKERS, *args)
        # Told and not asked: on a cluster another node has it, whose silence would keep the next heartbeat back.
        store.wire.tell([("EXPIRE", keys.claims(worker), int(keys.INDEX_TTL.total_seconds()))])


async def leave(store: Store, worker: str) -> None:
    """Take a worker that ended off the list, so that nobody finds a corpse.

    One that still has claims stays on it: its silent heartbeat is how the watchers find them. Raises StoreUnavailable.
    """
    with store_errors(store.address):
        # On the wire, behind what was told of the last claims. In two acts: nobody but the worker adds to its claims.
        if not await store.wire.call("SCARD", keys.claims(worker)):
            await store.wire.call("HDEL", keys.WORKERS, worker)


async def read_beats(store: Store) -> tuple[list[Beat], int]:
    """The last heartbeat of every worker that has not been given up, and Redis's time in ms."""
    with store_errors(store.address):
        flat, (seconds, micros) = await store.ask([("HGETALL", keys.WORKERS), ("TIME",)])
    now_ms = int(seconds) * 1000 + int(micros) // 1000
    pairs = zip(flat[::2], flat[1::2], strict=True)
    return [_read(worker.decode(), orjson.loads(raw)) for worker, raw in pairs], now_ms


def _read(worker: str, data: dict[str, Any]) -> Beat:
    return Beat(
        worker,
        int(data.get("n", 0)),
        data.get("state", "starting"),
        float(data.get("every", 0)),
        int(data.get("at", 0)),
        int(data.get("running", 0)),
        int(data.get("concurrency", 0)),
        data.get("family", API_FAMILY),
        data.get("level"),
        list(data.get("paused", ())),
        int(data.get("registry", 0)),
        _read_done(data),
    )


def _read_done(data: dict[str, Any]) -> Done | None:
    if "up_s" not in data:
        return None
    return Done(
        float(data["up_s"]),
        dict(data.get("ended", {})),
        int(data.get("pieces", 0)),
        float(data.get("jobs_s", 0)),
        float(data.get("pieces_s", 0)),
        dict(data.get("failures", {})),
    )


async def ready_workers(store: Store) -> list[Beat]:
    """The workers that can claim a job now."""
    beats, now_ms = await read_beats(store)
    return [b for b in beats if b.state == "ready" and b.fresh(now_ms)]
