"""Search cache settings with Ray Tune: ``python -m pipelines sweep --config configs/tiny.yaml``.

Every trial trains like ``pipelines train``, either in its own process or on Ray Train workers of its own. ASHA stops
weak ones. The sweep is one MLflow run with a nested run per trial.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.ray_runtime.session import local_cpus, need, ray_session  # sets Ray's environment before ray is imported
from pipelines.reports.cache_measurement import BYTES_PER_TOKEN, measured_cache

# isort: split
import ray
import ray.tune
import torch
import yaml
from omegaconf import OmegaConf
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler

from model.config import ModelConfig
from model.errors import ConfigError, FiftyfoldError
from model.files import atomic_file, write_text
from pipelines.data.check import fit_to_data
from pipelines.data.packing import read_manifest
from pipelines.ray_runtime.event_forwarder import News, refused
from pipelines.recipe.schema import Recipe, Setting, recipe_from_dict, with_overrides
from pipelines.reports.figures import pareto_figure, pareto_front
from pipelines.reports.terminal import TrainingProgress, print_table
from pipelines.steps.train import finalise, first_weights, fit, plain
from pipelines.tracking.mlflow_store import TrackedRun, Tracking, attach, open_tracking
from pipelines.tracking.run_folder import SETTINGS_OF_A_TRAINING, claimed, write_run_file, write_settings
from pipelines.training import compute_dtype
from pipelines.training.curriculum import check_data, curriculum, total_steps, validation_steps
from pipelines.training.trainer import build_trainer, folder_batches
from pipelines.training.validation import NAMES

WALL_SECONDS = "sweep/wall_seconds"
_SETTINGS_OF_A_SWEEP = (*SETTINGS_OF_A_TRAINING, "sweep")
_OF_A_STAGE = {
    "model.index_topk": "index_topk",
    "model.qat": "qat",
    "train.batch_rows": "batch_rows",
    "train.optimizer.indexer_learning_rate": "indexer_learning_rate",
}
"""What a stage may set for itself, whatever the recipe says elsewhere."""


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
    """Wall time of its trials, in all processes that ran them but those that were killed."""
    overrides: Path
    """A recipe file with the winner's settings, for ``--config``."""


def run(recipe: Recipe) -> SweepResult:
    """Run or resume the sweep ``sweep.name`` and keep its winner.

    Raises ConfigError, before any trial starts, when the space is empty or holds a combination that cannot train.
    """
    manifest = read_manifest(recipe.data_folder, verify=True)
    recipe = fit_to_data(recipe, manifest)
    _check(recipe)
    combinations = _combinations(recipe)
    begun: list[ModelConfig] = []
    for settings in combinations:
        one = fit_to_data(trial_recipe(recipe, settings), manifest)
        _check_trial(one)
        check_data(curriculum(one), recipe.data_folder, manifest)
        if one.model not in begun and not _overrides(recipe).exists():
            begun.append(one.model)
            first_weights(one)
    tracking = open_tracking(recipe)
    with claimed(recipe.sweep_folder, recipe, _SETTINGS_OF_A_SWEEP, "sweep.name") as known_run:
        if known_run is None and _winner_folder(recipe).exists():
            raise ConfigError(
                f"sweep.name: the winner would go to {_winner_folder(recipe)}, which is there already; choose another "
                "sweep.name or delete it"
            )
        return _run(recipe, combinations, tracking, known_run)


def _run(
    recipe: Recipe, combinations: list[dict[str, Setting]], tracking: Tracking, known_run: str | None
) -> SweepResult:
    overrides = _overrides(recipe)
    tracked = tracking.start_run(recipe.sweep.name, kind="sweep", recipe=recipe, run_id=known_run)
    write_run_file(recipe.sweep_folder, tracked)
    cpus = min(recipe.sweep.max_concurrent * _cpus_per_trial(recipe), local_cpus()) + 1  # more is refused below
    with tracked, ray_session(num_cpus=cpus):
        need("train.workers", _cpus_per_trial(recipe))
        seconds, started = tracked.metrics().get(WALL_SECONDS, 0.0), time.monotonic()
        try:
            results = list(_tune(recipe, combinations, tracked))  # type: ignore[call-overload]
        finally:
            if not overrides.exists():
                seconds += time.monotonic() - started
                tracked.log_metrics({WALL_SECONDS: seconds})
        causes = {_label(result.config["settings"]): str(plain(result.error)) for result in results if result.error}
        for label, cause in causes.items():
            print(f"{recipe.sweep.name}: trial {label} failed: {cause}")
        reported = [result for result in results if not result.error and "trial_id" in (result.metrics or {})]
        run_ids = _ended_trials(tracking, tracked.run_id, {result.metrics["trial_id"] for result in reported})
        trials = [_read_trial(recipe, result, run_ids) for result in reported]
        if not trials:
            why = "; ".join(sorted(set(causes.values())))
            raise FiftyfoldError(f"{recipe.sweep.name}: no trial came to its end ({why})")
        winner = choose(trials, recipe)
        _log(recipe, tracked, trials, winner)
        target = _keep_winner(recipe, reported[trials.index(winner)], attach(tracked.uri, winner.run_id))
        write_text(overrides, _nested_yaml(winner.settings))
        tracked.log_artifact(overrides)
    print(f"{recipe.sweep.name}: winner {_label(winner.settings)}, checkpoint {target}, settings {overrides}")
    return SweepResult(tracked.run_id, winner, trials, target, seconds, overrides)


