"""How a process tells Prometheus its figures: at a port of its own, because they are not for users.

Labels have few values: models, families and backends are those of the registry, codes those of the error list. Nothing
here has a job id, a user, a prompt or an answer. Needs prometheus_client, which the extras of all servers bring.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Final, Literal

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    start_http_server,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from promptmill.errors import ConfigError, PromptmillError
from promptmill.failures import CLASSES
from promptmill.settings import Settings
from promptmill.store import Store
from promptmill.watch import Watcher

logger = logging.getLogger(__name__)

disable_created_metrics()  # a series more for each one, which nobody asks for

PREFIX: Final = "promptmill_"

SHORT_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
ANSWERS_S: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
WAITS_S: Final = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200)

_LAG_EVERY_S: Final = 0.2
_OTHER_CODES: Final = frozenset(
    {"expired", "poisoned", "cancelled", "budget_exceeded", "unknown_model", "unknown_role"}
)

Kind = Literal["gauge", "counter"]
Row = tuple[Mapping[str, str], float]
Rows = Iterable[tuple[str, str, Kind, Iterable[Row]]]
"""Name without prefix (a counter's without ``_total``), what it is, its kind, and its values by their labels."""

JOBS = Counter(
    f"{PREFIX}jobs",
    "Jobs that this process ended, by state and error code; model and backend where one was asked.",
    ("state", "code", "model", "backend"),
)
_SUBMITTED = Counter(f"{PREFIX}submitted_jobs", "Jobs that this process stored.", ("priority",))
_REQUEUED = Counter(
    f"{PREFIX}requeued_jobs",
    "Jobs that this process gave back to the queue, by the phase readers see.",
    ("phase",),
)
LOOP_LAG = Histogram(f"{PREFIX}loop_lag_seconds", "How late the event loop ran what was due.", buckets=SHORT_S)


def code_label(code: str | None) -> str:
    """An error code as a label: one of those that are documented, ``other`` where a plug-in made its own."""
    if code is None:
        return ""
    return code if code in CLASSES or code in _OTHER_CODES else "other"


def follow_store(store: Store) -> None:
    """Count what this process does to jobs by way of ``store``."""

    def note(act: str, detail: str) -> None:
        if act == "submitted":
            _SUBMITTED.labels(detail).inc()
        elif act == "requeued":
            _REQUEUED.labels(detail).inc()
        else:
            JOBS.labels(act, code_label(detail or None), "", "").inc()

    # From 0: a series that begins with its first event has no rise that an alert could see.
    for priority in ("interactive", "batch"):
        _SUBMITTED.labels(priority)
    _REQUEUED.labels("requeued")
    for state, code in (("failed", "crashed"), ("failed", "poisoned"), ("expired", "expired"), ("cancelled", "")):
        JOBS.labels(state, code, "", "")
    store.note = note


def one(value: float) -> Iterable[Row]:
    """The rows of what has no labels."""
    return (({}, value),)


def watcher_rows(watcher: Watcher) -> Rows:
    """What a watcher did; for :func:`reading`."""
    counted = watcher.counted
    return (
        ("dead_workers", "Workers that this process found dead and settled.", "counter", one(counted["deaths"])),
        ("resent_messages", "Messages that were sent again.", "counter", one(counted["resent"])),
        ("sweeps", "Looks at the outbox.", "counter", one(counted["sweeps"])),
    )


class _Reading:
    """Values that are kept anyway, read when they are asked for."""

    def __init__(self, read: Callable[[], Rows]) -> None:
        self._read = read

    def describe(self) -> Iterable[Metric]:
        """Nothing: the names are not known before."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """All of them."""
        for name, text, kind, rows in self._read():
            found = list(rows)
            labels = list(found[0][0]) if found else []
            family = (GaugeMetricFamily if kind == "gauge" else CounterMetricFamily)(PREFIX + name, text, labels=labels)
            for values, value in found:
                family.add_metric([values[label] for label in labels], value)
            yield family


@contextmanager
def reading(read: Callable[[], Rows], registry: CollectorRegistry = REGISTRY) -> Generator[None]:
    """Have ``read`` called at each scrape while the block runs, from another thread: it must change nothing."""
    collector = _Reading(read)
    registry.register(collector)
    try:
        yield
    finally:
        registry.unregister(collector)


@contextmanager
def loop_lag() -> Generator[None]:
    """Measure how late this event loop is, while the block runs."""
    loop = asyncio.get_running_loop()
    handle: asyncio.TimerHandle | None = None

    def turn(due: float) -> None:
        nonlocal handle
        now = loop.time()
        LOOP_LAG.observe(max(0.0, now - due))
        handle = loop.call_later(_LAG_EVERY_S, turn, now + _LAG_EVERY_S)

    turn(loop.time())
    try:
        yield
    finally:
        if handle is not None:
            handle.cancel()


@contextmanager
def metrics_port(settings: Settings, registry: CollectorRegistry = REGISTRY) -> Generator[int | None]:
    """Serve ``/metrics`` until the block is left; yields the port (0 takes a free one), None where there is none.

    By a thread, so that a process whose event loop stands still can be seen to stand still.

    Raises
    ------
    ConfigError
        ``metrics_host`` is no address of this machine.
    PromptmillError
        ``port_in_use``.
    """
    host, port = settings.metrics_host, settings.metrics_port
    if port is None:
        yield None
        return
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as err:
        if err.errno == errno.EADDRINUSE:
            message = f"metrics_port {port} is in use on {host}: choose another one"
            raise PromptmillError(message, code="port_in_use", retryable=False) from None
        raise ConfigError(f"metrics_host {host}: {err.strerror}", field="metrics_host") from None
    bound = int(server.server_port)
    logger.info("metrics at http://%s:%d/metrics", host, bound)
    try:
        yield bound
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
