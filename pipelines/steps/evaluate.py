"""Score a checkpoint with lm-eval and log the scores to the run that trained it, or else to a run of their own."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from evals.scores import EFFECTIVE_SHARE, Point
from model import checkpoint as checkpoints
from model.config import ModelConfig
from model.errors import CheckpointError, ConfigError
from model.wording import quote
from pipelines.data.manifest import MANIFEST_NAME, read_manifest
from pipelines.experiments.scoring import check_section, check_tasks, score_tasks
from pipelines.recipe.messages import naming
from pipelines.recipe.schema import Recipe
from pipelines.reports.recall import Score, recall_figure, scores_from_metrics
from pipelines.reports.terminal import print_table
from pipelines.steps import Step
from pipelines.tracking.connection import check_writable
from pipelines.tracking.lineage import dataset_input
from pipelines.tracking.mlflow_store import TrackedRun, open_tracking, store_key
from pipelines.tracking.registry import WEIGHTS_TAG, weights_digest
from pipelines.tracking.run_file import RUN_FILE
from pipelines.tracking.run_folder import run_of_checkpoint
from pipelines.tracking.system_metrics import system_metrics

TABLE_FILE = "evaluation/recall.json"
PERPLEXITY_FILE = "evaluation/perplexity.json"
FIGURE_FILE = "evaluation/recall.png"


@dataclass(frozen=True)
class EvaluateResult:
    run_id: str
    checkpoint: Path
    metrics: dict[str, float]


def run(recipe: Recipe) -> EvaluateResult:
    """Evaluate ``evaluate.checkpoint``, or the final checkpoint of ``run.name``.

    Metrics (see :func:`evals.run.evaluate`), a table and a figure go to the MLflow run named in ``run.json`` next to
    the checkpoint. Without that file, as for an imported checkpoint, they go to a new run of the kind ``evaluate``.
    Raises ConfigError, CheckpointError or DataError before anything is logged; a new run is then marked as failed.
    """
    section = recipe.evaluate
    check_section(recipe)
    checkpoint = (section.checkpoint or recipe.final_checkpoint).absolute()
    key = "run.name" if section.checkpoint is None else "evaluate.checkpoint"
    if not checkpoint.is_dir():
        if section.checkpoint is not None:
            raise CheckpointError(f"{key}: expected a checkpoint folder, found {quote(str(checkpoint))}")
        raise CheckpointError(
            f"{key}: {checkpoint} does not exist; run the train step first, or set evaluate.checkpoint"
        )
    with naming(key):
        config = checkpoints.load_config(checkpoint)
        trained = run_of_checkpoint(checkpoint)
        if trained is None:  # nothing that is refused leaves a failed run behind
            checkpoints.load(checkpoint)
        digest = weights_digest(checkpoint)
    if trained is not None:
        check_writable(trained.uri, store_key(recipe) if section.checkpoint is None else key)
    if recipe.train.use_gpu and not torch.cuda.is_available():
        raise ConfigError("train.use_gpu: no CUDA device here; pass --train.use_gpu false to evaluate on the CPU")
    if trained is None:
        check_tasks(recipe.model_copy(update={"model": config}), checkpoint, key)
    data_folder = recipe.prepared_data
    if data_folder is None:
        print(f"no prepared data in {recipe.data_folder}: fillers come from the standard library", flush=True)
    dataset = None
    if data_folder is not None and (data_folder / MANIFEST_NAME).is_file():
        dataset = dataset_input(data_folder, read_manifest(data_folder), "evaluation")
    with ExitStack() as stack:
        tracked = trained or stack.enter_context(_start_run(recipe, checkpoint, config))
        with system_metrics(tracked, recipe.tracking.system_metrics_interval, "system/evaluation/"):
            metrics = score_tasks(checkpoint, recipe, checkpoint_key=key)
        if dataset is not None:
            tracked.log_dataset(dataset)
        tracked.log_metrics(metrics)
        tracked.set_tags({WEIGHTS_TAG: digest})
        _log_scores(tracked, metrics, str(checkpoint))
    if len(section.lengths) > 1:
        _print_effective_lengths(recipe, metrics)
    print(f"scores: {tracked.url_hint()}", flush=True)
    return EvaluateResult(tracked.run_id, checkpoint, metrics)


def _start_run(recipe: Recipe, checkpoint: Path, config: ModelConfig) -> TrackedRun:
    """Start a run for the scores of a checkpoint that no run here trained."""
    name = "/".join(checkpoint.parts[-2:])
    print(f"no {RUN_FILE} next to {checkpoint}: the scores go to the new run '{name}'", flush=True)
    recipe = recipe.model_copy(update={"model": config})
    tracked = open_tracking(recipe).start_run(name, kind="evaluate", recipe=recipe)
    tracked.set_tags({"evaluated.checkpoint": str(checkpoint)})
    return tracked


def _log_scores(tracked: TrackedRun, metrics: dict[str, float], title: str) -> None:
    """Log and print the tables of recall and perplexity."""
    if scores := scores_from_metrics(metrics):
        tracked.log_table(
            {
                "task": [score.task for score in scores],
                "length": [score.length for score in scores],
                "depth": [score.depth for score in scores],
                "recall": [score.recall for score in scores],
                "standard error": [score.stderr for score in scores],
                "questions": [score.questions for score in scores],
            },
            TABLE_FILE,
        )
        tracked.log_figure(recall_figure(scores), FIGURE_FILE)
        _print_scores(scores, title)
    if perplexities := _perplexities(metrics):
        columns = ["length", "depth", "perplexity", "likelihood", "standard error"]
        tracked.log_table(dict(zip(columns, map(list, zip(*perplexities)))), PERPLEXITY_FILE)
        rows = [[str(n), f"{depth:g}", f"{p:.3f}", f"{q:.4f} ± {e:.4f}"] for n, depth, p, q, e in perplexities]
        print_table("perplexity by position", ["length", "depth", "perplexity", "probability of a token"], rows)


def _print_scores(scores: list[Score], title: str) -> None:
    rows = []
    for score in scores:
        spread = "" if score.stderr is None else f" ± {score.stderr:.3f}"
        depth = "" if score.depth is None else f"{score.depth:g}"
        rows.append([score.task, str(score.length), depth, f"{score.recall:.3f}{spread}", str(score.questions)])
    print_table(title, ["task", "length", "depth", "recall", "questions"], rows)


def _perplexities(metrics: dict[str, float]) -> list[tuple[int, float, float, float, float]]:
    """Return (length, depth, perplexity, likelihood, its standard error) of each point, in the order of evaluation."""
    found = []
    for name, perplexity in metrics.items():
        match Point.parse(name):
            case Point(_, length, float(depth)) as point, "perplexity":
                stderr = metrics.get(point.metric("likelihood_stderr"), math.nan)
                found.append((length, depth, perplexity, metrics[point.metric("likelihood")], stderr))
    return found


def _print_effective_lengths(recipe: Recipe, metrics: dict[str, float]) -> None:
    rows = []
    for task in recipe.evaluate.tasks:
        effective = metrics.get(f"eval/{task}/effective_length")
        rows.append([task, "no better than chance" if effective is None else f"{effective:.0f}"])
    title = f"effective length: score above {EFFECTIVE_SHARE:.0%} of that at {recipe.evaluate.lengths[0]} tokens"
    print_table(title, ["task", "tokens"], rows)


STEP = Step(run)
