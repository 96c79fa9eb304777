"""Every Redis key and channel of promptmill, and who may touch it.

Keys of one job share the hash tag ``{JOB}``, so a script or transaction touches one slot of a Redis Cluster; there the
job's channel is a sharded one. Every key has a time to live, set when it is written or when its job changes state:
nothing of ours stays for ever.

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
``pm:mark``                  string    submit                      -                           1 minute, renewed
``pm:mark:N``                string    submit, on a cluster        -                           1 minute, renewed
``pm:worker:W:claims``       set       worker W                    watchers                    7 days, renewed
``pm:worker:W``              channel   cancel script               worker W                    -
``pm:operators``             channel   workers, submit             operators                   -
``pm:jobs``                  zset      submit                      list                        30 days or more, renewed
``pm:user:U:jobs``           zset      submit                      list                        30 days or more, renewed
``pm:idem:H``                string    submit                      submit                      life + retention
``pm:{ledger:DAY}``          hash      booking                     usage                       90 days, renewed
``pm:{ledger:DAY}:sums``     hash      booking                     usage, budgets              90 days, renewed
``pm:dead``                  zset      watchers, workers           `job dead`                  30 days, renewed
``pm:unbooked``              zset      claim, booking, sweep       booking, sweep              7 days, renewed
``pm:budget:H``              string    submit                      submit                      2 days
``pm:left``                  zset      gateway                     gateway                     7 days, renewed
``pm:signing-key``           string    gateway, relay              gateway, relay              30 days, renewed
``pm:{SUBJECT}:health``      hash      workers (traffic)           workers, operators          1 hour, renewed
``pm:{SUBJECT}:probe``       string    workers (traffic)           workers                     15 s, renewed
``pm:{model:NAME}:paces``    hash      workers (traffic)           workers                     1 hour, renewed
``pm:{model:NAME}:running``  zset      workers (traffic)           workers                     1 hour, renewed
``pm:{model:NAME}:held``     hash      workers (traffic)           workers                     1 hour, renewed
``pm:{model:NAME}:line``     zset      workers (traffic)           workers                     1 hour, renewed
``pm:{model:NAME}:due``      zset      workers (traffic)           workers                     1 hour, renewed
``pm:{model:NAME}:needs``    hash      workers (traffic)           workers                     1 hour, renewed
``pm:{model:NAME}:turns``    zset      workers (traffic)           workers                     1 hour, renewed
``pm:troubled``              zset      workers (traffic)           workers, operators          1 day, renewed
``pm:traffic``               channel   workers (traffic)           workers                     -
``pm:{batch:B}``             hash      batch scripts               clients, feeder             batch's life + retention
``pm:{batch:B}:lines``       hash      batch scripts               clients, feeder             the same
``pm:{batch:B}:counted``     string    batch scripts               feeder                      the same
``pm:{batch:B}:ended``       list      batch scripts               clients                     the same
``pm:{batch:B}:same``        hash      batch scripts               batch scripts               the same
``pm:batches``               zset      clients, feeder             feeder                      30 days, renewed
``pm:batches:all``           zset      clients                     list of batches             30 days or more, renewed
``pm:user:U:batches``        zset      clients                     list of batches             30 days or more, renewed
``pm:feeder``                string    feeder                      feeder                      5 s, renewed
``pm:ready:QUEUE``           list      feeder, workers             workers, sweep              7 days, renewed
``pm:feed``                  channel   clients, feeder             feeder, workers             -
``pm:cache:H``               string    workers                     workers                     cache_ttl_s
``pm:{registry}``            hash      promptmill models           workers, producers          365 days, renewed
``pm:{registry}:audit``      stream    promptmill models           operators                   365 days, renewed
``pm:{registry}:changes``    channel   promptmill models           who wants to know at once   -
===========================  ========  ==========================  ==========================  =======================

``life`` is the queue time plus attempts times the total timeout; see :func:`promptmill.store.head.record_ttl_ms`.
``SUBJECT`` is ``model:NAME`` or ``host:ADDRESS``; all keys of one subject share its hash tag.
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
MARK: Final = "pm:mark"
"""Written behind other writes: once it is on a disk, so are they. On a cluster each node has one, by a number."""
SIGNING_KEY: Final = "pm:signing-key"
TROUBLED: Final = "pm:troubled"
"""The models and hosts that failed within the last day, scored by the reporter's clock in s: a superset."""
TRAFFIC: Final = "pm:traffic"
"""Where workers hear of a model's or a host's health, as JSON objects."""
UNBOOKED: Final = "pm:unbooked"
DEAD: Final = "pm:dead"
"""Jobs that were given up because they, or something beside them, ended their workers; scored by the time in ms. A
superset."""
LEFT: Final = "pm:left"
"""Jobs with ``cancel_on_disconnect`` that a reader has left, scored by the store's time in ms to look at them again."""
OPERATORS: Final = "pm:operators"
"""Where operators hear of what only a person can mend: JSON objects with an ``event`` and more."""

