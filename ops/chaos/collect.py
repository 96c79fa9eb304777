"""Asking the store, the provider and the machine what is left at the end of a run."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import re
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import orjson
import psutil
from ops.chaos.facts import Books, Provider, Remains
from ops.chaos.ledger import Ledger
from ops.chaos.system import System
from tests.support.web import request

from promptmill import keys
from promptmill.enqueue import Enqueuer
from promptmill.queues import API_FAMILY, queues_of
from promptmill.store.tries import is_presumed, try_id
from promptmill.usage.report import read_usage
from promptmill.usage.verify import verify_usage

logger = logging.getLogger(__name__)

_LOOK_S: Final = 0.5
_BOOKED_S: Final = 100.0
_CLOSED_S: Final = 30.0
_PR_SET_CHILD_SUBREAPER: Final = 36
_KEY: Final = re.compile(rb"(chaos-\d+)- ")
"""How every prompt begins."""


def adopt_orphans() -> None:
    """From now on whoever loses its parent becomes this process's child, so that none can hide."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


async def quiet(system: System) -> dict[str, int]:
    """Wait until nothing is under way in the store any more; answers what still was when the time ran out.

    Usage of an attempt that nobody told of is estimated half a minute after its job was cancelled; that takes longest.
    """
    deadline = asyncio.get_running_loop().time() + _BOOKED_S
    enqueuer = Enqueuer(system.broker_url)
    try:
        while True:
            waiting = await _waiting(system, enqueuer)
            logger.info("still waiting: %s", {what: count for what, count in waiting.items() if count})
            if not any(waiting.values()) or asyncio.get_running_loop().time() > deadline:
                return waiting
            await asyncio.sleep(_LOOK_S)
    finally:
        await enqueuer.aclose()


async def _waiting(system: System, enqueuer: Enqueuer) -> dict[str, int]:
    redis = system.direct.redis
    names: list[bytes] = await redis.zrange(keys.OUTBOX, 0, -1)
    # Names of jobs that have ended may stay there for a minute, until the sweep meets them.
    unsent = [r for r in await system.direct.find_many(raw.decode() for raw in names) if r is not None and not r.ended]
    found = {
        "the outbox": len(unsent),
        "the list of unbooked usage": await redis.zcard(keys.UNBOOKED),
        "the workers' claims": sum([await redis.scard(key) async for key in redis.scan_iter(keys.claims("*"))]),
    }
    for queue in queues_of(API_FAMILY):
        found[f"the queue {queue}"] = await enqueuer.depth(queue) or 0
    return found


async def ask_store(system: System, job_ids: Sequence[str], ledger: Ledger) -> None:
    """Write down what the store says of every job, and of the usage."""
    store = system.direct
    for job_id, record in zip(job_ids, await store.find_many(job_ids), strict=True):
        if record is not None:
            job = record.job()
            ledger.write(
                "record",
                job=job_id,
                state=job.state,
                text=job.text,
                error=job.error.code if job.error else None,
                crashes=record.st["crashes"],
                tries=[try_id(try_) for try_ in record.tries],
                presumed=[try_id(try_) for try_ in record.tries if is_presumed(try_)],
            )
    known: list[bytes] = await store.redis.zrange(keys.ALL_JOBS, 0, -1)
    ledger.write("found", what="known_jobs", value=[raw.decode() for raw in known])
    ledger.write("found", what="books", value=asdict(await _books(system)))


async def _books(system: System) -> Books:
    store, books = system.direct, Books()
    attempts = tokens_in = tokens_out = 0
    today = datetime.now(UTC).date()
    for day in (today, today - timedelta(days=1)):
        for field, raw in (await store.redis.hgetall(keys.ledger(day.isoformat()))).items():
            job_id, _, name = field.decode().partition(":")
            books.entries.setdefault(job_id, []).append(name)
            entry = orjson.loads(raw)
            attempts, tokens_in, tokens_out = attempts + 1, tokens_in + entry["in"], tokens_out + entry["out"]
    books.entries_sum = [attempts, tokens_in, tokens_out]
    total = (await read_usage(store, "yesterday", "today", "model", None)).total
    books.reported_sum = [total.attempts, total.input_tokens, total.output_tokens]
    verified = await verify_usage(store, "yesterday", "today")
    books.differences = [f"{d.day} {d.field}: {d.found}, not {d.expected}" for d in verified.differences]
    return books


# -- the provider -----------------------------------------------------------------------------------------------------


async def ask_provider(system: System) -> Provider:
    """What the provider was asked, once everything that could ask it has ended."""
    port = int(system.simulator_url.rpartition(":")[2])
    deadline = asyncio.get_running_loop().time() + _CLOSED_S
    while True:
        stats = await _simulator(port, "stats")
        is_open = stats["open_requests"] or stats["open_connections"]
        if not is_open or asyncio.get_running_loop().time() > deadline:
            break
        await asyncio.sleep(_LOOK_S)
    requests = Counter[str]()
    for record in await _simulator(port, "requests"):
        found = _KEY.search(orjson.dumps(record["body"]))
        if found:
            requests[found[1].decode()] += 1
    return Provider(
        requests=dict(requests), open_requests=stats["open_requests"], open_connections=stats["open_connections"]
    )


async def _simulator(port: int, what: str) -> Any:
    async with request(port, f"/_sim/{what}") as answer:
        return orjson.loads(await answer.body())


# -- the machine ------------------------------------------------------------------------------------------------------


def look_around(system: System, remains: Remains) -> None:
    """Put in which processes, sockets and files are left, after everything has stopped."""
    for child in psutil.Process().children(recursive=True):
        try:
            if child.status() != psutil.STATUS_ZOMBIE:
                remains.processes.append(f"{child.pid} {' '.join(child.cmdline())[:150]}")
        except psutil.NoSuchProcess:
            continue  # it ended while we looked
    ports = {"relay": system.ports["relay"], "gateway": system.ports["gateway"], "store": system.store.port}
    for name, port in ports.items():
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                remains.sockets.append(f"{name} still listens on {port}")
    remains.sockets += [f"{p.connections} through the proxy {p.name}" for p in system.proxies if p.connections]
    remains.files += sorted(path.name for path in system.temporary.iterdir())
