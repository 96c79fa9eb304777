"""What worker processes do, and what they need."""

from __future__ import annotations

from typing import Final

from ops.grafana.pages.panels import FAMILY, INSTANCE, Page, Panel, quantiles, rate

WORKERS: Final = Page(
    "workers",
    "workers",
    "What worker processes do, and what they need.",
    ("family", "instance"),
    (
        Panel(
            "Workers",
            "The id of each worker, as heartbeats, records and logs name it.",
            "none",
            ((f"promptmill_worker_info{{{FAMILY}, {INSTANCE}}}", ""),),
            kind="table",
            width=24,
            height=6,
        ),
        Panel(
            "Running jobs",
            "Claims that a worker holds; those that wait for a model's limits are among them.",
            "short",
            (
                (
                    f"promptmill_worker_running_jobs{{{INSTANCE}}} * on (job, instance) group_left (family)"
                    f" promptmill_worker_info{{{FAMILY}}}",
                    "{{instance}}",
                ),
                (f"promptmill_worker_waiting_jobs{{{INSTANCE}}} > 0", "{{instance}} wait for a limit"),
            ),
        ),
        Panel(
            "Ready, of slots",
            "Slots of the workers that claim jobs; 0 while one starts, drains, or sees its event loop stand still.",
            "short",
            ((f"promptmill_worker_slots{{{INSTANCE}}} * promptmill_worker_ready{{{INSTANCE}}}", "{{instance}}"),),
        ),
        Panel(
            "Publish lag",
            "From the oldest event of a write being due to the store's acknowledgement.",
            "s",
            quantiles("promptmill_publish_lag_seconds", "", INSTANCE, 0.5, 0.99),
        ),
        Panel(
            "Events in a write",
            "Of all jobs of a worker; more of them mean that the store or the worker is busy.",
            "short",
            quantiles("promptmill_write_events", "", INSTANCE, 0.5, 0.99),
        ),
        Panel(
            "Writes and events",
            "A second, of all workers.",
            "ops",
            (
                (f"sum(rate(promptmill_write_events_count{{{INSTANCE}}}[$__rate_interval]))", "writes"),
                (f"sum(rate(promptmill_write_events_sum{{{INSTANCE}}}[$__rate_interval]))", "events"),
            ),
        ),
        Panel(
            "Loop lag p99",
            "How late the event loop of each process is.",
            "s",
            quantiles("promptmill_loop_lag_seconds", "instance", INSTANCE, 0.99),
        ),
        Panel(
            "Claims, by outcome",
            "Messages a second that were looked at: claimed, or why not.",
            "ops",
            rate("promptmill_claims_total", "outcome", INSTANCE),
            stacked=True,
        ),
        Panel(
            "Jobs that left a worker",
            "A second: stopped here from outside, given back to a queue, refused writes.",
            "ops",
            (
                *rate("promptmill_stops_total", "why", INSTANCE),
                (f"sum(rate(promptmill_fenced_writes_total{{{INSTANCE}}}[$__rate_interval]))", "fenced writes"),
                *rate("promptmill_requeued_jobs_total", "phase"),
            ),
        ),
        Panel(
            "Deaths and lost messages",
            "Within ten minutes: workers that were found dead, messages that were sent again. And jobs of dead workers"
            " that stand on the list of `promptmill job dead`; reading it takes off those that ran again.",
            "short",
            (
                ("sum(increase(promptmill_dead_workers_total[10m]))", "dead workers"),
                ("sum(increase(promptmill_resent_messages_total[10m]))", "messages sent again"),
                ("max(promptmill_given_up_jobs)", "on the list of job dead"),
            ),
        ),
        Panel(
            "Quarantine, by outcome",
            "Jobs an hour that ran alone, by what became of their process.",
            "short",
            (("sum by (outcome) (increase(promptmill_quarantined_jobs_total[1h]))", "{{outcome}}"),),
        ),
        Panel(
            "Programs",
            "That run now. More than running jobs is a leak.",
            "short",
            ((f"promptmill_programs{{{INSTANCE}}}", "{{instance}}"),),
        ),
        Panel(
            "Programs started and killed",
            "A second; killed are those that had not ended by themselves.",
            "ops",
            (
                (f"sum(rate(promptmill_programs_started_total{{{INSTANCE}}}[$__rate_interval]))", "started"),
                (f"sum(rate(promptmill_programs_killed_total{{{INSTANCE}}}[$__rate_interval]))", "killed"),
            ),
        ),
        Panel(
            "Unsent",
            "Events that the store does not have yet.",
            "bytes",
            ((f"promptmill_unsent_bytes{{{INSTANCE}}}", "{{instance}}"),),
        ),
        Panel(
            "Since the last heartbeat",
            "Normal is up to heartbeat_s (2 s); after dead_after_s (10 s) the worker's jobs run elsewhere.",
            "s",
            ((f"promptmill_heartbeat_age_seconds{{{INSTANCE}}}", "{{instance}}"),),
        ),
        Panel(
            "Sweeps",
            "Looks at the outbox a second, of all processes; one every heartbeat_s is normal.",
            "ops",
            (("sum(rate(promptmill_sweeps_total[$__rate_interval]))", "sweeps"),),
        ),
        Panel(
            "Memory",
            "Resident, of each process.",
            "bytes",
            ((f"process_resident_memory_bytes{{{INSTANCE}}}", "{{instance}}"),),
        ),
        Panel(
            "CPU",
            "Cores that each process uses; an event loop can use one.",
            "short",
            ((f"rate(process_cpu_seconds_total{{{INSTANCE}}}[$__rate_interval])", "{{instance}}"),),
        ),
        Panel(
            "Open files",
            "Share of the file descriptors that each process may open.",
            "percentunit",
            ((f"process_open_fds{{{INSTANCE}}} / process_max_fds{{{INSTANCE}}}", "{{instance}}"),),
        ),
        Panel(
            "Uptime",
            "Since each process began.",
            "s",
            ((f"time() - process_start_time_seconds{{{INSTANCE}}}", "{{instance}}"),),
        ),
    ),
)
