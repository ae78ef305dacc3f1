"""The ablation: the full recipe against recipes without one of its choices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from model.config import ModelConfig
from model.costs import costs_of
from model.errors import CacheError, ConfigError
from pipelines.experiments.arms import CHOICES, FULL, NONE, WITHOUT, Arm, ablation_arms, with_flops
from pipelines.experiments.experiment import Experiment, SelectedRate, open_experiment, resolve_settings
from pipelines.experiments.flops import count_decode_flops, training_flops
from pipelines.experiments.outputs import command_line, publish
from pipelines.experiments.quantization import score_variants
from pipelines.experiments.trials import Result, Trial, plan
from pipelines.recipe.metrics import LOSS
from pipelines.recipe.schema import Recipe
from pipelines.reports.ablation import AblationResult, ArmResult, CostStage, figure, tables
from pipelines.reports.arms import Runs
from pipelines.reports.cache_measurement import check_memory, measure_cache
from pipelines.training.curriculum import total_steps, total_tokens

STAGE_TITLES = {
    NONE: "none of the five",
    "attention": "+ hybrid attention",
    "precision": "+ mixed precision",
    "muon": "+ Muon",
    "hyper_connections": "+ mHC",
    "qat": "+ QAT",
}


def run_ablation(recipe: Recipe, write: Path | None) -> AblationResult:
    """Train and score all arms; log and print tables and the figure. Raises FiftyfoldError."""
    recipe, manifest = resolve_settings(recipe)
    section, arms = recipe.ablate, ablation_arms(recipe)
    if section.context > recipe.model.max_positions:
        raise ConfigError(f"ablate.context: {section.context} exceeds model.max_positions {recipe.model.max_positions}")
    stages = cost_stages(recipe)
    for config in stages.values():
        try:
            check_memory([config], section.context)
        except CacheError as error:
            raise CacheError(f"ablate.context: {error}") from error
    flops = {arm.name: training_flops(arm.recipe) for arm in arms}
    longer = [arm for arm in arms if section.equal_flops and _is_scaled(arm, flops)]
    with open_experiment("ablate", recipe, arms, manifest) as experiment:
        experiment.expect(len(arms) * (len(section.rates) + len(section.seeds)) + len(longer) * len(section.seeds))
        rates = experiment.select_rates(arms)
        trials = [plan(arm, seed, rates[arm.name].rate) for arm in arms for seed in section.seeds]
        results = experiment.run_seeds(trials)
        scaled = [
            plan(Arm(arm.name, arm.title, with_flops(arm.recipe, flops[FULL]), arm.scored), seed, rates[arm.name].rate)
            for arm in longer
            for seed in section.seeds
        ]
        scaled_results = experiment.run_seeds(scaled) if scaled else {}
        quantization = {}
        if "qat" in section.choices:
            pairs = [[trial for trial in trials if trial.arm == name] for name in (FULL, "qat")]
            quantization = score_variants(recipe, *pairs)
        result = AblationResult(
            section.name,
            command_line("ablate"),
            list(section.seeds),
            section.context,
            total_tokens(recipe),
            [_arm_result(arm, rates[arm.name], trials, results, scaled, scaled_results) for arm in arms],
            measure_stages(stages, section.context),
            quantization,
        )
        _log(experiment, result, write)
    return result


def _is_scaled(arm: Arm, flops: dict[str, float]) -> bool:
    """Return whether an arm needs another number of steps for as many FLOPs as the full recipe."""
    return total_steps(with_flops(arm.recipe, flops[FULL])) != total_steps(arm.recipe)


def _log(experiment: Experiment, result: AblationResult, write: Path | None) -> None:
    metrics: dict[str, float] = {}
    for arm in result.arms:
        for budget, runs in (("equal_tokens", arm.equal_tokens), ("equal_flops", arm.equal_flops)):
            if runs is not None:
                metrics |= {f"{arm.name}/{budget}/{name}": value for name, value in runs.means.items()}
    experiment.tracked.log_metrics(metrics)
    publish(experiment.tracked, "ablate", result.to_dict(), tables(result), {"waterfall": figure(result)}, write)


def _arm_result(
    arm: Arm,
    rate: SelectedRate,
    trials: Iterable[Trial],
    results: dict[str, list[Result]],
    scaled: Iterable[Trial],
    scaled_results: dict[str, list[Result]],
) -> ArmResult:
    first, longer = (next((t for t in each if t.arm == arm.name), None) for each in (trials, scaled))
    assert first is not None
    return ArmResult(
        arm.name,
        arm.title,
        rate.rate,
        rate.losses_by_name,
        runs_of(first.recipe, results[arm.name]),
        None if longer is None else runs_of(longer.recipe, scaled_results[arm.name]),
    )


def runs_of(recipe: Recipe, results: Sequence[Result]) -> Runs:
    """Return the runs of one recipe, with metrics that all of them have."""
    names = [name for name in results[0].metrics if "/" in name and all(name in each.metrics for each in results)]
    return Runs(
        total_steps(recipe),
        training_flops(recipe),
        [each.run_id for each in results],
        {name: [each.metrics[name] for each in results] for name in names},
        [each.line(LOSS) for each in results],
    )


# --- costs


def cost_stages(recipe: Recipe) -> dict[str, ModelConfig]:
    """Return the networks from none of the choices to all that the recipe makes, adding one at a time."""
    kept: list[str] = []
    stages = {}
    for name in (NONE, *CHOICES):
        if name != NONE:
            kept.append(name)
        changed = recipe
        for choice in CHOICES:
            if choice not in kept:
                changed = WITHOUT[choice](changed)
        stages[name] = changed.model
    return stages


def measure_stages(stages: dict[str, ModelConfig], context: int) -> list[CostStage]:
    """Return closed forms and measurements of every network. Equal networks are measured once."""
    distinct = list(dict.fromkeys(map(_key, stages.values())))
    configs = {_key(config): config for config in stages.values()}
    measured = {key: measure_cache(configs[key], context).measured for key in distinct}
    counted = dict(zip(distinct, count_decode_flops([configs[key] for key in distinct], context)))
    found = []
    for name, config in stages.items():
        costs, key = costs_of(config), _key(config)
        found.append(
            CostStage(
                name,
                STAGE_TITLES[name],
                costs.cache_bytes(context),
                measured[key],
                costs.flops(context),
                counted[key],
                costs.equivalent(context),
            )
        )
    return found


def _key(config: ModelConfig) -> str:
    return repr(config.to_dict())
