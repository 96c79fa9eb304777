"""Is it well?"""

from __future__ import annotations

from typing import Final

from ops.grafana.pages.panels import FAMILY, MODEL, NOT_OURS, Page, Panel, quantiles, rate, stat

OVERVIEW: Final = Page(
    "overview",
    "overview",
    "Is it well? What users see first, then why.",
    ("family", "model"),
    (
        stat("Running", "Jobs that run now.", "short", "sum(family:promptmill_fleet_running_jobs:max)"),
        stat(
            "Waiting",
            "Jobs that wait, in whichever queue or for their time.",
            "short",
            "max(promptmill_waiting_jobs)",
        ),
        stat(
            "Oldest interactive",
            "How long the interactive job that waits longest has waited.",
            "s",
            'max(family_priority:promptmill_queue_oldest_seconds:max{priority="interactive"})',
            bad=120,
        ),
        stat(
            "Failed",
            "Share of the jobs that ended in ten minutes and failed or expired, without what was the request's fault.",
            "percentunit",
            f'sum(state_code:promptmill_jobs:rate10m{{state=~"failed|expired", {NOT_OURS}}})'
            ' / sum(state_code:promptmill_jobs:rate10m{state!="cancelled"}) or vector(0)',
            bad=0.05,
        ),
        stat(
            "Ready workers",
            "Worker processes that claim jobs.",
            "short",
            'sum(family_state:promptmill_fleet_workers:max{state="ready"})',
        ),
        stat("Readers", "Streams that are open, at all gateways and relays.", "short", "max(promptmill_fleet_readers)"),
        stat(
            "Cost today",
            "What attempts that ended since midnight UTC cost.",
            "currencyUSD",
            "sum(max by (model) (promptmill_today_cost_dollars))",
        ),
        stat(
            "Given up",
            "Jobs of the last day that ended as poisoned, or lost six workers: `promptmill job dead list`.",
            "short",
            'sum(increase(promptmill_jobs_total{state="failed", code=~"poisoned|crashed", model=""}[24h]))'
            " or vector(0)",
            bad=1,
        ),
        Panel(
            "Alerts that fire",
            "Each has a section in docs/runbook.md.",
            "none",
            (('ALERTS{alertname=~"Promptmill.*", alertstate="firing"}', ""),),
            kind="table",
            width=24,
            height=6,
        ),
        Panel(
            "Jobs that end, by state",
            "A second. Each job is counted once, by whoever stored its end.",
            "ops",
            rate("promptmill_jobs_total", "state"),
            stacked=True,
        ),
        Panel(
            "Failures, by code",
            "Jobs a second that failed or expired; docs/reference/errors.md says what each code means.",
            "ops",
            rate("promptmill_jobs_total", "code", 'state=~"failed|expired"'),
            stacked=True,
        ),
        Panel(
            "Waiting, by queue",
            "Messages in the broker, and lines of batches that are next.",
            "short",
            ((f"family_priority:promptmill_queue_jobs:max{{{FAMILY}}}", "{{family}} {{priority}}"),),
            stacked=True,
        ),
        Panel(
            "Oldest, by queue",
            "How long the job that was seen to wait longest has waited.",
            "s",
            ((f"family_priority:promptmill_queue_oldest_seconds:max{{{FAMILY}}}", "{{family}} {{priority}}"),),
        ),
        Panel(
            "Slots",
            "Jobs that run, and that ready workers may run at once.",
            "short",
            (
                (f"family:promptmill_fleet_running_jobs:max{{{FAMILY}}}", "{{family}} running"),
                (f"family:promptmill_fleet_slots:max{{{FAMILY}}}", "{{family}} slots"),
            ),
        ),
        Panel(
            "Workers, by state",
            "Worker processes that are alive.",
            "short",
            ((f"family_state:promptmill_fleet_workers:max{{{FAMILY}}} > 0", "{{family}} {{state}}"),),
            stacked=True,
        ),
        Panel(
            "First token, by model",
            "From the begin of an attempt to its first token.",
            "s",
            quantiles("promptmill_first_token_seconds", "model", MODEL, 0.5, 0.95, 0.99),
        ),
        Panel(
            "Time in the queue",
            "From the moment a job waits to its claim.",
            "s",
            quantiles("promptmill_queue_seconds", "priority", "", 0.5, 0.95, 0.99),
        ),
        Panel(
            "Whole job",
            "From a job's submission to its end.",
            "s",
            quantiles("promptmill_job_seconds", "priority", "", 0.5, 0.95, 0.99),
        ),
        Panel(
            "Cost today, by model",
            "What attempts that ended since midnight UTC cost, by the ledger.",
            "currencyUSD",
            ((f"max by (model) (promptmill_today_cost_dollars{{{MODEL}}})", "{{model}}"),),
            stacked=True,
        ),
        Panel(
            "Submitted, by priority",
            "Jobs a second that gateways, workers and batches stored.",
            "ops",
            rate("promptmill_submitted_jobs_total", "priority"),
            stacked=True,
        ),
        Panel(
            "Batches and servers",
            "Batches that have not ended; gateways and relays that are alive.",
            "short",
            (
                ("max(promptmill_open_batches)", "open batches"),
                ("max by (kind) (promptmill_fleet_servers)", "{{kind}}"),
            ),
        ),
    ),
)
