"""The process of one trial of a sweep."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import torch
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from pipelines.data.manifest import read_manifest
from pipelines.ray_runtime.event_forwarder import try_log
from pipelines.ray_runtime.event_queue import TrainEvent
from pipelines.ray_runtime.fit import fit, require_workers
from pipelines.recipe.experiments import Setting
from pipelines.recipe.loading import recipe_from_dict, with_overrides
from pipelines.recipe.schema import Recipe
from pipelines.reports.cache_measurement import measured_cache
from pipelines.reports.terminal import TrainingProgress
from pipelines.tracking.lineage import dataset_input
from pipelines.tracking.mlflow_store import TrackedRun, Tracking, open_tracking
from pipelines.tracking.system_metrics import system_metrics
from pipelines.training import compute_dtype
from pipelines.training.build import build_trainer, check_point, folder_batches
from pipelines.training.curriculum import total_steps
from pipelines.training.reporter import WriteCheckpoint
from pipelines.training.search_space import decode, short_label, trial_recipe


def trial_storage(recipe: Recipe, trial_id: str) -> Path:
    """Return the folder of a trial that trains on Ray Train workers."""
    return recipe.sweep_folder / "train" / trial_id


def run_sweep_trial(
    config: dict[str, Any], recipe: dict[str, Any], dtypes: compute_dtype.Dtypes, tracking: dict[str, str]
) -> None:
    """Train one trial and report to Tune.

    Args:
        config: Tune's parameters: the trial's ``settings`` by dotted key.
        recipe: The sweep's recipe as plain values.
        dtypes: Data types in place of ``auto``.
        tracking: ``uri`` of the MLflow store and the sweep's run id as ``parent``.
    """
    settings = decode(config["settings"])
    sweep_recipe = recipe_from_dict(recipe)
    trial_id = tune.get_context().get_trial_id()
    own = compute_dtype.resolve(trial_recipe(sweep_recipe, settings), dtypes)
    check_point(own)
    own = with_overrides(own, {"run.name": f"{sweep_recipe.sweep.name}-{trial_id}", "tracking.uri": tracking["uri"]})
    tracked = _start_run(open_tracking(own), tracking["parent"], trial_id, settings, own)
    with tracked, system_metrics(tracked, own.tracking.system_metrics_interval):
        tracked.log_metrics(measured_cache(own.model))
        tracked.log_dataset(dataset_input(own.data_folder, read_manifest(own.data_folder), "training"))
        if sweep_recipe.sweep.in_process:
            _train_in_process(own, tracked)
            return
        require_workers(own)
        quiet = TrainingProgress(trial_id, total_steps(own), quiet=True)
        storage = trial_storage(sweep_recipe, trial_id)
        metrics, last = fit(own, tracked, quiet, storage, [TuneReportCallback()])
        # A resumed trial may have nothing left to report, and Tune would keep stale metrics.
        tune.report(metrics, checkpoint=last)


def _train_in_process(recipe: Recipe, tracked: TrackedRun) -> None:
    torch.set_num_threads(recipe.train.threads_per_worker)
    last = tune.get_checkpoint()
    with last.as_directory() if last is not None else contextlib.nullcontext() as folder:
        trainer = build_trainer(recipe, folder_batches(recipe), _TuneReporter(tracked), last=folder)
    trainer.run()


class _TuneReporter:
    """Reporter that logs to MLflow directly, and sends validation metrics and checkpoints to Tune."""

    def __init__(self, tracked: TrackedRun):
        self.tracked = tracked

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._record(TrainEvent(step, metrics))

    def resumed(self, step: int) -> None:
        self._record(TrainEvent.resumption(step))

    def log_event(self, step: int, message: str) -> None:
        self._record(TrainEvent(step, {}, event=message))

    def report(self, step: int, metrics: dict[str, float], write: WriteCheckpoint | None) -> None:
        self._record(TrainEvent(step, metrics))
        with tempfile.TemporaryDirectory() as folder:
            saved = None
            if write is not None:
                write(Path(folder))
                saved = tune.Checkpoint.from_directory(folder)
            tune.report({**metrics, "step": step}, checkpoint=saved)

    def _record(self, event: TrainEvent) -> None:
        error = try_log(event, self.tracked)
        if error is not None:
            raise error


def _start_run(
    tracking: Tracking, parent: str, trial_id: str, settings: dict[str, Setting], recipe: Recipe
) -> TrackedRun:
    """Resume the trial's nested MLflow run, or start it."""
    earlier = next(tracking.search_runs(f"tags.`mlflow.parentRunId` = '{parent}' and tags.trial = '{trial_id}'"), None)
    run_id = None if earlier is None else earlier.info.run_id
    tracked = tracking.start_run(
        short_label(settings), kind="trial", recipe=recipe, parent_run_id=parent, run_id=run_id
    )
    tracked.set_tags({"trial": trial_id})
    return tracked