BATCHES: Final = "pm:batches"
"""The batches that the feeder has something to do for, scored by the time in ms at which they were made. A superset."""
ALL_BATCHES: Final = "pm:batches:all"
FEEDER: Final = "pm:feeder"
"""The lease of the one who feeds batches: its token."""
FEED: Final = "pm:feed"
"""Where feeder and workers hear at once that there is something for them: ``batch`` or ``ready``."""

REGISTRY: Final = "pm:{registry}"
"""What operators changed of models, roles and users' slots; fields in :mod:`promptmill.live.entries`."""
REGISTRY_AUDIT: Final = "pm:{registry}:audit"
"""Who changed what: ``at``, ``who``, ``action``, ``name``, ``before``, ``after``; the last 1,000."""
REGISTRY_CHANGES: Final = "pm:{registry}:changes"
"""The new version, at each change."""

INDEX_TTL: Final = timedelta(days=7)
LIST_TTL: Final = timedelta(days=30)
DEAD_TTL: Final = timedelta(days=7)
"""How long at least a job that was given up is kept for inspection."""
"""Entries of jobs that are gone are trimmed long before."""
WORKERS_TTL: Final = timedelta(days=1)
MARK_TTL: Final = timedelta(minutes=1)
SIGNING_KEY_TTL: Final = timedelta(days=30)
FEEDER_TTL: Final = timedelta(seconds=5)
BUDGET_TOLD_TTL: Final = timedelta(days=2)
REGISTRY_TTL: Final = timedelta(days=365)
REGISTRY_RENEW: Final = timedelta(hours=1)
"""Workers renew it no more often than this."""
REGISTRY_AUDIT_LENGTH: Final = 1_000
TRAFFIC_TTL: Final = timedelta(hours=1)
TROUBLED_TTL: Final = timedelta(days=1)
LOG_AFTER_END_TTL: Final = timedelta(seconds=60)

_ID_CHARS: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")
_ID_MAX_LENGTH: Final = 64
_NEW_ID_LENGTH: Final = 22


def new_job_id() -> str:
    """An unguessable id: over 131 random bits in 22 URL-safe characters, the first a letter or digit.

    An id that begins with ``-`` would be taken for an option wherever it stands in a command.
    """
    while not (job_id := secrets.token_urlsafe(18)[:_NEW_ID_LENGTH])[0].isalnum():
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


def traffic(subject: str, part: str) -> str:
    """One key of a model's (``model:NAME``) or a host's (``host:ADDRESS``) health and limits."""
    return f"pm:{{{subject}}}:{part}"


def _digest(*parts: str) -> str:
    # Length first, so that ("ab", "c") and ("a", "bc") differ.
    data = b"".join(len(p.encode()).to_bytes(4, "big") + p.encode() for p in parts)
    return hashlib.sha256(data).hexdigest()[:32]


def user_digest(user: str) -> str:
    """A user as the members of traffic's keys name them."""
    return _digest(user)[:16]


def batch(batch_id: str) -> str:
    """The hash that owns a batch. All keys of a batch share its hash tag."""
    return f"pm:{{batch:{batch_id}}}"


def batch_lines(batch_id: str) -> str:
    """Its lines, packed in chunks."""
    return f"pm:{{batch:{batch_id}}}:lines"


def batch_counted(batch_id: str) -> str:
    """A bit a line: it is counted, or will be with the earlier line that it is equal to."""
    return f"pm:{{batch:{batch_id}}}:counted"


def batch_ended(batch_id: str) -> str:
    """The lines that ended, in the order in which they did: ``<index>``, or ``<index>:<index of the equal line>``."""
    return f"pm:{{batch:{batch_id}}}:ended"


def batch_same(batch_id: str) -> str:
    """Lines that end together with an earlier one: its index, and a JSON list of theirs."""
    return f"pm:{{batch:{batch_id}}}:same"


def user_batches(user: str) -> str:
    """The index of one user's batches, scored by creation time in ms."""
    return f"pm:user:{_digest(user)}:batches"


def ready(queue: str) -> str:
    """Jobs of batches that wait for a worker of a queue: ids, the next one on the left."""
    return f"pm:ready:{queue}"


def cached(digest: str) -> str:
    """The answer to a request that asked for the cache, by the digest of all that it depends on."""
    return f"pm:cache:{digest}"


def user_jobs(user: str) -> str:
    """The index of one user's jobs, scored by creation time in ms."""
    return f"pm:user:{_digest(user)}:jobs"


def idempotency(user: str, key: str) -> str:
    """Which job a user's idempotency key stands for."""
    return f"pm:idem:{_digest(user, key)}"


def ledger(day: str) -> str:
    """The usage of every attempt that ended on a UTC day (``YYYY-MM-DD``)."""
    return f"pm:{{ledger:{day}}}"


def ledger_sums(day: str) -> str:
    """The sums over that day's ledger; in its slot, so that both are written in one act."""
    return f"pm:{{ledger:{day}}}:sums"


def budget_told(user: str, day: str) -> str:
    """Set once operators were told that a user's budget of a day is used up, softly."""
    return f"pm:budget:{_digest(user, day)}"