def trial_recipe(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    """The recipe of one trial: the sweep's overrides, then the trial's own settings.

    Every validation leaves a checkpoint, so that a trial's last score and its last weights belong together.
    """
    changed = with_overrides(recipe, {**recipe.sweep.overrides, **settings})
    train = changed.train
    kept = max(2, train.keep_checkpoints)  # one that is stopped may be about to replace the one it is scored by
    return with_overrides(changed, {"train.checkpoint_every": train.validate_every, "train.keep_checkpoints": kept})


def choose(trials: list[Trial], recipe: Recipe) -> Trial:
    """The best trial by ``sweep.metric`` whose cache fits the budget; equal scores go to the smaller cache."""
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


def _check(recipe: Recipe) -> None:
    """Raise ConfigError where the sweep's own settings cannot mean anything."""
    section = recipe.sweep
    for key, values in section.space.items():
        if not values:
            raise ConfigError(f"sweep.space: '{key}' has no values")
        if not key.startswith(("model.", "train.")) and key != "run.seed":
            raise ConfigError(f"sweep.space: '{key}' changes nothing of a trial; keys begin with model. or train.")
        if any(part.isdigit() for part in key.split(".")):
            raise ConfigError(f"sweep.space: '{key}' names an item of a list; only whole settings can be tried")
        if key in ("train.checkpoint_every", "train.keep_checkpoints"):
            raise ConfigError(f"sweep.space: '{key}' changes nothing, because a sweep sets it itself")
        if len(set(map(repr, values))) < len(values):
            raise ConfigError(f"sweep.space: '{key}' has a value twice")
    if not section.space:
        raise ConfigError("sweep.space: is empty")
    place, _, name = section.metric.partition("/")
    if place != "validation" or name.partition("/layer_")[0] not in NAMES:
        known = ", ".join(f"validation/{name}" for name in NAMES)
        raise ConfigError(f"sweep.metric: trials report no '{section.metric}'; they report {known}")


def _check_trial(recipe: Recipe) -> None:
    """Raise ConfigError where a trial would not be what its settings say."""
    last = len(recipe.train.stages) - 1
    for key, name in _OF_A_STAGE.items():
        if key in recipe.sweep.space and getattr(recipe.train.stages[last], name) is not None:
            raise ConfigError(
                f"sweep.space: '{key}' changes nothing, because train.stages.{last} sets {name} for itself; leave it "
                "out there (sweep.overrides may change train.stages)"
            )
    if recipe.sweep.in_process:
        for key, found, plain_value in (
            ("workers", recipe.train.workers, 1),
            ("use_gpu", recipe.train.use_gpu, False),
        ):
            if found != plain_value:
                raise ConfigError(
                    f"sweep.in_process: trials train in a process of their own, without Ray Train, but train.{key} is "
                    f"{found}; set sweep.in_process to false, or train.{key} to {plain_value} in sweep.overrides"
                )


def _combinations(recipe: Recipe) -> list[dict[str, Setting]]:
    space = recipe.sweep.space
    grid = [dict(zip(space, values)) for values in itertools.product(*space.values())]
    if recipe.sweep.trials is not None and recipe.sweep.trials < len(grid):
        grid = random.Random(recipe.run.seed).sample(grid, recipe.sweep.trials)
    return grid


def _cpus_per_trial(recipe: Recipe) -> float:
    train = trial_recipe(recipe, {}).train
    return 1.0 if recipe.sweep.in_process else train.workers * train.cpus_per_worker + 1


def _tune(recipe: Recipe, combinations: list[dict[str, Setting]], tracked: TrackedRun) -> tune.ResultGrid:
    sweep = recipe.sweep
    trial = tune.with_parameters(
        _trial,
        recipe=recipe.to_dict(),
        dtypes=_data_types(recipe, tracked),
        tracking={"uri": tracked.uri, "parent": tracked.run_id},
    )
    trial = tune.with_resources(trial, {"CPU": 1.0 if sweep.in_process else 0.1})
    validations = max(len(validation_steps(trial_recipe(recipe, settings))) for settings in combinations)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # it prints tracebacks of failed trials, which we name
    cpus = ray.cluster_resources()["CPU"]  # trials that waited for one another's would wait for ever
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
            max_concurrent_trials=max(1, min(sweep.max_concurrent, int(cpus // _cpus_per_trial(recipe)))),
            scheduler=ASHAScheduler(
                time_attr="training_iteration",
                # One more than there are: a trial that comes to its end finishes by itself.
                max_t=max(validations, sweep.grace_validations) + 1,
                grace_period=sweep.grace_validations,
                reduction_factor=sweep.reduction_factor,
            ),
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(recipe.sweep_folder),
            verbose=0,
            callbacks=[_Lines(recipe, len(combinations))],
        ),
    ).fit()


def _data_types(recipe: Recipe, tracked: TrackedRun) -> compute_dtype.Choice:
    """Return the data types that replace ``auto`` in all trials, so that these differ in their settings alone.

    A machine of the cluster chooses them when the sweep begins.
    """
    base = trial_recipe(recipe, {})
    if not (recipe.sweep_folder / compute_dtype.FILE).exists():
        use_gpu = base.train.use_gpu
        choose = ray.remote(num_gpus=1 if use_gpu else 0)(compute_dtype.choose)
        compute_dtype.write(recipe.sweep_folder, ray.get(choose.remote("cuda" if use_gpu else "cpu")))
    choice = compute_dtype.read(recipe.sweep_folder)
    chosen = {key: choice[key] for key, value in compute_dtype.of(base).items() if value == "auto"}
    if chosen:
        print(f"{recipe.sweep.name}: {', '.join(f'{key} is {dtype}' for key, dtype in chosen.items())} (auto)")
        tracked.set_tags(chosen)
    return choice


class _Lines(tune.Callback):
    """A line per finished trial."""

    def __init__(self, recipe: Recipe, total: int):
        self.name, self.metric, self.total = recipe.sweep.name, recipe.sweep.metric, total
        self.done = 0

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self.done += 1
        result = trial.last_result
        print(
            f"{self.name}: trial {self.done}/{self.total} {_label(trial.config['settings'])}  "
            f"{self.metric} {result.get(self.metric, float('nan')):.3f} after {result.get('step', 0):.0f} steps",
            flush=True,
        )


# --- one trial


def _trial(
    config: dict[str, Any], recipe: dict[str, Any], dtypes: compute_dtype.Choice, tracking: dict[str, str]
) -> None:
    settings = config["settings"]
    whole = recipe_from_dict(recipe)
    trial_id = tune.get_context().get_trial_id()
    mine = compute_dtype.resolve(trial_recipe(whole, settings), dtypes)
    mine = with_overrides(mine, {"run.name": f"{whole.sweep.name}-{trial_id}", "tracking.uri": tracking["uri"]})
    tracked = _trial_run(open_tracking(mine), tracking["parent"], trial_id, settings, mine)
    tracked.log_metrics(measured_cache(mine.model))
    with tracked:
        if whole.sweep.in_process:
            _train_here(mine, tracked)
            return
        quiet = TrainingProgress(trial_id, total_steps(mine), quiet=True)
        storage = whole.sweep_folder / "train" / trial_id
        metrics, last = fit(mine, tracked, quiet, storage, [TuneReportCallback()])
        # Tune keeps stale numbers when a resumed trial has nothing left to report, so the last word is said again.
        tune.report(metrics, checkpoint=last)


def _train_here(recipe: Recipe, tracked: TrackedRun) -> None:
    torch.set_num_threads(recipe.train.threads_per_worker)
    last = tune.get_checkpoint()
    with last.as_directory() if last is not None else contextlib.nullcontext() as folder:
        trainer = build_trainer(recipe, folder_batches(recipe), _TuneReporter(tracked), last=folder)
    trainer.run()


class _TuneReporter:
    def __init__(self, tracked: TrackedRun):
        self.tracked = tracked

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._record(News(step, metrics))

    def tell(self, step: int, what: str) -> None:
        self._record(News(step, {}, event=what))

    def report(self, step: int, metrics: dict[str, float], write: Callable[[Path], None] | None) -> None:
        self._record(News(step, metrics))
        with tempfile.TemporaryDirectory() as folder:
            saved = None
            if write is not None:
                write(Path(folder))
                saved = tune.Checkpoint.from_directory(folder)
            tune.report({**metrics, "step": step}, checkpoint=saved)

    def _record(self, news: News) -> None:
        refusal = refused(news, self.tracked)
        if refusal is not None:
            raise refusal


def _trial_run(
    tracking: Tracking, parent: str, trial_id: str, settings: dict[str, Setting], recipe: Recipe
) -> TrackedRun:
    """The trial's nested MLflow run: the one it had before it was stopped, or a new one."""
    earlier = tracking.client.search_runs(
        [tracking.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}' and tags.trial = '{trial_id}'"
    )
    run_id = earlier[0].info.run_id if earlier else None
    tracked = tracking.start_run(
        _short(_label(settings)), kind="trial", recipe=recipe, parent_run_id=parent, run_id=run_id
    )
    tracked.set_tags({"trial": trial_id})
    return tracked


# --- the result


def _ended_trials(tracking: Tracking, parent: str, whole: set[str]) -> dict[str, str]:
    """MLflow run ids by trial id, once none of them trains any more. ``whole`` are the trials that did not fail."""
    nested = tracking.client.search_runs([tracking.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
    for run in nested:
        if run.info.status == "RUNNING":  # Tune ends a process that it stopped before that has said so
            status = "FINISHED" if run.data.tags.get("trial") in whole else "FAILED"
            tracking.client.set_terminated(run.info.run_id, status)
    return {run.data.tags["trial"]: run.info.run_id for run in nested if "trial" in run.data.tags}


def _read_trial(recipe: Recipe, result: ray.tune.Result, run_ids: dict[str, str]) -> Trial:
    settings = result.config["settings"]  # type: ignore[index]
    reported = result.metrics or {}
    metrics = {k: float(v) for k, v in reported.items() if isinstance(v, int | float) and "/" in k}
    metrics |= measured_cache(trial_recipe(recipe, settings).model)
    return Trial(settings, metrics, run_ids[reported["trial_id"]], int(reported.get("step", 0)))


def _log(recipe: Recipe, tracked: TrackedRun, trials: list[Trial], winner: Trial) -> None:
    """Table and Pareto figure, on the terminal and in MLflow."""
    keys = list(trials[0].settings)
    shown = [BYTES_PER_TOKEN, "validation/recall", "validation/loss"]
    ordered = sorted(trials, key=lambda t: t.metrics[BYTES_PER_TOKEN])
    front = pareto_front(
        [(t.metrics[BYTES_PER_TOKEN], t.metrics[recipe.sweep.metric]) for t in ordered],
        higher=recipe.sweep.mode == "max",
    )
    rows = [
        [
            _short(_label(t.settings)),
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
        [_short(_label(t.settings)) for t in ordered],
        ordered.index(winner),
        recipe.sweep.max_cache_bytes_per_token,
    )
    tracked.log_figure(figure, "pareto.png")
    with atomic_file(recipe.sweep_folder / "pareto.png") as scratch:
        figure.savefig(scratch, dpi=150, format="png")
    tracked.log_metrics({f"winner/{name}": winner.metrics[name] for name in shown if name in winner.metrics})
    tracked.set_tags({"winner": _label(winner.settings), "winner.run_id": winner.run_id})


def _keep_winner(recipe: Recipe, result: ray.tune.Result, tracked: TrackedRun) -> Path:
    """Give the winner a run folder like any trained model's, which other settings do not go on from. Returns its
    checkpoint folder."""
    folder = _winner_folder(recipe)
    last = result.checkpoint
    if last is None and result.metrics and result.metrics.get("checkpoint_path"):
        last = tune.Checkpoint(
            result.metrics["checkpoint_path"]
        )  # where Train's own checkpoints are, Tune has the path
    if last is None:
        raise FiftyfoldError(f"{recipe.sweep.name}: the winning trial left no checkpoint")
    finalise(last, folder / "final")
    settings = result.config["settings"]  # type: ignore[index]
    write_settings(folder, trial_recipe(recipe, settings), SETTINGS_OF_A_TRAINING)
    write_run_file(folder, tracked)
    tracked.set_tags({"checkpoint": str(folder / "final")})
    return folder / "final"


def _overrides(recipe: Recipe) -> Path:
    """The winner's settings, there once the sweep has come to its end."""
    return recipe.sweep_folder / "winner.yaml"


def _winner_folder(recipe: Recipe) -> Path:
    return recipe.run.folder / f"{recipe.sweep.name}-winner"


def _label(settings: dict[str, Setting]) -> str:
    return " ".join(f"{key}={value}" for key, value in settings.items())


def _short(label: str) -> str:
    return label.replace("model.", "").replace("_ratio", "").replace("index_", "")


def _nested_yaml(settings: dict[str, Setting]) -> str:
    nested = OmegaConf.create({})
    for key, value in settings.items():
        OmegaConf.update(nested, key, value)
    return yaml.safe_dump(OmegaConf.to_container(nested), sort_keys=False)
