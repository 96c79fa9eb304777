"""The input of a batch, read and checked, and what it will cost as far as that is known before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from promptmill.batch.files.checking import (
    Amounts,
    Plan,
    check_input,
    locate_lines,
    sample_of,
)
from promptmill.batch.files.format import Format
from promptmill.batch.files.formats import format_of
from promptmill.batch.files.lines import LineReader
from promptmill.batch.files.records import Input
from promptmill.contract import Usage
from promptmill.errors import BadRequest
from promptmill.registry import Registry
from promptmill.routing import decide
from promptmill.settings import Settings
from promptmill.usage.prices import price

from .batch_options import BatchOptions


@dataclass(slots=True)
class Prepared:
    """An input, how its lines are read, and where they stand."""

    source: Input
    reader: LineReader
    plan: Plan

    @property
    def form(self) -> Format:
        """The format of the lines, and of the answers."""
        return self.reader.format


def line_reader(source: Input, options: BatchOptions, settings: Settings, registry: Registry) -> LineReader:
    """How lines of an input are read. Raises BadRequest where its format cannot be what the options say."""
    form = format_of(source, options.form, settings.limits.request_bytes)
    known_as: dict[str, str] = {}
    for name, config in registry.models.items():
        if config.model_name is not None and config.model_name not in registry.models:
            known_as.setdefault(config.model_name, name)
    return LineReader(form, settings.limits, options.overrides, known_as)


def check(
    source: Input, reader: LineReader, options: BatchOptions, seen: Callable[[int, int], None] | None = None
) -> Prepared:
    """Check every line; see :func:`promptmill.batch.files.checking.check_input`."""
    plan = check_input(source, reader, dedupe=options.dedupe, skip_bad=options.skip_bad, seen=seen)
    if options.sample is not None:
        plan = sample_of(plan, source, reader, options.sample)
    return Prepared(source, reader, plan)


def check_again(source: Input, reader: LineReader, options: BatchOptions, skipped: frozenset[int]) -> Prepared:
    """The same for an input that was checked before and is uploaded: only where its lines stand."""
    plan = locate_lines(source, reader, skipped)
    if options.sample is not None:
        plan = sample_of(plan, source, reader, options.sample)
    return Prepared(source, reader, plan)


# -- cost ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Estimate:
    """What the lines of one model ask for. Tokens are estimated; None: not known.

    ``output_max`` is None where a line has no ``max_tokens``. ``min_usd`` is the input alone, ``max_usd`` with all the
    output that ``max_tokens`` permits.
    """

    model: str
    lines: int = 0
    input_tokens: int = 0
    output_max: int | None = 0
    min_usd: float | None = None
    max_usd: float | None = None

    def add(self, amounts: Amounts) -> None:
        """More lines."""
        self.lines += amounts.lines
        self.input_tokens += amounts.input_tokens
        if amounts.unbounded or self.output_max is None:
            self.output_max = None
        else:
            self.output_max += amounts.output_max


def estimate(plan: Plan, registry: Registry, settings: Settings) -> list[Estimate]:
    """What a plan asks for, by model. Raises BadRequest, with the line's number, where nothing answers a line."""
    found: dict[str, Estimate] = {}
    for amounts in plan.choices.values():
        name = _model_of(amounts, registry, settings)
        found.setdefault(name, Estimate(name)).add(amounts)
    for one in found.values():
        config = registry.models.get(one.model)
        if config is not None:
            one.min_usd = _dollars(price(config, Usage(input_tokens=one.input_tokens)))
            if one.output_max is not None:
                used = Usage(input_tokens=one.input_tokens, output_tokens=one.output_max)
                one.max_usd = _dollars(price(config, used))
    return list(found.values())


def _dollars(amount: object) -> float | None:
    return None if amount is None else float(str(amount))


def _model_of(amounts: Amounts, registry: Registry, settings: Settings) -> str:
    try:
        return decide(registry, amounts.example).first.name
    except BadRequest as err:
        if settings.models:
            raise of_line(err, amounts) from None
        # Workers may know more than a configuration without models does.
        return amounts.example.model or amounts.example.role or "?"


def of_line(error: BadRequest, amounts: Amounts) -> BadRequest:
    """The error with the number of the first line that has it."""
    where = f"line {amounts.first_number}" if amounts.lines == 1 else f"{amounts.lines} lines, from line"
    where = where if amounts.lines == 1 else f"{where} {amounts.first_number} on"
    return BadRequest(f"{where}: {error.message}", code=error.code, field=error.field)


def total_min_usd(estimates: list[Estimate]) -> float:
    """What a batch costs at least, as far as prices are known."""
    return sum(one.min_usd or 0.0 for one in estimates)


def refuse_over(estimates: list[Estimate], max_cost_usd: float) -> None:
    """Raise ``budget_exceeded`` where even the input alone costs more."""
    least = total_min_usd(estimates)
    if least > max_cost_usd:
        raise BadRequest(
            f"the prompts alone cost about ${least:.2f}, over --max-cost {max_cost_usd:g}; nothing was sent",
            code="budget_exceeded",
            field="max_cost",
            limit=max_cost_usd,
        )
