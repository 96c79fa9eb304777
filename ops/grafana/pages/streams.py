"""What readers and submitters get from gateways and relays."""

from __future__ import annotations

from typing import Final

from ops.grafana.pages.panels import INSTANCE, Page, Panel, quantiles, rate

STREAMS: Final = Page(
    "streams",
    "streams and HTTP",
    "What readers and submitters get from gateways and relays.",
    ("instance",),
    (
        Panel(
            "Readers",
            "Streams that are open.",
            "short",
            ((f"promptmill_readers{{{INSTANCE}}}", "{{instance}}"),),
            stacked=True,
        ),
        Panel(
            "Followed jobs",
            "Jobs that have a reader.",
            "short",
            ((f"promptmill_followed_jobs{{{INSTANCE}}}", "{{instance}}"),),
            stacked=True,
        ),
        Panel(
            "Streams that end, by outcome",
            "A second: ended with their job, left by the reader, stopped by a restart, interrupted, refused because"
            " there are too many, denied for what they asked, told to come again because the store was away.",
            "ops",
            rate("promptmill_streams_total", "outcome", INSTANCE),
            stacked=True,
        ),
        Panel(
            "Refusals",
            "Readers that were turned away within ten minutes.",
            "short",
            (
                (
                    "sum by (outcome) (increase("
                    f'promptmill_streams_total{{outcome=~"refused|denied|come_again", {INSTANCE}}}[10m]))',
                    "{{outcome}}",
                ),
            ),
        ),
        Panel(
            "Events to readers",
            "A second, to all readers of a process.",
            "ops",
            rate("promptmill_sent_events_total", "instance", INSTANCE),
            stacked=True,
        ),
        Panel(
            "Reads of logs",
            "A second: each reader's first, and one after every gap.",
            "ops",
            rate("promptmill_log_reads_total", "instance", INSTANCE),
        ),
        Panel(
            "Gaps",
            "A second: times that a reader saw ids that do not follow each other, or no data, and read the log.",
            "ops",
            rate("promptmill_gaps_total", "instance", INSTANCE),
        ),
        Panel(
            "Slow readers",
            "A second: times that a reader fell behind its bound, and read the log.",
            "ops",
            rate("promptmill_slow_readers_total", "instance", INSTANCE),
        ),
        Panel(
            "Pub/sub connections",
            "Made within ten minutes; more than one at the start means that they were lost.",
            "short",
            (
                (
                    f"sum by (instance) (increase(promptmill_subscriber_connections_total{{{INSTANCE}}}[10m]))",
                    "{{instance}}",
                ),
            ),
        ),
        Panel(
            "Requests, by status",
            "A second, without streams.",
            "reqps",
            rate("promptmill_http_requests_total", "status", INSTANCE),
            stacked=True,
        ),
        Panel(
            "Requests, by route",
            "A second, without streams.",
            "reqps",
            rate("promptmill_http_requests_total", "method, path", INSTANCE),
            stacked=True,
        ),
        Panel(
            "Time of a request, by route",
            "From a request's head to the end of its answer.",
            "s",
            quantiles("promptmill_http_request_seconds", "path", INSTANCE, 0.5, 0.99),
        ),
    ),
)
