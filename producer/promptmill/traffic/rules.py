"""The words and the numbers of traffic: admissions, verdicts, and when a model counts as sick."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal
from urllib.parse import urlsplit

import orjson

from promptmill.failures import classify
from promptmill.settings import ModelConfig, ModelLimits

Reason = Literal["cooldown", "concurrency", "requests", "tokens"]
Verdict = Literal["ok", "sick", "neutral"]

_UNREACHABLE: Final = frozenset({"unreachable", "timeout_connect"})
"""Failures of the way to the host: they say nothing of the model, and something of every model there."""
_ANSWERED: Final = frozenset({None, "refused", "bad_request", "context_too_long"})
_US: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Rules:
    """When a breaker opens, and for how long things hold. The same in all workers of a fleet.

    A breaker opens after ``sick_in_row`` failures without a success between them, or ``sick_of_last`` of the last
    ``last``; it stays open for ``backoff_s``, doubled with each probe that fails, at most ``backoff_max_s``.
    """

    sick_in_row: int = 5
    sick_of_last: int = 10
    last: int = 20
    backoff_s: float = 1.0
    backoff_max_s: float = 60.0
    hold_max_s: float = 300.0
    """A provider's own wait is believed up to here."""
    cut_every_s: float = 1.0
    """A learned cap is halved no more often, so that one burst of 429 counts once."""
    cap_s: float = 600.0
    """How long a learned cap outlives the last 429."""
    oks_a_step: int = 10
    """So many successes raise a learned cap by one."""
    lease_s: float = 15.0
    renew_s: float = 5.0
    refresh_s: float = 3.0

    def to_json(self) -> bytes:
        """As the scripts take them, durations in µs."""
        fields: dict[str, Any] = asdict(self)
        return orjson.dumps({k: int(v * _US) if k.endswith("_s") else v for k, v in fields.items()})


@dataclass(slots=True, weakref_slot=True)
class Admission:
    """Whether a call may be made now, and if not, for how long to wait before asking again, and what for.

    A granted one must be handed to :meth:`Traffic.report`, however the call ended. One that is dropped instead gives
    its place back when its lease runs out.
    """

    granted: bool
    wait_s: float = 0.0
    reason: Reason | None = None
    model: str = ""
    host: str = ""
    user: str = ""
    """A digest."""
    tokens: int = 0
    """The estimate that was charged."""
    limits: ModelLimits = field(default_factory=ModelLimits)
    lease: str = ""
    """Its member of the running calls."""
    leased: bool = False
    probes: dict[str, str] = field(default_factory=dict[str, str])
    """The subjects whose only call this is, and the tokens that show it."""
    reported: bool = False

    @property
    def probe(self) -> bool:
        """True where this call is to find out whether the model is well again."""
        return bool(self.probes)


def model_subject(name: str) -> str:
    """A model, as keys and messages name it."""
    return f"model:{name}"


def host_subject(config: ModelConfig) -> str:
    """What a model's connections go to: its address, or the type of backend, whose own default address it then is."""
    if config.api_url is None:
        return f"host:{config.type}"
    # Braces would end the keys' hash tag early; no valid host has any.
    return "host:" + urlsplit(config.api_url).netloc.rpartition("@")[2].replace("{", "").replace("}", "")


def verdicts(code: str | None) -> tuple[Verdict, Verdict]:
    """What the end of an attempt says of the model and of its host. ``code`` is None for a success.

    A refusal is an answer. What neither shows health nor sickness (a cancelled job, a cut stream) is neutral.
    """
    if code in _ANSWERED:
        return "ok", "ok"
    if code in _UNREACHABLE:
        return "neutral", "sick"
    if code is not None and classify(code).sick:
        return "sick", "ok"
    return "neutral", "neutral"
