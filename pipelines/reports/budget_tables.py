"""Tables of a model's costs."""

from __future__ import annotations

from collections import Counter

from model.costs import PARAMETER_RULE, WEIGHTING, CostModel, times
from model.wording import count
from pipelines.reports.budget import Budget
from pipelines.reports.cache_measurement import MEASUREMENT_RULE
from pipelines.reports.counting import format_bytes
from pipelines.reports.terminal import print_table


def print_budget(budget: Budget) -> None:
    """Print all tables, each followed by the rules of its figures."""
    config, own, n = budget.config, budget.own, budget.context
    schedule = ", ".join(f"{count} {name}" for name, count in Counter(config.layers).items())
    print(
        f"{own.name}: {count(config.num_layers, 'layer')} ({schedule}), hidden {config.hidden_size}, at {n:,} tokens\n"
    )

    rows = [
        [name, f"{total:,}", f"{active:,}"]
        for name, (total, active) in sorted(budget.parameters.components.items(), key=lambda item: -item[1][0])
    ]
    rows.append(["total", f"{budget.parameters.total:,}", f"{budget.parameters.active:,}"])
    if budget.parameters.mtp:
        rows.append(["additional: multi-token module", f"{budget.parameters.mtp:,}", ""])
    print_table("parameters", ["component", "all", "active per token"], rows)
    _print_rules(PARAMETER_RULE)

    rows = [[part, _format_number(each), format_bytes(each * n)] for part, each in own.per_token.items()]
    rows += [[f"{part} (fixed state)", "", format_bytes(each)] for part, each in own.fixed.items()]
    rows.append(["total", _format_number(own.bytes_per_token), format_bytes(own.cache_bytes(n))])
    print_table("cache of one sequence", ["component", "bytes per token", f"at {n:,} tokens"], rows)
    _print_rules(own.rule)
    if budget.measurement is not None:
        columns = ["component", "closed form, bytes", "measured", "difference"]
        print_table("cache, measured", columns, budget.measurement.rows())
        _print_rules(MEASUREMENT_RULE)

    rows = [[w.part, w.format, _format_giga(w.flops), _format_giga(w.equivalent)] for w in own.work(n)]
    rows.append(["total", "", _format_giga(own.flops(n)), _format_giga(own.equivalent(n))])
    print_table("decoding one token", ["part", "format", "GFLOP", "GFLOP, FP8 equivalents"], rows)
    _print_rules(f"a multiply-add is 2 FLOPs; {WEIGHTING}")

    rows = [_cost_row(account.name, account, budget) for account in (own, *budget.references)]
    print_table("beside references; ratio: to the model's own", _COST_COLUMNS, rows)
    _print_rules(*(f"{account.name}: {account.rule}" for account in budget.references))

    rows = [_cost_row(own.name, own, budget)]
    for choice in budget.ablations:
        rows.append(_cost_row(f"without {choice.name}" + ("" if choice.used else " (not used)"), choice.costs, budget))
    print_table("without each choice; ratio: to the model's own", _COST_COLUMNS, rows)
    _print_rules(*(f"{choice.name}: becomes {choice.taken_away}" for choice in budget.ablations if choice.used))

    changes = [(choice, change) for choice in budget.ablations for change in choice.changes]
    if changes:
        rows = [
            [f"{choice.name}: {change.what}", *map(_format_number, (change.with_choice, change.without)), change.unit]
            for choice, change in changes
        ]
        print_table("other effects of each choice", ["choice", "with it", "without it", "unit"], rows)
        _print_rules(*(f"{change.what}: {change.rule}" for _, change in changes))

    rows = [
        [
            f"{step.name}: {step.rule}",
            _format_number(step.bytes_per_token),
            "" if i == 0 else _format_ratio(step.factor),
        ]
        for i, step in enumerate(budget.waterfall)
    ]
    total = times(budget.waterfall[0].bytes_per_token, own.bytes_per_token)
    rows.append(["all factors multiplied", _format_number(own.bytes_per_token), _format_ratio(total)])
    print_table("from GQA-8 in BF16 to this cache", ["stage", "bytes per token", "reduction"], rows)
    _print_rules("growing cache bytes per token, fixed state left out; a factor below 1 is an increase")

    rows = [[r.name, _format_tokens(r.tokens), _format_tokens(r.tokens_equivalent)] for r in budget.crossovers]
    print_table("crossover lengths", ["from this length on", "tokens", "tokens, FP8 equivalents"], rows)
    _print_rules(*dict.fromkeys(regime.rule for regime in budget.crossovers))


_COST_COLUMNS = [
    "network",
    "bytes per token",
    "ratio",
    "total cache",
    "ratio",
    "GFLOP",
    "ratio",
    "FP8 equivalents",
    "ratio",
]


def _cost_row(name: str, account: CostModel, budget: Budget) -> list[str]:
    own, n = budget.own, budget.context
    return [
        name,
        _format_number(account.bytes_per_token),
        _format_ratio(times(account.bytes_per_token, own.bytes_per_token)),
        format_bytes(account.cache_bytes(n)),
        _format_ratio(times(account.cache_bytes(n), own.cache_bytes(n))),
        _format_giga(account.flops(n)),
        _format_ratio(times(account.flops(n), own.flops(n))),
        _format_giga(account.equivalent(n)),
        _format_ratio(times(account.equivalent(n), own.equivalent(n))),
    ]


def _print_rules(*rules: str) -> None:
    for rule in rules:
        print(f"  {rule}")
    print()


def _format_number(x: float) -> str:
    return f"{x:,.4f}".rstrip("0").rstrip(".")


def _format_ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def _format_giga(flops: float) -> str:
    return f"{flops / 1e9:,.3f}" if flops >= 1e6 else f"{flops / 1e9:.6f}"


def _format_tokens(tokens: int | None) -> str:
    return "never" if tokens is None else f"{tokens:,}"
