"""Prices: the configuration's own, the installed table's, and none."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from functools import partial

import genai_prices
import pytest

from promptmill.contract import JobRequest, Usage, parse_request
from promptmill.errors import ConfigError
from promptmill.settings import Budget, ModelConfig, Price, Settings, UserConfig, load_settings
from promptmill.usage import estimates, price, settled_usage, warm
from promptmill.usage.estimates import TextSizes

USAGE = Usage(input_tokens=1_000, output_tokens=200, cache_read_tokens=300, cache_write_tokens=50)
NOON = datetime(2026, 11, 2, 12, tzinfo=UTC)


def api(model: str = "claude-sonnet-4-6") -> ModelConfig:
    return ModelConfig(type="anthropic_api", model_name=model)


@pytest.mark.parametrize(
    ("config", "provider"),
    [
        (api(), "anthropic"),
        (ModelConfig(type="claude_cli", model_name="claude-opus-4-1"), "anthropic"),
        (ModelConfig(type="gemini_api", model_name="gemini-2.5-pro"), "google"),
        (ModelConfig(type="gemini_cli", model_name="gemini-2.5-flash"), "google"),
        (ModelConfig(type="local_openai", model_name="gpt-4o-mini", api_url="https://api.openai.com/v1"), "openai"),
        (ModelConfig(type="local_openai", model_name="deepseek-chat", api_url="https://api.deepseek.com"), "deepseek"),
    ],
)
@pytest.mark.parametrize("times", [1, 300])
def test_a_price_is_that_of_the_table(config: ModelConfig, provider: str, times: int) -> None:
    usage = Usage(**{name: count * times for name, count in USAGE.model_dump(exclude={"estimated"}).items()})
    listed = genai_prices.calc_price(
        genai_prices.Usage(
            # The table's input is the whole of it, cached tokens included.
            input_tokens=usage.input_tokens + usage.cache_read_tokens + usage.cache_write_tokens,
            output_tokens=usage.output_tokens,
            cache_read_tokens=usage.cache_read_tokens,
            cache_write_tokens=usage.cache_write_tokens,
        ),
        config.model_name or "",
        provider_id=provider,
        genai_request_timestamp=NOON,
    )
    assert price(config, usage, NOON) == listed.total_price
    assert listed.total_price > 0


def test_sonnets_price_is_the_one_that_its_provider_publishes() -> None:
    million = Usage(input_tokens=10_000, output_tokens=10_000, cache_read_tokens=10_000, cache_write_tokens=10_000)
    assert price(api(), million) == Decimal(3 + 15) / 100 + Decimal("0.3") / 100 + Decimal("3.75") / 100


def test_the_configurations_price_wins_over_the_table() -> None:
    config = api().model_copy(update={"price": Price(input=1, output=2, cache_read=0.5, cache_write=4)})
    assert price(config, USAGE) == Decimal("0.001") + Decimal("0.0004") + Decimal("0.00015") + Decimal("0.0002")


def test_cached_tokens_cost_as_much_as_input_where_nothing_else_is_said() -> None:
    assert price(ModelConfig(type="echo", price=Price(input=1, output=2)), USAGE) == Decimal("0.00175")


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(type="echo"),
        api("a-model-that-nobody-sells"),
        ModelConfig(type="claude_cli"),
        ModelConfig(type="local_openai", model_name="gpt-4o-mini", api_url="http://127.0.0.1:11434/v1"),
    ],
)
def test_what_nobody_sells_has_no_price(config: ModelConfig) -> None:
    assert price(config, USAGE) is None


def test_the_table_is_searched_once_for_each_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A price is asked for with every attempt, in the event loop."""
    config = api()
    warm([config])
    known = price(config, USAGE, NOON)

    def search() -> None:
        raise AssertionError("the table is searched again")

    monkeypatch.setattr("genai_prices.data_snapshot.get_snapshot", search)
    assert known is not None
    assert price(config, USAGE, NOON) == price(api(), USAGE, NOON) == known
    with pytest.raises(AssertionError, match="searched again"):
        price(api("a-model-that-nobody-asked-for-yet"), USAGE, NOON)


