"""Seeded generators of evaluation documents; training data mixes them in, too."""

from __future__ import annotations

from evals.documents.base import RetrievalTask, Task
from evals.documents.frequent_words import FrequentWords
from evals.documents.mqar import Mqar
from evals.documents.multi_key import MultiKey
from evals.documents.multi_query import MultiQuery
from evals.documents.multi_value import MultiValue
from evals.documents.needle import Needle
from evals.documents.perplexity import Perplexity
from evals.documents.residue import Residue
from evals.documents.selective_copy import SelectiveCopy
from evals.documents.variable_tracking import VariableTracking
from model.errors import ConfigError

_TASKS: tuple[type[Task], ...] = (
    Mqar,
    Needle,
    MultiKey,
    MultiValue,
    MultiQuery,
    VariableTracking,
    FrequentWords,
    SelectiveCopy,
    Residue,
    Perplexity,
)
TASKS: dict[str, type[Task]] = {task.name: task for task in _TASKS}
"""All evaluation tasks."""
RETRIEVAL_TASKS: dict[str, type[RetrievalTask]] = {
    name: task for name, task in TASKS.items() if issubclass(task, RetrievalTask)
}
"""Tasks whose documents can be mixed into training data."""


def task_class(name: str) -> type[Task]:
    """Return a task's class. Raises ConfigError, naming the choices, for an unknown name."""
    if name not in TASKS:
        raise ConfigError(f"'{name}' is not one of {', '.join(TASKS)}", "tasks")
    return TASKS[name]
