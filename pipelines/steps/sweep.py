"""Search cache settings with Ray Tune: ``python -m pipelines sweep --config configs/tiny.yaml``.

Every trial trains like the train step, in its own process or on Ray Train workers of its own. ASHA stops weak trials.
The sweep is one MLflow run with a nested run per trial.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

from ray import tune

from model.atomic_files import atomic_file, write_text
from model.config import ModelConfig
from model.errors import ConfigError, FiftyfoldError
from pipelines.data.check import check_prepared
from pipelines.data.manifest import Manifest, read_manifest
from pipelines.ray_runtime.fit import RAY_RUN, finalize, unwrap_ray_error
from pipelines.ray_runtime.session import local_cpus, ray_session, require_resources
from pipelines.ray_runtime.trial import trial_storage
from pipelines.ray_runtime.tuner import cpus_per_trial, run_trials
from pipelines.recipe.keys import set_key
from pipelines.recipe.schema import Recipe, Setting
from pipelines.recipe.yaml_format import dump_yaml
from pipelines.reports.cache_measurement import BYTES_PER_TOKEN, measured_cache
from pipelines.reports.figures import pareto_figure, pareto_front
from pipelines.reports.terminal import print_table
from pipelines.steps import Step
from pipelines.tracking.lineage import dataset_input
from pipelines.tracking.mlflow_store import TrackedRun, Tracking, attach, open_tracking
from pipelines.tracking.run_folder import TRAINING_SECTIONS, bind, lock_run_folder, write_settings
from pipelines.training.build import check_init_from
from pipelines.training.curriculum import check_fills_batch, curriculum
from pipelines.training.search_space import (
    check_space,
    check_trial,
    combinations,
    short_label,
    trial_label,
    trial_recipe,
)

WALL_SECONDS = "sweep/wall_seconds"
_SWEEP_SECTIONS = (*TRAINING_SECTIONS, "sweep")


@dataclass(frozen=True)
class Trial:
    settings: dict[str, Setting]
    metrics: dict[str, float]
    run_id: str
    steps: int


@dataclass(frozen=True)
class SweepResult:
    run_id: str
    winner: Trial
    trials: list[Trial]
    checkpoint: Path
    """The winner's checkpoint, in a run folder of its own: ``<sweep.name>-winner``."""
    seconds: float
    """Wall time of the trials, over all processes that ran them except killed ones."""
    overrides: Path
    """A recipe file with the winner's settings, for ``--config``."""


def run(recipe: Recipe) -> SweepResult:
    """Run or resume the sweep ``sweep.name`` and keep its winner.

    Raises ConfigError, before any trial starts, if the space is empty or holds a combination that cannot train.
    """
    manifest = read_manifest(recipe.data_folder, verify=True)
    recipe = check_prepared(recipe, manifest)
    check_space(recipe)
    grid = combinations(recipe)
    checked: list[ModelConfig] = []
    for settings in grid:
        trial = check_prepared(trial_recipe(recipe, settings), manifest)
        check_trial(trial)
        check_fills_batch(curriculum(trial), recipe.data_folder, manifest)
        if trial.model not in checked and not _winner_file(recipe).exists():
            checked.append(trial.model)
            check_init_from(trial)
    tracking = open_tracking(recipe)
    with lock_run_folder(recipe.sweep_folder, recipe, _SWEEP_SECTIONS, "sweep.name") as known_run:
        if known_run is None and _winner_folder(recipe).exists():
            raise ConfigError(
                f"sweep.name: the winner would go to {_winner_folder(recipe)}, which already exists; choose another "
                "sweep.name or delete it"
            )
        return _run(recipe, manifest, grid, tracking, known_run)