def test_the_configuration_holds_prices_and_budgets(tmp_path) -> None:
    file = tmp_path / "promptmill.toml"
    file.write_text(
        """
budget = { soft_usd = 1, hard_usd = 2 }
[models.mine]
type = "echo"
price = { input = 3, output = 15, cache_read = 0.3, cache_write = 3.75 }
[users.ann]
budget = { hard_usd = 50, hard_tokens = 1000 }
[users.bob.roles]
"""
    )
    settings = load_settings(file)
    assert settings.models["mine"].price == Price(input=3, output=15, cache_read=0.3, cache_write=3.75)
    assert settings.budget_of("ann") == Budget(soft_usd=1, hard_usd=50, hard_tokens=1000)
    assert settings.budget_of("bob") == settings.budget_of("eve") == Budget(soft_usd=1, hard_usd=2)


def test_a_budget_of_ones_own_needs_none_of_the_settings() -> None:
    settings = Settings(users={"ann": UserConfig(budget=Budget(hard_tokens=5))})
    assert settings.budget_of("ann") == Budget(hard_tokens=5)
    assert settings.budget_of("bob") is None


@pytest.mark.parametrize(
    "line", ["budget = { hard_usd = -1 }", "budget = { hard = 1 }", "budget = { soft_usd = inf }", "budget = 5"]
)
def test_a_budget_that_makes_no_sense_is_refused(tmp_path, line: str) -> None:
    file = tmp_path / "promptmill.toml"
    file.write_text(line)
    with pytest.raises(ConfigError, match="budget"):
        load_settings(file)


def asked(text: str) -> JobRequest:
    return parse_request({"prompt": text})


def test_what_an_attempt_used_is_what_was_counted_and_no_less_than_what_came() -> None:
    request, settled_usage = asked("x" * 40), partial(estimates.settled_usage, sizes=TextSizes())
    begun, counted = Usage(input_tokens=12, output_tokens=1), Usage(input_tokens=12, output_tokens=90)
    # Whole: the provider knows best. Nothing came: it has counted the input.
    assert settled_usage(request, begun, 400, whole=True) is begun
    assert settled_usage(request, begun, 0, whole=False) is begun
    # Cut: the output was counted at its beginning only.
    assert settled_usage(request, begun, 400, whole=False) == Usage(input_tokens=12, output_tokens=100, estimated=True)
    # It thought more than it said.
    assert settled_usage(request, counted, 40, whole=False) is counted
    assert settled_usage(request, None, 400, whole=True) == Usage(input_tokens=10, output_tokens=100, estimated=True)
    assert settled_usage(request, None, 0, whole=False) is None


def test_the_size_of_a_token_is_learnt_by_model_and_forgotten_slowly() -> None:
    sizes = TextSizes()
    assert sizes.of("a") == 4
    sizes.learn("a", 10, 60)
    assert sizes.of("a") == 4
    sizes.learn("a", 90, 540)
    sizes.learn("b", 100, 200)
    assert (sizes.of("a"), sizes.of("b"), sizes.of("c")) == (6, 2, 4)
    sizes.learn("a", 0, 10)
    sizes.learn("a", 10, 0)
    assert sizes.of("a") == 6
    for _ in range(40):
        sizes.learn("a", 10_000, 30_000)
    assert 3 <= sizes.of("a") < 3.01
    half = settled_usage(asked("x"), None, 60, whole=False, model="b", sizes=sizes)
    assert half == Usage(input_tokens=1, output_tokens=30, estimated=True)


def test_a_whole_answer_that_was_counted_teaches_what_half_an_answer_is_estimated_by() -> None:
    sizes, request = TextSizes(), asked("x")
    for _ in range(2):
        settled_usage(request, Usage(output_tokens=50), 300, whole=True, model="m", sizes=sizes)
        settled_usage(request, Usage(output_tokens=50), 5000, whole=False, model="m", sizes=sizes)
    half = settled_usage(request, Usage(input_tokens=9, output_tokens=1), 120, whole=False, model="m", sizes=sizes)
    assert half == Usage(input_tokens=9, output_tokens=20, estimated=True)
