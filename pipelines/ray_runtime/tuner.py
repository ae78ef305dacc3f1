"""The driver's side of a sweep with Ray Tune."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from model.wording import count
from pipelines.ray_runtime.fit import unwrap_ray_error
from pipelines.ray_runtime.session import usable_cpus
from pipelines.ray_runtime.trial import run_sweep_trial
from pipelines.recipe.experiments import Range, Setting
from pipelines.recipe.schema import Recipe
from pipelines.reports.counting import time_left
from pipelines.tracking.mlflow_store import TrackedRun
from pipelines.training import compute_dtype
from pipelines.training.curriculum import validation_steps
from pipelines.training.search_space import decode, encode, search_of, trial_label, trial_recipe


def cpus_per_trial(recipe: Recipe) -> float:
    """Return the logical CPUs that one trial occupies, with its workers."""
    train = trial_recipe(recipe, {}).train
    return recipe.sweep.cpus_per_trial if recipe.sweep.in_process else train.workers * train.cpus_per_worker + 1


def trials_at_once(cpus_each: float, max_concurrent: int | None) -> int:
    """Return the number of trials of ``cpus_each`` logical CPUs to run at a time.

    More than the cluster has room for would wait for each other's workers and deadlock.
    """
    fitting = int(ray.cluster_resources()["CPU"] // cpus_each)
    wanted = int(usable_cpus() // cpus_each) if max_concurrent is None else max_concurrent
    return max(1, min(wanted, fitting))


def _space(recipe: Recipe) -> dict[str, Any]:
    """Return the space as Tune's distributions, for Optuna."""
    found: dict[str, Any] = {}
    for key, values in recipe.sweep.space.items():
        if not isinstance(values, Range):
            found[key] = tune.choice([encode(value) for value in values])
        elif values.int is not None:
            low, high = values.int
            found[key] = tune.randint(low, high + 1)
        else:
            found[key] = (tune.loguniform if values.log_uniform is not None else tune.uniform)(*values.bounds)
    return found


def fit_tuner(tuner: tune.Tuner, trials: int) -> tune.ResultGrid:
    """Run a tuner's trials. Raises FiftyfoldError if Tune fails, as it does when Ray ends a trial for lack of memory.

    After Ctrl-C, Tune returns instead of raising. Raises KeyboardInterrupt if fewer than ``trials`` trials ended.
    """
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # it prints tracebacks of failed trials; the step reports
    try:
        results = tuner.fit()
    except (RuntimeError, ray.exceptions.RayError, tune.TuneError) as error:
        if not isinstance(error.__cause__ or error, (ray.exceptions.RayError, tune.TuneError)):
            raise
        raise unwrap_ray_error(error) from error
    ended = sum(result.error is not None or bool((result.metrics or {}).get("done")) for result in results)  # type: ignore[attr-defined]
    if ended < trials:
        raise KeyboardInterrupt
    return results


def run_trials(recipe: Recipe, points: list[dict[str, Setting]], tracked: TrackedRun) -> tune.ResultGrid:
    """Run all trials under ASHA, or resume those that an earlier process left. Raises KeyboardInterrupt after Ctrl-C.

    ``points`` are the trials' settings, or examples of them if Optuna proposes the trials.
    """
    sweep = recipe.sweep
    trial = tune.with_parameters(
        run_sweep_trial,
        recipe=recipe.to_dict(),
        dtypes=_choose_dtypes(recipe, tracked),
        tracking={"uri": tracked.uri, "parent": tracked.run_id},
    )
    trial = tune.with_resources(trial, {"CPU": sweep.cpus_per_trial if sweep.in_process else 0.1})
    validations = max(len(validation_steps(trial_recipe(recipe, settings))) for settings in points)
    path = recipe.sweep_folder / "tune"
    optuna = search_of(recipe) == "optuna"
    total = (sweep.trials or 0) if optuna else len(points)
    if tune.Tuner.can_restore(str(path)):
        print(f"{sweep.name}: resuming from {path}")
        tuner = tune.Tuner.restore(str(path), trainable=trial, resume_unfinished=True, restart_errored=True)
    else:
        tuner = tune.Tuner(
            trial,
            param_space={"settings": _space(recipe) if optuna else tune.grid_search(points)},
            tune_config=tune.TuneConfig(
                metric=sweep.metric,
                mode=sweep.mode,
                max_concurrent_trials=trials_at_once(cpus_per_trial(recipe), sweep.max_concurrent),
                num_samples=total if optuna else 1,
                search_alg=OptunaSearch(metric=sweep.metric, mode=sweep.mode, seed=recipe.run.seed % 2**32)
                if optuna
                else None,
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
                callbacks=[TrialProgress(sweep.name, functools.partial(_describe, sweep.metric), total)],
            ),
        )
    return fit_tuner(tuner, total)


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


def _describe(metric: str, trial: Any) -> str:
    """Return the settings and the last result of one of Tune's trials."""
    label, result = trial_label(decode(trial.config["settings"])), trial.last_result
    return f"{label}: {metric} {result.get(metric, float('nan')):.3f} after {result.get('step', 0):.0f} steps"


class TrialProgress(tune.Callback):
    """Prints a line per finished trial, with the time left.

    Args:
        name: Name of the sweep or experiment.
        describe: Returns the text of one of Tune's trials that has finished.
        total: Number of trials. It may be raised later.
    """

    def __init__(self, name: str, describe: Callable[[Any], str], total: int = 0):
        self.name, self.total = name, total
        self._describe = describe
        self._finished = self._trained = 0
        self._started = time.monotonic()

    def skip(self, trials: int) -> None:
        """Count trials that are reused."""
        if trials:
            self._finished += trials
            print(f"{self.name}: {count(trials, 'finished trial')} {'is' if trials == 1 else 'are'} reused", flush=True)

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._finished += 1
        self._trained += 1
        each = (time.monotonic() - self._started) / self._trained
        left = time_left(each * max(0, self.total - self._finished))
        print(f"{self.name}: trial {self._finished}/{self.total}: {self._describe(trial)}, {left}", flush=True)