def _run(
    recipe: Recipe,
    manifest: Manifest,
    grid: list[dict[str, Setting]],
    tracking: Tracking,
    known_run: str | None,
) -> SweepResult:
    winner_file = _winner_file(recipe)
    tracked = tracking.start_run(recipe.sweep.name, kind="sweep", recipe=recipe, run_id=known_run)
    bind(recipe.sweep_folder, tracked)
    # Capped at this machine's CPUs; a trial that needs more is rejected below.
    cpus = min(recipe.sweep.max_concurrent * cpus_per_trial(recipe), local_cpus()) + 1
    with tracked, ray_session(num_cpus=cpus):
        tracked.log_dataset(dataset_input(recipe.data_folder, manifest, "training"))
        require_resources("train.workers", cpus_per_trial(recipe))
        seconds, started = tracked.metrics().get(WALL_SECONDS, 0.0), time.monotonic()
        try:
            results = list(run_trials(recipe, grid, tracked))  # type: ignore[call-overload]
        finally:
            if not winner_file.exists():
                seconds += time.monotonic() - started
                tracked.log_metrics({WALL_SECONDS: seconds})
        errors = {
            trial_label(result.config["settings"]): str(unwrap_ray_error(result.error))
            for result in results
            if result.error
        }
        for label, error in errors.items():
            print(f"{recipe.sweep.name}: trial {label} failed: {error}")
        reported = [result for result in results if not result.error and "trial_id" in (result.metrics or {})]
        run_ids = _end_trial_runs(tracking, tracked.run_id, {result.metrics["trial_id"] for result in reported})
        trials = [_to_trial(recipe, result, run_ids) for result in reported]
        if not trials:
            raise FiftyfoldError(f"{recipe.sweep.name}: no trial finished ({'; '.join(sorted(set(errors.values())))})")
        winner = choose_winner(trials, recipe)
        _log_results(recipe, tracked, trials, winner)
        target = _keep_winner(recipe, reported[trials.index(winner)], attach(tracked.uri, winner.run_id))
        write_text(winner_file, _to_yaml(winner.settings))
        tracked.log_artifact(winner_file)
    print(f"{recipe.sweep.name}: winner {trial_label(winner.settings)}, checkpoint {target}, settings {winner_file}")
    return SweepResult(tracked.run_id, winner, trials, target, seconds, winner_file)


def choose_winner(trials: list[Trial], recipe: Recipe) -> Trial:
    """Return the best trial by ``sweep.metric`` whose cache fits the budget. Ties go to the smaller cache.

    Raises ConfigError if none fits, and FiftyfoldError if none has a finite metric.
    """
    sweep = recipe.sweep
    for trial in trials:
        if sweep.metric not in trial.metrics:
            known = ", ".join(sorted(k for k in trial.metrics if "/" in k))
            raise ConfigError(f"sweep.metric: trials report no '{sweep.metric}'; they report {known}")
    budget = sweep.max_cache_bytes_per_token
    trials = [t for t in trials if math.isfinite(t.metrics[sweep.metric])]
    if not trials:
        raise FiftyfoldError(f"{sweep.name}: no trial has a finite {sweep.metric}")
    fitting = [t for t in trials if budget is None or t.metrics[BYTES_PER_TOKEN] <= budget]
    if not fitting:
        smallest = min(t.metrics[BYTES_PER_TOKEN] for t in trials)
        raise ConfigError(
            f"sweep.max_cache_bytes_per_token: no trial fits {budget:g} bytes; the smallest takes {smallest:.1f}"
        )
    sign = 1 if sweep.mode == "min" else -1
    return min(fitting, key=lambda t: (sign * t.metrics[sweep.metric], t.metrics[BYTES_PER_TOKEN]))


