"""Generated retrieval documents of a split."""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass

import numpy as np

from evals.documents import RETRIEVAL_TASKS, TASKS
from evals.documents.base import RetrievalTask
from evals.documents.facts import Speller
from model.errors import ConfigError
from model.tokenizer import Tokenizer
from pipelines.data.manifest import Kind, Split
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
        try:
            self._speller.check()
        except ConfigError as error:
            reason = str(error).removeprefix("tokenizer: ")
            raise ConfigError(f"data.tokenizer: {self._data.tokenizer}: {reason}") from error
        longest = self._data.sequence_length
        for length in self._data.retrieval_lengths:
            if length > longest:
                raise ConfigError(f"data.retrieval_lengths: {length} exceeds data.sequence_length {longest}")
        for length in {longest, *self._data.retrieval_lengths}:
            for task, _ in self._tasks:
                try:
                    shortest = task.lengths(length)[-1]
                    rounds = self._data.rounds if task.asks_all else 1
                    filler = np.zeros(max(shortest, 0), dtype=np.int32)
                    task.document(self._rng, self._speller, filler, shortest, self._distance, rounds)
                except ConfigError as error:
                    keys = f"data.pairs, data.rounds, data.task_settings and {self._distance_key()}"
                    lengths = "data.sequence_length and data.retrieval_lengths"
                    reason = str(error).removeprefix("length: ")
                    raise ConfigError(f"{keys} must fit {lengths}: {task.name}: {reason}") from error

    def _distance_key(self) -> str:
        return "model.window" if self._data.retrieval_distance is None else "data.retrieval_distance"

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
    total = sum(data.retrieval_tasks.values())
    if not total:
        raise ConfigError("data.retrieval_tasks: at least one weight must be above 0")
    tasks: list[tuple[RetrievalTask, float]] = []
    for name in sorted(data.retrieval_tasks, reverse=True):
        if weight := data.retrieval_tasks[name]:
            try:
                task = RETRIEVAL_TASKS[name].create(data.settings_of(name), recipe.model)
            except ConfigError as error:
                raise name_setting(error) from None
            tasks.append((task, weight / total))
    return tasks


def name_setting(error: ConfigError) -> ConfigError:
    """Return an error about a task's setting, such as "mqar: pairs must be ...", with the recipe's key instead."""
    task, _, rest = str(error).partition(": ")
    unknown = re.match(r"'(\w+)' (is not one of its settings)", rest)
    if unknown is not None:
        return ConfigError(f"data.task_settings.{task}.{unknown[1]}: {rest[unknown.start(2) :]}")
    setting = re.match(r"\w+", rest)
    if task not in TASKS or setting is None or setting[0] not in TASKS[task].settings():
        return ConfigError(f"data.task_settings: {error}")
    key = "data.pairs" if (task, setting[0]) == ("mqar", "pairs") else f"data.task_settings.{task}.{setting[0]}"
    return ConfigError(f"{key}: {rest[setting.end() :].lstrip(': ')}")
