"""What tokens cost: the configuration's own price, else the table of ``genai-prices`` as it is installed.

The table is never updated over the network. It takes about a second and 36 MB to load, so it is loaded only where a
model needs it: :func:`warm` does it ahead of the first job.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from decimal import Decimal
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from promptmill.contract import Usage
from promptmill.settings import ModelConfig, Price

if TYPE_CHECKING:
    from genai_prices.types import ModelInfo, TieredPrices

_PROVIDERS: Final = {
    "anthropic_api": "anthropic",
    "claude_cli": "anthropic",
    "gemini_api": "google",
    "gemini_cli": "google",
}
_MILLION: Final = Decimal(1_000_000)
_ZERO: Final = Decimal(0)


def price(config: ModelConfig, usage: Usage, at: datetime | None = None) -> Decimal | None:
    """What ``usage`` of a model costs in dollars at a time (now); None where nobody knows its price.

    A provider's own statement of the cost wins over this; callers look for it first.
    """
    if config.price is not None:
        return _own(config.price, usage)
    info = _listed(config)
    if info is None:
        return None
    rates = info.get_prices(at or datetime.now(UTC))
    asked, cached, written = usage.input_tokens, usage.cache_read_tokens, usage.cache_write_tokens
    # Cached tokens count as input where a provider has no price of their own for them.
    plain = rates.input_mtok
    parts = (
        (asked, plain),
        (usage.output_tokens, rates.output_mtok),
        (cached, plain if rates.cache_read_mtok is None else rates.cache_read_mtok),
        (written, plain if rates.cache_write_mtok is None else rates.cache_write_mtok),
    )
    if any(tokens and rate is None for tokens, rate in parts):
        return None
    whole = asked + cached + written
    return sum((tokens * _rate(rate, whole) for tokens, rate in parts if tokens), _ZERO) / _MILLION


def warm(models: Iterable[ModelConfig]) -> None:
    """Load what :func:`price` needs for these models. Blocks for about a second; call it in a thread."""
    for config in models:
        if config.price is None:
            _listed(config)


def _own(own: Price, usage: Usage) -> Decimal:
    read = own.input if own.cache_read is None else own.cache_read
    written = own.input if own.cache_write is None else own.cache_write
    return (
        usage.input_tokens * _decimal(own.input)
        + usage.output_tokens * _decimal(own.output)
        + usage.cache_read_tokens * _decimal(read)
        + usage.cache_write_tokens * _decimal(written)
    ) / _MILLION


def _decimal(dollars: float) -> Decimal:
    return Decimal(repr(dollars))


def _rate(rate: Decimal | TieredPrices | None, input_tokens: int) -> Decimal:
    """A rate that changes with the length of the input holds for all tokens of the call."""
    if rate is None or isinstance(rate, Decimal):
        return rate or _ZERO
    return next((tier.price for tier in reversed(rate.tiers) if input_tokens > tier.start), rate.base)


def _listed(config: ModelConfig) -> ModelInfo | None:
    provider = _PROVIDERS.get(config.type)
    if config.model_name is None or (provider is None and config.type != "local_openai"):
        return None
    return _find(provider, None if provider else config.api_url, config.model_name)


@lru_cache(maxsize=4096)
def _find(provider: str | None, api_url: str | None, model: str) -> ModelInfo | None:
    try:
        # Optional, and slow to import.
        from genai_prices.data_snapshot import get_snapshot  # noqa: PLC0415
    except ModuleNotFoundError:
        return None
    try:
        return get_snapshot().find_provider_model(model, None, provider, api_url)[1]
    except LookupError:
        return None
