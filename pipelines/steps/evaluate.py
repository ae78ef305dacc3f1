"""The evaluate step: score a checkpoint with lm-eval and put the scores into the run that trained it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure

from evals.run import evaluate
from model import checkpoint as checkpoints
from model.errors import CheckpointError, ConfigError
from pipelines.recipe.schema import Recipe
from pipelines.reports.terminal import print_table
from pipelines.tracking.mlflow_store import TrackedRun, attach

RUN_FILE = "run.json"
WEIGHTS_TAG = "eval.weights_sha256"
"""The run's tag that tells which weights its ``eval/`` metrics belong to."""
TABLE_FILE = "evaluation/recall.json"
FIGURE_FILE = "evaluation/recall.png"


@dataclass(frozen=True)
class EvaluateResult:
    run_id: str
    checkpoint: Path
    metrics: dict[str, float]


@dataclass(frozen=True)
class Score:
    """One line of the result table; ``depth`` is None for tasks without depths."""

    task: str
    length: int
    depth: float | None
    recall: float
    stderr: float | None
    questions: int


def run(recipe: Recipe) -> EvaluateResult:
    """Evaluate ``evaluate.checkpoint``, or the final checkpoint of ``run.name``.

    The metrics (see :func:`evals.run.evaluate`), a table and a figure go to the MLflow run named in ``run.json`` beside
    the checkpoint. Raises ConfigError, CheckpointError or DataError before anything is logged.
    """
    section = recipe.evaluate
    checkpoint = (section.checkpoint or recipe.final_checkpoint).absolute()
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint}: no checkpoint there; run the train step first")
    tracked = run_of_checkpoint(checkpoint)
    if recipe.train.use_gpu and not torch.cuda.is_available():
        raise ConfigError("train.use_gpu: no CUDA device here; pass --train.use_gpu false to evaluate on the CPU")
    digest = weights_digest(checkpoint)
    data_folder: Path | None = recipe.data_folder
    if not recipe.data_folder.is_dir():
        print(f"no prepared data in {recipe.data_folder}: fillers come from the standard library", flush=True)
        data_folder = None
    metrics = evaluate(
        checkpoint,
        section.tasks,
        section.lengths,
        section.depths,
        section.samples,
        section.seed,
        data_folder,
        recipe.data.pairs,
        device="cuda" if recipe.train.use_gpu else "cpu",
    )
    scores = scores_of(metrics)
    tracked.log_metrics(metrics)
    tracked.set_tags({WEIGHTS_TAG: digest})
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
    tracked.log_figure(figure(scores), FIGURE_FILE)
    _print(scores, str(checkpoint))
    print(f"scores: {tracked.url_hint()}", flush=True)
    return EvaluateResult(tracked.run_id, checkpoint, metrics)


def weights_digest(checkpoint: Path) -> str:
    """SHA-256 of a checkpoint's weights as they are stored. Raises CheckpointError when they cannot be read."""
    digest = hashlib.sha256()
    for path in checkpoints.weight_files(checkpoint):
        try:
            with path.open("rb") as file:
                hashlib.file_digest(file, lambda: digest)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from error
    return digest.hexdigest()


def run_of_checkpoint(checkpoint: Path) -> TrackedRun:
    """The MLflow run that trained a checkpoint, from ``run.json`` beside its folder. Raises ConfigError."""
    path = checkpoint.parent / RUN_FILE
    try:
        content = json.loads(path.read_text())
        run_id, uri = content["run_id"], content["tracking_uri"]
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}, so the run of {checkpoint} is unknown") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: expected JSON with run_id and tracking_uri") from error
    return attach(uri, run_id)


def scores_of(metrics: dict[str, float]) -> list[Score]:
    """The table's lines, read back from the metric names, in the order of evaluation."""
    scores = []
    for name, value in metrics.items():
        parts = name.split("/")
        if len(parts) < 4 or parts[-1] != "recall":
            continue
        setting = name.removesuffix("recall")
        scores.append(
            Score(
                task=parts[1],
                length=int(parts[2]),
                depth=float(parts[3]) if len(parts) == 5 else None,
                recall=value,
                stderr=metrics.get(f"{setting}recall_stderr"),
                questions=int(metrics[f"{setting}questions"]),
            )
        )
    return scores


def figure(scores: list[Score]) -> Figure:
    """Recall by length for every task, and a heat map of the needle by length and depth where there is one."""
    needles = [score for score in scores if score.depth is not None]
    canvas = Figure(figsize=(10 if needles else 5, 4), layout="constrained")
    axes = canvas.subplots(1, 2 if needles else 1, squeeze=False)[0]

    lengths = sorted({score.length for score in scores})
    for task in dict.fromkeys(score.task for score in scores):
        of_task = [[score for score in scores if score.task == task and score.length == length] for length in lengths]
        means = [sum(score.recall for score in group) / len(group) for group in of_task]
        errors = [sum((score.stderr or 0.0) ** 2 for score in group) ** 0.5 / len(group) for group in of_task]
        label = f"{task} (mean over depths)" if of_task[0][0].depth is not None else task
        axes[0].errorbar(lengths, means, yerr=errors, marker="o", capsize=3, label=label)
    axes[0].set_xscale("log", base=2)
    axes[0].set_xticks(lengths, [str(length) for length in lengths])
    axes[0].minorticks_off()
    axes[0].set(xlabel="document length (tokens)", ylabel="recall", ylim=(-0.03, 1.03), title="Recall by length")
    axes[0].grid(alpha=0.3)
    axes[0].legend()

    if needles:
        depths = sorted({score.depth for score in needles if score.depth is not None})
        found = {(score.depth, score.length): score.recall for score in needles}
        grid = [[found[depth, length] for length in lengths] for depth in depths]
        image = axes[1].imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for row, values in enumerate(grid):
            for column, value in enumerate(values):
                colour = "black" if value > 0.5 else "white"
                axes[1].text(column, row, f"{value:.2f}", ha="center", va="center", color=colour)
        axes[1].set_xticks(range(len(lengths)), [str(length) for length in lengths])
        axes[1].set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
        axes[1].set(xlabel="document length (tokens)", ylabel="needle depth (0 = start)", title="Needle in real text")
        canvas.colorbar(image, ax=axes[1], label="recall")
    return canvas


def _print(scores: list[Score], title: str) -> None:
    rows = []
    for score in scores:
        spread = "" if score.stderr is None else f" ± {score.stderr:.3f}"
        depth = "" if score.depth is None else f"{score.depth:g}"
        rows.append([score.task, str(score.length), depth, f"{score.recall:.3f}{spread}", str(score.questions)])
    print_table(title, ["task", "length", "depth", "recall", "questions"], rows)
