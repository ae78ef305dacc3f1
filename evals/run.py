"""Offline evaluation of a checkpoint on the retrieval tasks with lm-eval."""

from __future__ import annotations

import contextlib
import io
import itertools
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
TASKS = {"mqar": False, "needle": True}
"""The tasks, and whether a task is run at every depth."""


def evaluate(
    checkpoint_folder: str | Path,
    tasks: Sequence[str] = tuple(TASKS),
    lengths: Sequence[int] = (256,),
    depths: Sequence[float] = (0.1, 0.5, 0.9),
    samples: int = 64,
    seed: int = 4321,
    data_folder: str | Path | None = None,
    pairs: int = 8,
    device: str | torch.device = "cpu",
) -> dict[str, float]:
    """Measure the recall of a checkpoint with greedy decoding from the compressed cache.

    ``lengths`` are document lengths in tokens, ``depths`` needle positions from 0 to 1, ``samples`` the number of
    documents per setting, and ``pairs`` the number of facts in an mqar document. Fillers come from the validation
    texts of ``data_folder`` or, without one, from the standard library's source files. The same arguments always
    generate the same documents.

    Returns these metrics for each ``setting``, ``mqar/<length>`` or ``needle/<length>/<depth>``:

    * ``eval/<setting>/recall``: fraction of questions answered with the right value, from 0 to 1;
    * ``eval/<setting>/recall_stderr``: its standard error over documents, because questions of one document are not
      independent; absent for a single document;
    * ``eval/<setting>/questions`` and ``eval/<setting>/documents``: the number of each;
    * ``eval/recall``: ``eval/mqar/<lengths[0]>/recall``, where the first length is by convention the training length;
      absent if ``tasks`` does not include mqar.

    Raises ConfigError for unknown tasks and for settings that are vacuous (see :mod:`evals.tasks.generators`) or
    exceed the model's context, CheckpointError if the folder cannot be loaded, and DataError for missing or damaged
    shards.
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
    with _quiet_lm_eval():
        built = []
        for length, task in itertools.product(lengths, tasks):
            at_length: dict[str, Any] = {**common, "length": length}
            if TASKS[task]:
                settings = [(f"{task}/{length}/{depth:g}", {**at_length, "depth": depth}) for depth in depths]
            else:
                settings = [(f"{task}/{length}", at_length)]
            built += [_load_task(task, setting, metadata) for setting, metadata in settings]
        # No bootstrap: lm-eval would treat the questions of one document as independent.
        results = simple_evaluate(model, tasks=built, task_manager=_task_manager({}), bootstrap_iters=0)
    metrics: dict[str, float] = {}
    for setting, samples_of_setting in results["samples"].items():
        metrics |= {f"eval/{setting}/{name}": value for name, value in _summarize(samples_of_setting).items()}
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


def _task_manager(metadata: dict[str, Any]) -> TaskManager:
    return TaskManager(include_path=str(TASK_FOLDER), include_defaults=False, metadata=metadata)


def _load_task(name: str, setting: str, metadata: dict[str, Any]) -> Task:
    """Return the task ``name`` with ``metadata`` over its YAML's, renamed to ``setting``."""
    task = _task_manager(metadata).load([name])["tasks"][name]
    task.set_config("task", setting)
    return task


def _summarize(samples: list[dict[str, Any]]) -> dict[str, float]:
    by_document: dict[int, list[float]] = defaultdict(list)
    for sample in samples:
        by_document[sample["doc"]["document"]].append(sample["recall"])
    # All documents of a setting have the same number of questions, so the mean of means is the overall mean.
    recalls = [statistics.fmean(scores) for scores in by_document.values()]
    summary = {"recall": statistics.fmean(recalls)}
    if len(recalls) > 1:
        summary["recall_stderr"] = statistics.stdev(recalls) / math.sqrt(len(recalls))
    return {**summary, "questions": float(len(samples)), "documents": float(len(recalls))}


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
