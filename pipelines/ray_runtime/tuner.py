"""The driver's side of a sweep with Ray Tune."""

from __future__ import annotations

import logging
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from pipelines.ray_runtime.trial import run_trial
from pipelines.recipe.schema import Recipe, Setting
from pipelines.tracking.mlflow_store import TrackedRun
from pipelines.training import compute_dtype
from pipelines.training.curriculum import validation_steps
from pipelines.training.search_space import trial_label, trial_recipe


def cpus_per_trial(recipe: Recipe) -> float:
    """Return the logical CPUs that one trial occupies, with its workers."""
    train = trial_recipe(recipe, {}).train
    return 1.0 if recipe.sweep.in_process else train.workers * train.cpus_per_worker + 1


def run_trials(recipe: Recipe, combinations: list[dict[str, Setting]], tracked: TrackedRun) -> tune.ResultGrid:
    """Run all trials under ASHA, or resume those that an earlier process left."""
    sweep = recipe.sweep
    trial = tune.with_parameters(
        run_trial,
        recipe=recipe.to_dict(),
        dtypes=_choose_dtypes(recipe, tracked),
        tracking={"uri": tracked.uri, "parent": tracked.run_id},
    )
    trial = tune.with_resources(trial, {"CPU": 1.0 if sweep.in_process else 0.1})
    validations = max(len(validation_steps(trial_recipe(recipe, settings))) for settings in combinations)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # it prints tracebacks of failed trials; the step reports
    cpus = ray.cluster_resources()["CPU"]  # trials waiting for each other's workers would deadlock
    path = recipe.sweep_folder / "tune"
    if tune.Tuner.can_restore(str(path)):
        print(f"{sweep.name}: resuming from {path}")
        return tune.Tuner.restore(str(path), trainable=trial, resume_unfinished=True, restart_errored=True).fit()
    return tune.Tuner(
        trial,
        param_space={"settings": tune.grid_search(combinations)},
        tune_config=tune.TuneConfig(
            metric=sweep.metric,
            mode=sweep.mode,
            max_concurrent_trials=max(1, min(sweep.max_concurrent, int(cpus // cpus_per_trial(recipe)))),
            scheduler=ASHAScheduler(
                time_attr="training_iteration",
                # One more than a trial has, so that the scheduler does not stop a trial that is about to finish.
                max_t=max(validations, sweep.grace_validations) + 1,
                grace_period=sweep.grace_validations,
                reduction_factor=sweep.reduction_factor,
            ),
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(recipe.sweep_folder),
            verbose=0,
            callbacks=[_TrialPrinter(recipe, len(combinations))],
        ),
    ).fit()


def _choose_dtypes(recipe: Recipe, tracked: TrackedRun) -> compute_dtype.Dtypes:
    """Return the data types in place of ``auto``, common to all trials so that only their settings differ.

    A machine of the cluster chooses them when the sweep begins.
    """
    base = trial_recipe(recipe, {})
    if not (recipe.sweep_folder / compute_dtype.FILE).exists():
        use_gpu = base.train.use_gpu
        choose = ray.remote(num_gpus=1 if use_gpu else 0)(compute_dtype.choose)
        compute_dtype.write(recipe.sweep_folder, ray.get(choose.remote("cuda" if use_gpu else "cpu")))
    dtypes = compute_dtype.read(recipe.sweep_folder)
    chosen = {key: dtypes[key] for key, value in compute_dtype.settings_of(base).items() if value == "auto"}
    if chosen:
        print(f"{recipe.sweep.name}: {', '.join(f'{key} is {dtype}' for key, dtype in chosen.items())} (auto)")
        tracked.set_tags(chosen)
    return dtypes


class _TrialPrinter(tune.Callback):
    """Prints a line per finished trial."""

    def __init__(self, recipe: Recipe, total: int):
        self.name, self.metric, self.total = recipe.sweep.name, recipe.sweep.metric, total
        self.done = 0

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self.done += 1
        result = trial.last_result
        print(
            f"{self.name}: trial {self.done}/{self.total} {trial_label(trial.config['settings'])}  "
            f"{self.metric} {result.get(self.metric, float('nan')):.3f} after {result.get('step', 0):.0f} steps",
            flush=True,
        )
