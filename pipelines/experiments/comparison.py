"""The comparison: the hybrid against other families of equal size, tokens and recipe."""

from __future__ import annotations

from pathlib import Path

from model.config import ModelConfig
from model.costs import CostModel, costs_of, count_parameters, ssa_costs, v32_costs, with_ssa
from model.errors import CacheError, ConfigError
from model.mixers.gqa import GroupedQueryAttention
from model.transformer import Transformer
from pipelines.experiments.ablation import runs_of
from pipelines.experiments.arms import Arm, comparison_arms
from pipelines.experiments.experiment import open_experiment, resolve_settings
from pipelines.experiments.outputs import command_line, publish
from pipelines.experiments.scoring import check_tasks
from pipelines.experiments.timing import DECODED, describe_machine, time_decoding, time_prefill
from pipelines.experiments.trials import plan
from pipelines.recipe.schema import Recipe
from pipelines.reports.cache_measurement import check_memory, measure_cache
from pipelines.reports.comparison import (
    PUBLISHED_LENGTH,
    ComparedArm,
    ComparisonResult,
    NetworkCosts,
    PublishedCosts,
    costs_figure,
    lengths_figure,
    quality_figure,
    tables,
)
from pipelines.reports.figures import LENGTHS
from pipelines.training.curriculum import total_tokens


def run_comparison(recipe: Recipe, write: Path | None) -> ComparisonResult:
    """Train and score all arms, measure their costs; log and print tables and figures. Raises FiftyfoldError."""
    recipe, manifest = resolve_settings(recipe)
    section, arms = recipe.compare, comparison_arms(recipe)
    longest = max(LENGTHS[-1], *(length + DECODED for length in section.timed_lengths))
    configs = {arm.name: _long(arm.recipe.model, longest) for arm in arms}
    for length in section.timed_lengths:
        try:
            check_memory(list(configs.values()), length + DECODED)
        except CacheError as error:
            raise CacheError(f"compare.timed_lengths: {error}") from error
    with open_experiment("compare", recipe, arms, manifest) as experiment:
        _check_tasks(arms, section.seeds[0])
        experiment.expect(len(arms) * (len(section.rates) + len(section.seeds)))
        rates = experiment.select_rates(arms)
        trials = [plan(arm, seed, rates[arm.name].rate, evaluated=True) for arm in arms for seed in section.seeds]
        results = experiment.run_seeds(trials)
        print(f"{section.name}: measuring caches and times", flush=True)
        decode = time_decoding(configs, section.timed_lengths)
        prompts = time_prefill(configs, section.timed_lengths, section.timed_prefill)
        compared = []
        for arm in arms:
            rate, parameters = rates[arm.name], _count(arm)
            compared.append(
                ComparedArm(
                    arm.name,
                    *parameters,
                    rate.rate,
                    rate.losses_by_name,
                    runs_of(next(t.recipe for t in trials if t.arm == arm.name), results[arm.name]),
                    _costs(costs_of(configs[arm.name]), configs[arm.name], section.max_measured_bytes),
                    decode[arm.name],
                    prompts[arm.name],
                )
            )
        ssa = _ssa_costs(list(configs.values()))
        result = ComparisonResult(
            section.name,
            command_line("compare"),
            list(section.seeds),
            total_tokens(recipe),
            recipe.data.sequence_length,
            list(section.timed_lengths),
            describe_machine(),
            compared,
            _costs(ssa, None, 0),
            ssa.rule,
            published_costs(),
        )
        figures = {"families-costs": costs_figure(result), "families-quality": quality_figure(result)}
        lengths = lengths_figure(result)
        if lengths is not None:
            figures["families-lengths"] = lengths
        means = {f"{arm.name}/{name}": mean for arm in compared for name, mean in arm.runs.means.items()}
        experiment.tracked.log_metrics(means)
        publish(experiment.tracked, "compare", result.to_dict(), tables(result), figures, write)
    return result


def _check_tasks(arms: list[Arm], seed: int) -> None:
    """Raise ConfigError for tasks that an arm cannot be scored on, unless it has been scored before."""
    for arm in arms:
        try:
            if not plan(arm, seed, 1.0, evaluated=True).evaluation_file.exists():
                check_tasks(arm.recipe)
        except ConfigError as error:
            raise ConfigError(f"compare: arm {arm.name}: {error}") from None


def _long(config: ModelConfig, tokens: int) -> ModelConfig:
    """Return the configuration for sequences of up to ``tokens`` tokens."""
    return config.replace(max_positions=max(tokens, config.max_positions))


def _ssa_costs(configs: list[ModelConfig]) -> CostModel:
    """Return the assumption about SSA with the cache of the arm of grouped-query attention, if there is one."""
    dense = next((c for c in configs if set(c.mixers) == {GroupedQueryAttention}), None)
    return ssa_costs(configs[0]) if dense is None else with_ssa(costs_of(dense))


def _count(arm: Arm) -> tuple[int, int]:
    count = count_parameters(Transformer.on_meta(arm.recipe.model))
    return count.total, count.active


def _costs(costs: CostModel, config: ModelConfig | None, limit: int) -> NetworkCosts:
    """Return costs at all lengths, with measured caches of up to ``limit`` bytes."""
    measured = [
        measure_cache(config, n).measured if config is not None and costs.cache_bytes(n) <= limit else None
        for n in LENGTHS
    ]
    closed, flops, equivalent = (
        [cost(n) for n in LENGTHS] for cost in (costs.cache_bytes, costs.flops, costs.equivalent)
    )
    return NetworkCosts(closed, flops, equivalent, measured)


def published_costs() -> list[PublishedCosts]:
    """Return closed forms of V3.2 and of V4 at PUBLISHED_LENGTH tokens."""
    networks = [("DeepSeek-V3.2", v32_costs())]
    for name, preset in (("DeepSeek-V4-Pro", "v4-pro"), ("DeepSeek-V4-Flash", "v4-flash")):
        config = ModelConfig.from_preset(preset)
        if config.max_positions < PUBLISHED_LENGTH:
            raise ConfigError(f"preset {preset}: has fewer than {PUBLISHED_LENGTH} positions")
        networks.append((name, costs_of(config)))
    return [
        PublishedCosts(
            name, each.bytes_per_token, each.bytes_per_token * PUBLISHED_LENGTH, each.equivalent(PUBLISHED_LENGTH)
        )
        for name, each in networks
    ]
