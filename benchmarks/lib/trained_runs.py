"""Networks trained for a benchmark: the plain trainer in this process, without Ray.

Every run is logged to MLflow. A finished run is reused.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.atomic_files import atomic_folder
from pipelines.data.check import check_prepared
from pipelines.data.manifest import read_manifest
from pipelines.recipe.loading import with_overrides
from pipelines.recipe.schema import Recipe
from pipelines.steps import prepare
from pipelines.tracking.mlflow_store import TrackedRun, open_tracking
from pipelines.tracking.run_folder import TRAINING_SECTIONS, lock_run_folder
from pipelines.training import compute_dtype
from pipelines.training.build import build_trainer, folder_batches
from pipelines.training.trainer import Trainer

LOSS = "validation/loss"
STEP_SECONDS = "train/step_seconds"
_CURVE = "curve.json"


@dataclass
class Curve:
    """Validation metrics of a run, and the median time of a step since the last validation: (tokens seen, metrics) in
    order."""

    points: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    def line(self, metric: str) -> list[tuple[int, float]]:
        return [(tokens, metrics[metric]) for tokens, metrics in self.points if metric in metrics]

    def last(self, metric: str) -> float:
        return self.line(metric)[-1][1]


class Recorder:
    """Reporter that records the points of a curve and logs all metrics to an MLflow run."""

    def __init__(self, tracked: TrackedRun, tokens_per_step: int):
        self.tracked, self.tokens_per_step, self.curve = tracked, tokens_per_step, Curve()
        self._seconds: list[float] = []

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.tracked.log_metrics(metrics, step)
        if STEP_SECONDS in metrics:
            self._seconds.append(metrics[STEP_SECONDS])

    def log_event(self, step: int, message: str) -> None:
        self.tracked.log_event(step, message)

    def report(self, step: int, metrics: dict[str, float], write: Callable[[Path], None] | None) -> None:
        self.tracked.log_metrics(metrics, step)
        if metrics:
            times = {STEP_SECONDS: statistics.median(self._seconds)} if self._seconds else {}
            self._seconds.clear()
            self.curve.points.append((step * self.tokens_per_step, metrics | times))


def prepared(recipe: Recipe) -> Recipe:
    """Prepare the recipe's data, and return the recipe with the data's vocabulary size. Raises ConfigError."""
    prepare.run(recipe)
    return check_prepared(recipe, read_manifest(recipe.data_folder))


def trained(recipe: Recipe, name: str, seed: int, overrides: Mapping[str, Any]) -> tuple[Curve, Path]:
    """Return the curve and checkpoint folder of a run, training it unless it exists."""
    recipe = with_overrides(recipe, {**overrides, "run.name": f"{name}-seed{seed}", "run.seed": seed})
    folder = recipe.final_checkpoint
    with lock_run_folder(recipe.run_folder, recipe, TRAINING_SECTIONS, "run.name"):
        if not folder.exists():
            _train(recipe, seed)
    points = json.loads((folder / _CURVE).read_text())
    return Curve([(int(tokens), metrics) for tokens, metrics in points]), folder


def _train(recipe: Recipe, seed: int) -> None:
    started = time.monotonic()
    # Seed the order of the data too; the prepared folder depends on the recipe's own seed.
    trainer, recorder = _trainer(with_overrides(recipe, {"data.seed": seed}))
    with recorder.tracked, atomic_folder(recipe.final_checkpoint) as scratch:
        trainer.run()
        trainer.snapshot().write(scratch)
        (scratch / _CURVE).write_text(json.dumps(recorder.curve.points) + "\n")
    loss = recorder.curve.last(LOSS)
    print(f"{recipe.run.name}: {LOSS} {loss:.4f} after {time.monotonic() - started:.0f} s", flush=True)


def _trainer(recipe: Recipe) -> tuple[Trainer, Recorder]:
    tracked = open_tracking(recipe).start_run(recipe.run.name, kind="train", recipe=recipe)
    recorder = Recorder(tracked, recipe.train.batch_rows * recipe.data.sequence_length)
    trainer = build_trainer(recipe, folder_batches(recipe), recorder)
    tracked.set_tags(compute_dtype.settings_of(trainer.recipe))
    return trainer, recorder


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Format the mean and the range."""
    low, high = min(values), max(values)
    return f"{statistics.fmean(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
