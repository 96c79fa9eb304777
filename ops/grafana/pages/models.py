"""How models answer, and what they cost."""

from __future__ import annotations

from typing import Final

from ops.grafana.pages.panels import MODEL, Page, Panel, quantiles, rate

MODELS: Final = Page(
    "models",
    "models and cost",
    "How models answer, and what they cost.",
    ("model",),
    (
        Panel(
            "Attempts, by model",
            "Calls a second that ended.",
            "ops",
            rate("promptmill_attempts_total", "model", MODEL),
            stacked=True,
        ),
        Panel(
            "Attempts, by outcome",
            "A second: succeeded, or an error code.",
            "ops",
            rate("promptmill_attempts_total", "outcome", MODEL),
            stacked=True,
        ),
        Panel(
            "Failed attempts, by model",
            "Share of the attempts within ten minutes, without what was the request's fault.",
            "percentunit",
            (
                (
                    "sum by (model) (model_outcome:promptmill_attempts:rate10m{"
                    f'outcome!~"succeeded|refused|bad_request|context_too_long|cancelled", {MODEL}}})'
                    f" / sum by (model) (model_outcome:promptmill_attempts:rate10m{{{MODEL}}})",
                    "{{model}}",
                ),
            ),
        ),
        Panel(
            "Held back",
            "Models and hosts that are not asked, or less: open and half-open breakers, waits, fewer calls at once.",
            "short",
            (("kind_state:promptmill_held_models:max > 0", "{{kind}} {{state}}"),),
            stacked=True,
        ),
        Panel(
            "First token",
            "From the begin of an attempt to its first token.",
            "s",
            quantiles("promptmill_first_token_seconds", "model", MODEL, 0.5, 0.95, 0.99),
        ),
        Panel(
            "Whole attempt",
            "From its begin to its end.",
            "s",
            quantiles("promptmill_attempt_seconds", "model", MODEL, 0.5, 0.95, 0.99),
        ),
        Panel(
            "Tokens, by kind",
            "A second: input, output, read from the provider's cache, written to it.",
            "ops",
            rate("promptmill_tokens_total", "kind", MODEL),
            stacked=True,
        ),
        Panel(
            "Tokens, by model",
            "A second, of all kinds.",
            "ops",
            rate("promptmill_tokens_total", "model", MODEL),
            stacked=True,
        ),
        Panel(
            "Cost, an hour",
            "What attempts cost at the rate of the last hour.",
            "currencyUSD",
            ((f"sum by (model) (rate(promptmill_cost_dollars_total{{{MODEL}}}[1h])) * 3600", "{{model}}"),),
            stacked=True,
        ),
        Panel(
            "Cost today",
            "By the ledger, since midnight UTC.",
            "currencyUSD",
            ((f"max by (model) (promptmill_today_cost_dollars{{{MODEL}}})", "{{model}}"),),
            stacked=True,
        ),
        Panel(
            "Tokens today",
            "By the ledger, since midnight UTC.",
            "short",
            ((f"max by (model) (promptmill_today_tokens{{{MODEL}}})", "{{model}}"),),
            stacked=True,
        ),
        Panel(
            "Attempts today",
            "By the ledger, since midnight UTC.",
            "short",
            ((f"max by (model) (promptmill_today_attempts{{{MODEL}}})", "{{model}}"),),
            stacked=True,
        ),
        Panel(
            "Jobs, by backend",
            "That ended, a second, with the model that was asked last.",
            "ops",
            rate("promptmill_jobs_total", "backend, state", MODEL),
            stacked=True,
        ),
        Panel(
            "Paused for their login",
            "Models that a worker does not ask until a person renews their login.",
            "short",
            (("promptmill_worker_paused_models > 0", "{{instance}}"),),
        ),
    ),
)
