"""Score a checkpoint on the retrieval tasks with lm-eval, offline, at several lengths and depths."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from evals.lm import CheckpointLM
from model.errors import ConfigError

TASK_FOLDER = Path(__file__).parent / "tasks"
TASKS = ("mqar", "needle")


def evaluate(
    checkpoint_folder: str | Path,
    tasks: Sequence[str] = TASKS,
    lengths: Sequence[int] = (256,),
    depths: Sequence[float] = (0.1, 0.5, 0.9),
    samples: int = 64,
    seed: int = 4321,
    data_folder: str | Path | None = None,
    pairs: int = 8,
    device: str | torch.device = "cpu",
) -> dict[str, float]:
    """Recall of a checkpoint, decoded greedily from the compressed cache.

    ``lengths`` are document lengths in tokens, ``depths`` needle places from 0 to 1, ``samples`` documents per
    setting, ``pairs`` facts in an mqar document. Fillers are the validation texts of ``data_folder``, else the
    standard library's source files. Equal arguments give equal documents.

    Returns, with ``setting`` one of ``mqar/<length>`` and ``needle/<length>/<depth>``:

    * ``eval/<setting>/recall``: share of asked values that the model writes next, from 0 to 1;
    * ``eval/<setting>/recall_stderr``: its standard error over documents, whose questions are not independent;
      absent for a single document;
    * ``eval/<setting>/questions`` and ``eval/<setting>/documents``: how many were asked;
    * ``eval/recall``: ``eval/mqar/<lengths[0]>/recall``, the recall at the first length, by convention the training
      length; absent when ``tasks`` lacks mqar.

    Raises ConfigError for unknown tasks and for settings that are vacuous (see :mod:`evals.tasks.generators`) or do
    not fit the model, CheckpointError for a folder that cannot be loaded, DataError for missing or damaged shards.
    """
    check_settings(tasks, lengths, depths)
    model = CheckpointLM(checkpoint_folder, device=device)
    common = {
        "checkpoint": str(checkpoint_folder),
        "data": None if data_folder is None else str(data_folder),
        "samples": samples,
        "seed": seed,
        "pairs": pairs,
    }
    with _quiet_harness():
        built = []
        for length in lengths:
            if "mqar" in tasks:
                built.append(_task("mqar", f"mqar/{length}", {**common, "length": length}))
            if "needle" in tasks:
                for depth in depths:
                    built.append(
                        _task("needle", f"needle/{length}/{depth:g}", {**common, "length": length, "depth": depth})
                    )
        # The standard error that lm-eval would compute takes the questions of one document for independent.
        results = simple_evaluate(model, tasks=built, task_manager=_manager({}), bootstrap_iters=0)
    metrics: dict[str, float] = {}
    for setting, answered in results["samples"].items():
        metrics |= {f"eval/{setting}/{name}": value for name, value in _summary(answered).items()}
    if "mqar" in tasks:
        metrics["eval/recall"] = metrics[f"eval/mqar/{lengths[0]}/recall"]
    return metrics


def check_settings(tasks: Sequence[str], lengths: Sequence[int], depths: Sequence[float]) -> None:
    """Raise ConfigError, naming the argument, for unknown tasks and for empty or repeated values."""
    for task in tasks:
        if task not in TASKS:
            raise ConfigError(f"tasks: '{task}' is not one of {', '.join(TASKS)}")
    for name, values in (("tasks", tasks), ("lengths", lengths), ("depths", depths)):
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"{name}: expected at least one value without duplicates, found {list(values)}")


def _manager(metadata: dict[str, Any]) -> TaskManager:
    return TaskManager(include_path=str(TASK_FOLDER), include_defaults=False, metadata=metadata)


def _task(name: str, setting: str, metadata: dict[str, Any]) -> Task:
    """The task ``name`` with other metadata than its YAML's, under a name of its own."""
    task = _manager(metadata).load([name])["tasks"][name]
    task.set_config("task", setting)
    return task


def _summary(answered: list[dict[str, Any]]) -> dict[str, float]:
    by_document: dict[int, list[float]] = defaultdict(list)
    for sample in answered:
        by_document[sample["doc"]["document"]].append(sample["recall"])
    # Every document of a setting asks equally many questions, so the mean of means is the mean.
    recalls = [statistics.fmean(scores) for scores in by_document.values()]
    summary = {"recall": statistics.fmean(recalls)}
    if len(recalls) > 1:
        summary["recall_stderr"] = statistics.stdev(recalls) / math.sqrt(len(recalls))
    return {**summary, "questions": float(len(answered)), "documents": float(len(recalls))}


@contextlib.contextmanager
def _quiet_harness() -> Iterator[None]:
    """Without lm-eval's warning and progress bar per setting; logged errors, and the model's own bar, still show."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
