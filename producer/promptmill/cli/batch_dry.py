"""``promptmill batch run --dry-run``: what would be asked, and what it would cost about."""

from __future__ import annotations

import asyncio

from promptmill.batch.files.checking import BadInput
from promptmill.batch.files.records import Input
from promptmill.settings import Settings

from . import exits
from .batch_options import BatchOptions
from .batch_prepare import Estimate, Prepared, check, estimate, line_reader, refuse_over
from .batch_run import tell_bad_lines
from .models_ask import look
from .output import out, out_json, printable, table


def dry_run(settings: Settings, options: BatchOptions, *, as_json: bool) -> int:
    """Check an input and say what it asks for; no provider is asked, and nothing is stored. Answers the exit code.

    Raises BadRequest as the run itself would.
    """
    with Input.open(options.input) as source:
        registry = asyncio.run(look(settings)).registry
        reader = line_reader(source, options, settings, registry)
        try:
            prepared = check(source, reader, options)
        except BadInput as err:
            tell_bad_lines(err, as_json=as_json)
            raise
        estimates = estimate(prepared.plan, registry, settings)
        if as_json:
            out_json(_data(prepared, estimates))
        else:
            out(printable(_text(prepared, estimates)))
        if options.max_cost_usd is not None:
            refuse_over(estimates, options.max_cost_usd)
    return exits.OK


def _data(prepared: Prepared, estimates: list[Estimate]) -> dict[str, object]:
    plan = prepared.plan
    return {
        "event": "dry_run",
        "format": prepared.form.name,
        "lines": len(plan),
        "input_lines": plan.input_lines,
        "equal_lines": _equal(prepared),
        "left_out": [{"line": bad.number, "code": bad.code, "message": bad.message} for bad in plan.bad],
        "models": [
            {
                "model": one.model,
                "lines": one.lines,
                "input_tokens": one.input_tokens,
                "output_tokens_max": one.output_max,
                "min_usd": one.min_usd,
                "max_usd": one.max_usd,
            }
            for one in estimates
        ],
    }


def _text(prepared: Prepared, estimates: list[Estimate]) -> str:
    plan = prepared.plan
    of = f" of {plan.input_lines:,}" if len(plan) < plan.input_lines else ""
    lines = [f"{len(plan):,}{of} lines of {prepared.source.name}, format {prepared.form.name}"]
    if equal := _equal(prepared):
        lines.append(f"{equal:,} of them are equal to others and run once")
    lines += [f"left out: {bad}" for bad in plan.bad[:20]]
    if len(plan.bad) > 20:
        lines.append(f"left out: {len(plan.bad):,} lines in all")
    rows = [
        (
            one.model,
            f"{one.lines:,}",
            f"{one.input_tokens:,}",
            "no bound" if one.output_max is None else f"at most {one.output_max:,}",
            _cost(one),
        )
        for one in estimates
    ]
    lines += ["", table([("MODEL", "LINES", "TOKENS IN", "TOKENS OUT", "DOLLARS"), *rows]), ""]
    lines.append("estimated at 4 bytes a token, pictures not counted; nothing was sent")
    return "\n".join(lines)


def _cost(one: Estimate) -> str:
    if one.min_usd is None:
        return "not known"
    if one.max_usd is None:
        return f"{one.min_usd:.4f} and the output"
    return f"{one.min_usd:.4f} to {one.max_usd:.4f}"


def _equal(prepared: Prepared) -> int:
    return sum(prepared.plan.same_as(index) is not None for index in range(len(prepared.plan)))
