"""Every Redis key and channel of promptmill, and who may touch it.

Keys of one job share the hash tag ``{JOB}``, so a script or transaction touches one slot of a Redis Cluster. Every key
has a time to live, set when it is written or when its job changes state: nothing of ours stays for ever.

===========================  ========  ==========================  ==========================  =======================
key                          type      written by                  read by                     time to live
===========================  ========  ==========================  ==========================  =======================
``pm:{JOB}:job``             hash      the job's scripts           everyone                    life + retention
``pm:{JOB}:events``          stream    the job's scripts           readers                     life; 60 s after the end
``pm:{JOB}``                 channel   the job's scripts           relays, producers           -
``pm:outbox``                zset      submit, requeue, sweep      sweep                       7 days, renewed
``pm:claimed``               hash      workers                     sweep                       7 days, renewed
``pm:workers``               hash      workers (heartbeat)         watchers, readiness         1 day, renewed
``pm:sweep``                 string    sweep                       sweep                       one heartbeat period
``pm:worker:W:claims``       set       worker W                    watchers                    7 days, renewed
``pm:worker:W``              channel   cancel script               worker W                    -
``pm:operators``             channel   workers                     operators                   -
``pm:jobs``                  zset      submit                      list                        30 days or more, renewed
``pm:user:U:jobs``           zset      submit                      list                        30 days or more, renewed
``pm:idem:H``                string    submit                      submit                      life + retention
``pm:signing-key``           string    gateway, relay              gateway, relay              30 days, renewed
===========================  ========  ==========================  ==========================  =======================

``life`` is the queue time plus attempts times the total timeout; see :func:`promptmill.store.head.record_ttl_ms`.
"""

from __future__ import annotations

import hashlib
import secrets
from datetime import timedelta
from typing import Final

from promptmill.errors import BadRequest

PREFIX: Final = "pm:"

OUTBOX: Final = "pm:outbox"
CLAIMED: Final = "pm:claimed"
WORKERS: Final = "pm:workers"
ALL_JOBS: Final = "pm:jobs"
SWEEP_LOCK: Final = "pm:sweep"
SIGNING_KEY: Final = "pm:signing-key"
OPERATORS: Final = "pm:operators"
"""Where operators hear of what only a person can mend: JSON objects with an ``event`` and more."""

INDEX_TTL: Final = timedelta(days=7)
LIST_TTL: Final = timedelta(days=30)
"""Entries of jobs that are gone are trimmed long before."""
WORKERS_TTL: Final = timedelta(days=1)
SIGNING_KEY_TTL: Final = timedelta(days=30)
LOG_AFTER_END_TTL: Final = timedelta(seconds=60)

_ID_CHARS: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")
_ID_MAX_LENGTH: Final = 64


def new_job_id() -> str:
    """An unguessable id: 128 random bits, or hardly fewer, in 22 URL-safe characters, the first a letter or digit.

    An id that begins with ``-`` would be taken for an option wherever it stands in a command.
    """
    while not (job_id := secrets.token_urlsafe(16))[0].isalnum():
        continue
    return job_id


def new_token() -> str:
    """A caller's token for one act: a script that meets it again returns the earlier result."""
    return secrets.token_urlsafe(12)


def check_job_id(job_id: str) -> str:
    """``job_id`` itself; raises ``bad_request`` where it could not be one, so no foreign key is ever touched."""
    if not 0 < len(job_id) <= _ID_MAX_LENGTH or not _ID_CHARS.issuperset(job_id):
        raise BadRequest(f"{job_id[:80]!r} is not a job id", field="id")
    return job_id


def record(job_id: str) -> str:
    """The hash that owns the job."""
    return f"pm:{{{job_id}}}:job"


def log(job_id: str) -> str:
    """The stream of the job's events, with ids ``<epoch>-<n>``."""
    return f"pm:{{{job_id}}}:events"


def channel(job_id: str) -> str:
    """The channel that carries the same events live."""
    return f"pm:{{{job_id}}}"


def claims(worker_id: str) -> str:
    """The jobs that a worker may hold: a superset of those that it does hold."""
    return f"pm:worker:{worker_id}:claims"


def control(worker_id: str) -> str:
    """The channel on which a worker learns that a job of its was taken from it."""
    return f"pm:worker:{worker_id}"


def _digest(*parts: str) -> str:
    # Length first, so that ("ab", "c") and ("a", "bc") differ.
    data = b"".join(len(p.encode()).to_bytes(4, "big") + p.encode() for p in parts)
    return hashlib.sha256(data).hexdigest()[:32]


def user_jobs(user: str) -> str:
    """The index of one user's jobs, scored by creation time in ms."""
    return f"pm:user:{_digest(user)}:jobs"


def idempotency(user: str, key: str) -> str:
    """Which job a user's idempotency key stands for."""
    return f"pm:idem:{_digest(user, key)}"
