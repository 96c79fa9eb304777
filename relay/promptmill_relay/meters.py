"""What a relay, and the relay in a gateway, count for their operators. docs/observing.md explains every figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from prometheus_client import Counter

from promptmill.metrics import PREFIX, Kind, Rows, one

if TYPE_CHECKING:
    from promptmill.reading import Hub
    from promptmill_relay.stream import StreamEndpoint

_STREAMS: Final = Counter(
    f"{PREFIX}streams",
    "Answers to readers: ``ended`` with their job, ``left`` by the reader, ``stopped`` by us, ``interrupted``, "
    "``refused`` because there are too many, ``denied`` for what they asked, told to ``come_again``, or ``empty``: "
    "nothing was left to read.",
    ("outcome",),
)
for _outcome in ("ended", "left", "stopped", "interrupted", "refused", "denied", "come_again", "empty"):
    _STREAMS.labels(_outcome)  # from 0, so that an alert sees the first


def note_stream(outcome: str) -> None:
    """A reader's answer ended."""
    _STREAMS.labels(outcome).inc()


def stream_rows(streams: StreamEndpoint, hub: Hub) -> Rows:
    """What is going on, for :func:`promptmill.metrics.reading`."""

    gauge: Kind = "gauge"
    counter: Kind = "counter"
    counted = hub.counted
    return (
        ("readers", "Readers that are connected here now.", gauge, one(streams.open_streams)),
        ("followed_jobs", "Jobs that have a reader here.", gauge, one(hub.channels)),
        ("sent_events", "Events that were written to readers.", counter, one(streams.events_sent)),
        (
            "log_reads",
            "Reads of a job's log: each reader's first, one after every gap, and one at each keepalive.",
            counter,
            one(counted["replays"]),
        ),
        (
            "gaps",
            "Times that a reader saw ids that do not follow each other, or no data.",
            counter,
            one(counted["gaps"]),
        ),
        ("slow_readers", "Times that a reader fell behind its bound.", counter, one(counted["overflows"])),
        ("subscriber_connections", "Pub/sub connections made.", counter, one(counted["connections"])),
    )
