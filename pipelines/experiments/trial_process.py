"""The process of one trial under Ray Tune."""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from ray import tune

from model import checkpoint
from model.atomic_files import atomic_folder, write_text
from model.tokenizer import load_tokenizer
from model.transformer import Transformer
from pipelines.data.manifest import read_manifest
from pipelines.experiments.scoring import score_tasks
from pipelines.experiments.trials import FINAL, LAST, RESULT, Trial, only_process
from pipelines.recipe.loading import with_overrides
from pipelines.recipe.metrics import LOSS, STEP_SECONDS
from pipelines.reports.cache_measurement import measured_cache
from pipelines.tracking.lineage import dataset_input
from pipelines.tracking.mlflow_store import TrackedRun, open_tracking
from pipelines.tracking.run_file import read_run_file
from pipelines.tracking.run_folder import bind
from pipelines.training import compute_dtype
from pipelines.training.build import build_trainer, folder_batches
from pipelines.training.curriculum import Stage, curriculum, tokens_after
from pipelines.training.reporter import WriteCheckpoint
from pipelines.training.trainer import Trainer
from pipelines.training.validation import held_out_batches, validate

CURVE = "curve.json"


def run_trial(config: dict[str, str], trials: dict[str, dict[str, Any]], tracking: dict[str, str]) -> None:
    """Train and score one trial, as far as that has not been done, and report its loss to Tune.

    Args:
        config: Tune's parameters: the trial's ``folder``.
        trials: Trials as plain values, by folder. The description in the folder may be that of another experiment,
            which shares the training and scores it on other tasks.
        tracking: ``uri`` of the MLflow store, the experiment's run id as ``parent``, and the ``kind`` of the run.
    """
    trial = Trial.from_dict(trials[config["folder"]])
    torch.set_num_threads(trial.recipe.train.threads_per_worker)
    complete(trial, tracking)
    tune.report({LOSS: trial.result().metrics[LOSS]})


def complete(trial: Trial, tracking: dict[str, str]) -> None:
    """Train and score a trial whose folder exists, as far as that has not been done."""
    folder = trial.folder
    with only_process(folder):
        if trial.is_finished:
            return
        with _start_run(trial, tracking) as tracked:
            if not (folder / RESULT).exists():
                _train(trial, folder, tracked)
            if trial.evaluated:
                _evaluate(trial, folder, tracked)


def _start_run(trial: Trial, tracking: dict[str, str]) -> TrackedRun:
    """Resume the trial's nested MLflow run, or start it."""
    recipe = with_overrides(trial.recipe, {"tracking.uri": tracking["uri"]})
    known = read_run_file(trial.folder)
    tracked = open_tracking(recipe).start_run(
        trial.label,
        kind=tracking["kind"],
        recipe=recipe,
        parent_run_id=tracking["parent"],
        run_id=None if known is None else known.run_id,
    )
    bind(trial.folder, tracked)
    tracked.set_tags({"arm": trial.arm, "seed": str(trial.seed), "rate": f"{trial.rate:g}"})
    return tracked


def _train(trial: Trial, folder: Path, tracked: TrackedRun) -> None:
    recipe, device = trial.recipe, "cuda" if trial.recipe.train.use_gpu else "cpu"
    tracked.log_metrics(measured_cache(recipe.model))
    tracked.log_dataset(dataset_input(recipe.data_folder, read_manifest(recipe.data_folder), "training"))
    last = folder / LAST
    recorder = _Recorder(curriculum(recipe), tracked, last)
    # The seed also determines the order of the data, while the prepared folder depends on the recipe's own seed.
    batches = folder_batches(with_overrides(recipe, {"data.seed": trial.seed}))
    trainer = build_trainer(recipe, batches, recorder, device=device, last=last if last.exists() else None)
    trainer.run()
    metrics = recorder.curve[-1][1]
    if trial.scored:
        metrics = metrics | _validate_scored(trial, trainer, device)
        tracked.log_metrics({f"scored/{name}": value for name, value in metrics.items() if "/" in name})
    with atomic_folder(folder / FINAL) as scratch:
        model, tokenizer = trainer.model, load_tokenizer(recipe.data_folder)
        state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
        checkpoint.write(state, model.config, scratch, tokenizer)
        compute_dtype.write(scratch, compute_dtype.settings_of(trainer.recipe))
    result = {"run_id": tracked.run_id, "metrics": metrics, "curve": recorder.curve}
    write_text(folder / RESULT, json.dumps(result) + "\n")


def _validate_scored(trial: Trial, trainer: Trainer, device: str) -> dict[str, float]:
    """Return the validation metrics of the trained network in the configuration in which it is scored."""
    model = Transformer(trainer.model.config.replace(**trial.scored)).to(device)
    model.load_state_dict(trainer.model.state_dict())
    return validate(model.eval(), held_out_batches(trial.recipe), curriculum(trial.recipe)[-1].attends)


def _evaluate(trial: Trial, folder: Path, tracked: TrackedRun) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        network = folder / FINAL
        if trial.scored:
            network = Path(scratch) / "scored"
            model = Transformer(trial.recipe.model.replace(**trial.scored))
            checkpoint.load_weights(model, folder / FINAL)
            checkpoint.save(model, network, load_tokenizer(folder / FINAL))
        metrics = score_tasks(network, trial.recipe)
    tracked.log_metrics(metrics)
    write_text(trial.evaluation_file, json.dumps(metrics) + "\n")


class _Recorder:
    """Reporter that keeps the points of a curve, logs to MLflow, and writes checkpoints to resume from."""

    def __init__(self, stages: tuple[Stage, ...], tracked: TrackedRun, last: Path):
        self.tracked, self.last = tracked, last
        self.curve: list[tuple[int, dict[str, float]]] = []
        self._stages, self._seconds = stages, list[float]()
        if (last / CURVE).exists():
            kept: dict[str, Any] = json.loads((last / CURVE).read_text())
            self.curve = [(tokens, metrics) for tokens, metrics in kept["curve"]]

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.tracked.log_step(metrics, step)
        if STEP_SECONDS in metrics:
            self._seconds.append(metrics[STEP_SECONDS])

    def resumed(self, step: int) -> None:
        self.tracked.skip_repeated(step)
        self.tracked.log_event(step, "resumed from the last checkpoint")

    def log_event(self, step: int, message: str) -> None:
        self.tracked.log_event(step, message)

    def report(self, step: int, metrics: dict[str, float], write: WriteCheckpoint | None) -> None:
        self.tracked.log_step(metrics, step)
        tokens = tokens_after(self._stages, step)
        if metrics and (not self.curve or self.curve[-1][0] < tokens):
            times = {STEP_SECONDS: statistics.median(self._seconds)} if self._seconds else {}
            self._seconds.clear()
            self.curve.append((tokens, metrics | times))
        if write is not None:
            with atomic_folder(self.last) as scratch:
                write(scratch)
                (scratch / CURVE).write_text(json.dumps({"curve": self.curve}) + "\n")
