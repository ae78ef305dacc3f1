"""Offline evaluation of a checkpoint on the long-context tasks with lm-eval."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from evals.documents import TASKS, task_class
from evals.lm import CheckpointLM
from evals.scores import Point, cluster_likelihood, cluster_mean, effective_length
from model.errors import ConfigError

TASK_FOLDER = Path(__file__).parent / "tasks"
_ESTIMATORS = {"recall": cluster_mean, "likelihood": cluster_likelihood}
"""Functions that return a metric's score and standard error."""

Settings = Mapping[str, Mapping[str, Any]]
Samples = list[dict[str, Any]]


def evaluate(
    checkpoint_folder: str | Path,
    tasks: Sequence[str] = ("mqar", "needle"),
    lengths: Sequence[int] = (256,),
    depths: Sequence[float] = (0.1, 0.5, 0.9),
    samples: int = 64,
    seed: int = 4321,
    data_folder: str | Path | None = None,
    settings: Settings | None = None,
    distance: int | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, float]:
    """Score a checkpoint with greedy decoding from the compressed cache.

    ``lengths`` are document lengths in tokens, ``depths`` positions from 0 to 1 for the tasks that have them,
    ``samples`` the number of documents per setting, and ``settings`` the settings of tasks by name
    (:mod:`evals.documents`). ``distance`` is the number of tokens between facts and questions; None keeps them outside
    the stacked windows of the model. Text comes from the validation split of ``data_folder`` or, without one, from the
    standard library's source files. The same arguments always generate the same documents.

    Returns these metrics for each ``setting``, ``<task>/<length>`` or ``<task>/<length>/<depth>``:

    * ``eval/<setting>/recall``: share of the answers' characters that are right, from 0 to 1; for perplexity,
      ``likelihood`` instead, the geometric mean probability of a token, and ``perplexity``, its inverse;
    * ``eval/<setting>/recall_stderr`` or ``likelihood_stderr``: its standard error over documents, because questions
      of one document are not independent; absent for a single document;
    * ``eval/<setting>/questions`` and ``eval/<setting>/documents``: the number of each;
    * ``eval/residue/<length>/worst_recall``: the recall of the worst of the sweep's lengths;
    * ``eval/<task>/effective_length``, for several lengths: the longest length up to which the score, averaged over
      depths, stays above 0.85 of that at ``lengths[0]``, by convention the training length; absent for a task whose
      score there is no better than chance;
    * ``eval/recall``: ``eval/mqar/<lengths[0]>/recall``; absent if ``tasks`` does not include mqar.

    Raises ConfigError for unknown tasks and for settings that are vacuous (see :mod:`evals.source`) or exceed the
    model's context, CheckpointError if the folder cannot be loaded, and DataError for missing or damaged shards.
    """
    check_settings(tasks, lengths, depths, settings)
    model = CheckpointLM(checkpoint_folder, device=device)
    built = generate(checkpoint_folder, tasks, lengths, depths, samples, seed, data_folder, settings, distance)
    with _quiet_lm_eval():
        # No bootstrap: lm-eval would treat the questions of one document as independent.
        results = simple_evaluate(model, tasks=list(built.values()), task_manager=_task_manager({}), bootstrap_iters=0)
    summaries = {point: _summarize(point.task, results["samples"][point.name]) for point in built}
    metrics = {point.metric(name): value for point, summary in summaries.items() for name, value in summary.items()}
    if len(lengths) > 1:
        for task in tasks:
            of_task = {point: summary for point, summary in summaries.items() if point.task == task}
            if (effective := _effective_length(of_task, lengths[0])) is not None:
                metrics[f"eval/{task}/effective_length"] = float(effective)
    if "mqar" in tasks:
        metrics["eval/recall"] = metrics[Point("mqar", lengths[0], None).metric("recall")]
    return metrics


