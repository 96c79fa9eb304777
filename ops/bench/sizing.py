"""From streams and their speed to cores, processes and memory: arithmetic over what the benches measured.

Nothing here is measured: the figures come from :mod:`ops.bench.store` and docs/benchmarks.md, with their machine and
their day. A better machine, or another job, needs other figures and the same arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

LOAD: Final = 0.6
"""How much of a core is planned with: past it latency is queueing, and nothing is left for a death."""
LOG_KEPT_S: Final = 60.0
"""How long a log stays behind its job's end."""
STREAMS_PER_WORKER: Final = 1_000
"""The default ``concurrency`` of a worker process."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """CPU in µs, memory in bytes."""

    worker_token_us: float
    relay_token_us: float
    redis_token_us: float
    job_worker_us: float
    job_relay_us: float
    job_redis_us: float
    worker_base: float
    worker_stream: float
    relay_base: float
    relay_reader: float
    redis_running: float
    """Of a job before its first token."""
    redis_log_token: float
    redis_finished: float
    redis_reader: float


@dataclass(frozen=True, kw_only=True)
class Size:
    """What a load needs."""

    redis_cores: float
    """Of all servers together; one server has one core for commands."""
    redis_nodes: int
    worker_cores: float
    workers: int
    relay_cores: float
    relays: int
    redis_bytes: float
    worker_bytes: float
    relay_bytes: float


def size(
    figures: Figures, streams: int, tokens_per_second: float, *, tokens_per_job: int = 500, kept_s: float = 86_400
) -> Size:
    """What so many streams at once need, each with a reader, each job followed at once by the next.

    ``kept_s`` is ``retention_s``: how long a finished job stays in Redis.

    Raises ValueError for a load that is none.
    """
    if streams < 1 or tokens_per_second <= 0 or tokens_per_job < 1:
        raise ValueError("streams, tokens per second and tokens per job must be positive")
    tokens = streams * tokens_per_second
    jobs = tokens / tokens_per_job
    redis, worker, relay = (
        (tokens * token + jobs * job) / 1e6
        for token, job in (
            (figures.redis_token_us, figures.job_redis_us),
            (figures.worker_token_us, figures.job_worker_us),
            (figures.relay_token_us, figures.job_relay_us),
        )
    )
    workers = max(math.ceil(worker / LOAD), math.ceil(streams / STREAMS_PER_WORKER))
    relays = math.ceil(relay / LOAD)
    log = tokens_per_job * figures.redis_log_token
    # On average half of a running job's tokens are there.
    held = streams * (figures.redis_running + log / 2 + figures.redis_reader)
    kept = jobs * (kept_s * figures.redis_finished + LOG_KEPT_S * log)
    return Size(
        redis_cores=redis,
        redis_nodes=math.ceil(redis / LOAD),
        worker_cores=worker,
        workers=workers,
        relay_cores=relay,
        relays=relays,
        redis_bytes=held + kept,
        worker_bytes=workers * figures.worker_base + streams * figures.worker_stream,
        relay_bytes=relays * figures.relay_base + streams * figures.relay_reader,
    )
