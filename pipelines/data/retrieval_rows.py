"""Generated retrieval documents of a split."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

import numpy as np

from evals.documents import RETRIEVAL_TASKS, TASKS
from evals.documents.base import RetrievalTask
from evals.documents.facts import Speller
from model.errors import ConfigError
from model.tokenizer import Tokenizer
from pipelines.data.manifest import Kind, Split
from pipelines.recipe.messages import naming
from pipelines.recipe.schema import Recipe


@dataclass(frozen=True)
class StoredDocument:
    """A document, or a piece of a long one: one row of a shard."""

    document_id: str
    piece: int
    source: str
    kind: Kind
    tokens: np.ndarray
    answers: list[tuple[int, int]]
    """Token spans [start, end)."""


class RetrievalGenerator:
    """Generates retrieval documents of one split, from the split's own random seed.

    Training documents draw their settings up to the configured ones, and the number of rounds in which they ask; those
    for validation have the configured settings and ask once.
    """

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer, split: Split):
        self._data = recipe.data
        distance = recipe.data.retrieval_distance
        self._distance = recipe.model.window if distance is None else distance
        self._speller = Speller(tokenizer)
        self._split = split
        self._rng = random.Random(f"{recipe.data.seed} {split}")
        self._tasks = _weighted_tasks(recipe)

    def check(self) -> None:
        """Raise ConfigError if the tokenizer cannot write facts and questions, or if these do not fit into documents of
        the configured lengths."""
        with naming(f"data.tokenizer: {self._data.tokenizer}"):
            self._speller.check()
        longest = self._data.sequence_length
        for length in self._data.retrieval_lengths:
            if length > longest:
                raise ConfigError(f"data.retrieval_lengths: {length} exceeds data.sequence_length {longest}")
        given = self._data.retrieval_distance
        least = self._distance if given is None else 0
        limits = []
        for length in {longest, *self._data.retrieval_lengths}:
            key = "data.sequence_length" if length == longest else "data.retrieval_lengths"
            for task, _ in self._tasks:
                shortest, rounds = task.lengths(length)[-1], self._data.rounds if task.asks_all else 1
                with naming(None, {"length": key}.get):
                    plan = task.plan(self._rng, shortest)
                    limits.append(
                        (task.max_distance(plan, self._speller, shortest, least, rounds), shortest, task.name)
                    )
        farthest, length, name = min(limits)
        if farthest < self._distance:
            reason = f"must be at most {farthest}, because {length} tokens must hold the facts and questions of {name}"
            raise ConfigError(f"{reason}, found {given}", "data.retrieval_distance")

    def generate(self, text: np.ndarray) -> StoredDocument:
        """Plant facts in a random slice of ``text``, int32 of at least ``sequence_length`` tokens."""
        training = self._split == "train"
        length = self._data.sequence_length
        if training and self._data.retrieval_lengths:
            length = self._rng.choice(self._data.retrieval_lengths)
        start = self._rng.randrange(len(text) - length + 1)
        filler = text[start : start + length]
        task = self._draw_task()
        if len(lengths := task.lengths(length)) > 1:
            length = self._rng.choice(lengths)
        rounds = 1
        if training:
            task = task.easier(self._rng)
            rounds = self._rng.randint(1, self._data.rounds) if task.asks_all else 1
        document = task.document(self._rng, self._speller, filler, length, self._distance, rounds)
        document_id = hashlib.sha256(document.tokens.tobytes()).hexdigest()[:32]
        return StoredDocument(document_id, 0, "generated", task.name, document.tokens, document.answers)

    def _draw_task(self) -> RetrievalTask:
        draw = self._rng.random()
        for task, weight in self._tasks:
            if draw < weight:
                return task
            draw -= weight
        return self._tasks[-1][0]


def _weighted_tasks(recipe: Recipe) -> list[tuple[RetrievalTask, float]]:
    """Return the tasks of ``data.retrieval_tasks`` and their shares, in descending order of name.

    Raises ConfigError, naming the setting, for unknown tasks, for vacuous settings, and for weights that are all zero.
    """
    data = recipe.data
    for key, names in (("retrieval_tasks", data.retrieval_tasks), ("task_settings", data.task_settings)):
        for name in names:
            if name not in RETRIEVAL_TASKS and (key == "retrieval_tasks" or name not in TASKS):
                raise ConfigError(f"data.{key}: '{name}' is not one of {', '.join(RETRIEVAL_TASKS)}")
    with naming(None, setting_key):
        for name in data.task_settings:
            TASKS[name].create(data.settings_of(name), recipe.model)
    total = sum(data.retrieval_tasks.values())
    if not total:
        raise ConfigError("data.retrieval_tasks: at least one weight must be above 0")
    tasks: list[tuple[RetrievalTask, float]] = []
    for name in sorted(data.retrieval_tasks, reverse=True):
        if weight := data.retrieval_tasks[name]:
            with naming(None, setting_key):
                task = RETRIEVAL_TASKS[name].create(data.settings_of(name), recipe.model)
            tasks.append((task, weight / total))
    return tasks


def setting_key(field: str) -> str:
    """Return the recipe's key of ``<task>.<setting>``."""
    return "data.pairs" if field == "mqar.pairs" else f"data.task_settings.{field}"