def generate(
    checkpoint_folder: str | Path,
    tasks: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    seed: int,
    data_folder: str | Path | None,
    settings: Settings | None,
    distance: int | None,
) -> dict[Point, Task]:
    """Return lm-eval's tasks with their documents, by point. Of the checkpoint, configuration and tokenizer are read.

    Arguments and errors are those of :func:`evaluate`.
    """
    settings = settings or {}
    check_settings(tasks, lengths, depths, settings)
    common = {
        "checkpoint": str(checkpoint_folder),
        "data": None if data_folder is None else str(data_folder),
        "samples": samples,
        "seed": seed,
        "distance": distance,
    }
    points = [
        Point(task, length, depth)
        for length, task in itertools.product(lengths, tasks)
        for depth in (depths if task_class(task).per_depth else (None,))
    ]
    with _quiet_lm_eval():
        return {point: _load_task(point, {**common, **settings.get(point.task, {})}) for point in points}


def check_settings(
    tasks: Sequence[str], lengths: Sequence[int], depths: Sequence[float], settings: Settings | None = None
) -> None:
    """Raise ConfigError, naming the argument, for unknown tasks and settings, and for empty or repeated values."""
    for name in (*tasks, *(settings or {})):
        task_class(name)
    for name, values in (settings or {}).items():
        if task_class(name).per_depth and "depth" in values:
            raise ConfigError("is set by depths, not by the task's settings", f"{name}.depth")
        task_class(name).create(values, None)
    for name, given in (("tasks", tasks), ("lengths", lengths), ("depths", depths)):
        if not given or len(set(given)) < len(given):
            raise ConfigError(f"expected at least one value without duplicates, found {list(given)}", name)


def _task_manager(metadata: dict[str, Any]) -> TaskManager:
    return TaskManager(include_path=str(TASK_FOLDER), include_defaults=False, metadata=metadata)


def _load_task(point: Point, metadata: dict[str, Any]) -> Task:
    """Return a point's task with ``metadata`` over its YAML's, renamed to the point."""
    metadata = {**metadata, "length": point.length}
    if point.depth is not None:
        metadata["depth"] = point.depth
    task = _task_manager(metadata).load([point.task])["tasks"][point.task]
    task.set_config("task", point.name)
    if TASKS[point.task].metric == "recall":
        longest = max(map(len, task.dataset["test"]["answer"]))
        task.set_config("generation_kwargs", {"max_gen_toks": longest + 1}, update=True)
    return task


def _summarize(task: str, samples: Samples) -> dict[str, float]:
    metric = TASKS[task].metric
    results = [sample[metric] for sample in samples]
    score, stderr = _ESTIMATORS[metric](results)
    summary: dict[str, float] = {metric: score}
    if stderr is not None:
        summary[f"{metric}_stderr"] = stderr
    if metric == "likelihood":
        summary["perplexity"] = 1 / score
    by_length: dict[int, list[float]] = defaultdict(list)
    for sample, (_, result) in zip(samples, results):
        by_length[sample["doc"]["length"]].append(result)
    if len(by_length) > 1:
        summary[f"worst_{metric}"] = min(map(statistics.fmean, by_length.values()))
    documents = len({document for document, _ in results})
    return {**summary, "questions": float(len(samples)), "documents": float(documents)}


def _effective_length(summaries: Mapping[Point, Mapping[str, float]], training_length: int) -> int | None:
    """Return the effective length of one task, from its score averaged over depths."""
    task = TASKS[next(iter(summaries)).task]
    by_length: dict[int, list[Mapping[str, float]]] = defaultdict(list)
    for point, summary in summaries.items():
        by_length[point.length].append(summary)
    scores = {
        length: statistics.fmean(summary[task.metric] for summary in found) for length, found in by_length.items()
    }
    at_training = by_length[training_length]
    variance = sum(summary.get(f"{task.metric}_stderr", 0.0) ** 2 for summary in at_training)
    return effective_length(scores, training_length, task.chance, math.sqrt(variance) / len(at_training))


@contextlib.contextmanager
def _quiet_lm_eval() -> Iterator[None]:
    """Suppress lm-eval's warnings and progress bars. Logged errors and the model's own progress bar are kept."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