def _end_trial_runs(tracking: Tracking, parent: str, succeeded: set[str]) -> dict[str, str]:
    """Return MLflow run ids by trial id, and end runs still marked as running. ``succeeded`` are trial ids."""
    nested = tracking.client.search_runs([tracking.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
    for run in nested:
        if run.info.status == "RUNNING":  # Tune may kill a stopped trial before it has ended its run
            status = "FINISHED" if run.data.tags.get("trial") in succeeded else "FAILED"
            tracking.client.set_terminated(run.info.run_id, status)
    return {run.data.tags["trial"]: run.info.run_id for run in nested if "trial" in run.data.tags}


def _to_trial(recipe: Recipe, result: tune.Result, run_ids: dict[str, str]) -> Trial:
    settings = result.config["settings"]  # type: ignore[index]
    reported = result.metrics or {}
    metrics = {k: float(v) for k, v in reported.items() if isinstance(v, int | float) and "/" in k}
    metrics |= measured_cache(trial_recipe(recipe, settings).model)
    return Trial(settings, metrics, run_ids[reported["trial_id"]], int(reported.get("step", 0)))


def _log_results(recipe: Recipe, tracked: TrackedRun, trials: list[Trial], winner: Trial) -> None:
    """Print a table of the trials, and log it with the Pareto figure to MLflow."""
    keys = list(trials[0].settings)
    shown = [BYTES_PER_TOKEN, "validation/recall", "validation/loss"]
    ordered = sorted(trials, key=lambda t: t.metrics[BYTES_PER_TOKEN])
    front = pareto_front(
        [(t.metrics[BYTES_PER_TOKEN], t.metrics[recipe.sweep.metric]) for t in ordered],
        higher=recipe.sweep.mode == "max",
    )
    rows = [
        [
            short_label(t.settings),
            *(f"{t.metrics.get(name, float('nan')):.3f}" for name in shown),
            str(t.steps),
            "winner" if t is winner else "front" if i in front else "",
        ]
        for i, t in enumerate(ordered)
    ]
    print_table(f"{recipe.sweep.name}: trials", ["settings", *shown, "steps", ""], rows)
    tracked.log_table(
        {
            **{key: [t.settings[key] for t in ordered] for key in keys},
            **{name: [t.metrics.get(name, float("nan")) for t in ordered] for name in shown},
            "steps": [t.steps for t in ordered],
            "winner": [t is winner for t in ordered],
            "run_id": [t.run_id for t in ordered],
        },
        "trials.json",
    )
    figure = pareto_figure(
        [
            (
                t.metrics[BYTES_PER_TOKEN],
                t.metrics.get("validation/recall", float("nan")),
                t.metrics["validation/loss"],
                t.steps,
            )
            for t in ordered
        ],
        [short_label(t.settings) for t in ordered],
        ordered.index(winner),
        recipe.sweep.max_cache_bytes_per_token,
    )
    tracked.log_figure(figure, "pareto.png")
    with atomic_file(recipe.sweep_folder / "pareto.png") as scratch:
        figure.savefig(scratch, dpi=150, format="png")
    tracked.log_metrics({f"winner/{name}": winner.metrics[name] for name in shown if name in winner.metrics})
    tracked.set_tags({"winner": trial_label(winner.settings), "winner.run_id": winner.run_id})


def _keep_winner(recipe: Recipe, result: tune.Result, tracked: TrackedRun) -> Path:
    """Write a run folder for the winner, bound to its settings; return its checkpoint folder."""
    folder = _winner_folder(recipe)
    last, metrics = result.checkpoint, result.metrics or {}
    if last is None and metrics.get("checkpoint_path"):
        # Tune has only the path of Ray Train's checkpoints, which names the old place if the folder was moved.
        trained = trial_storage(recipe, metrics["trial_id"]) / RAY_RUN
        last = tune.Checkpoint(str(trained / Path(metrics["checkpoint_path"]).name))
    if last is None:
        raise FiftyfoldError(f"{recipe.sweep.name}: the winning trial left no checkpoint")
    finalize(last, folder / "final")
    settings = result.config["settings"]  # type: ignore[index]
    write_settings(folder, trial_recipe(recipe, settings), TRAINING_SECTIONS)
    bind(folder, tracked)
    tracked.set_tags({"checkpoint": str(folder / "final")})
    return folder / "final"


def _winner_file(recipe: Recipe) -> Path:
    """Return the file of the winner's settings, which exists once the sweep has finished."""
    return recipe.sweep_folder / "winner.yaml"


def _winner_folder(recipe: Recipe) -> Path:
    return recipe.run.folder / f"{recipe.sweep.name}-winner"


def _to_yaml(settings: dict[str, Setting]) -> str:
    values: dict[str, Setting] = {}
    for key, value in settings.items():
        set_key(values, key, value)
    return dump_yaml(values)


STEP = Step(run)
