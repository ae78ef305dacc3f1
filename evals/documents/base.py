"""Generated documents: facts inserted into real text, with questions at the end.

Every fact ends at least ``distance`` tokens before the first question, so that a network whose attention reaches less
far must remember it.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np

from evals.documents.facts import VALUES, Speller
from model.config import ModelConfig
from model.errors import ConfigError
from model.wording import TYPE_NAMES, count, quote

MAX_ANSWER = 10
"""Characters of the longest answer."""


class Question(NamedTuple):
    prompt: str
    answer: str


class Plan(NamedTuple):
    """Facts to insert into a text, in this order, and the questions that follow it."""

    facts: Sequence[tuple[str, ...]]
    """Each in pieces that are encoded separately."""
    questions: Sequence[Question]
    depth: float | None = None
    """Position of the facts, from 0 at the start to 1 at the last position allowed. None draws a position for each."""


@dataclass(frozen=True)
class Document:
    """A generated document."""

    tokens: np.ndarray
    """int32 [length], starting with BOS."""
    answers: list[tuple[int, int]]
    """Token spans [start, end), one per question."""
    questions: list[Question]
    """In the order asked."""
    facts: Sequence[tuple[str, ...]]
    """In the order of the text."""


@dataclass(frozen=True)
class Task(ABC):
    """An evaluation task with its settings, which are the fields of a subclass.

    Raises ConfigError for a value that makes the task vacuous. Its ``field`` is ``<task>.<setting>``.
    """

    name: ClassVar[str]
    metric: ClassVar[Literal["recall", "likelihood"]]
    """Name of the score: share of an answer's characters that are right, or mean probability of a token."""
    per_depth: ClassVar[bool] = False
    """True for tasks with a setting ``depth``, which are evaluated at several depths."""
    chance: ClassVar[float] = 1 / len(VALUES)
    """Score without any memory of the document."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            wanted = (int, float) if "float" in str(field.type) else (int,)
            optional = value is None and "None" in str(field.type)
            if not optional and (isinstance(value, bool) or not isinstance(value, wanted)):
                expected = TYPE_NAMES[wanted[-1]]
                raise ConfigError(f"expected {expected}, found {quote(value)}", f"{self.name}.{field.name}")
        self.check()

    @abstractmethod
    def check(self) -> None:
        """Raise ConfigError if a setting is out of range."""

    def check_model(self, config: ModelConfig) -> None:  # noqa: B027 (most tasks have no such setting)
        """Raise ConfigError if a setting is vacuous for a network."""

    @classmethod
    def defaults(cls, config: ModelConfig) -> dict[str, int]:
        """Return the settings whose defaults depend on the network."""
        return {}

    @property
    def fewest_samples(self) -> int:
        """Number of documents below which the task is vacuous."""
        return 1

    def require(self, setting: str, low: int, high: int, reason: str) -> None:
        """Raise ConfigError unless the setting is between ``low`` and ``high``."""
        value = getattr(self, setting)
        if not low <= value <= high:
            raise ConfigError(f"must be from {low} to {high}, found {value}: {reason}", f"{self.name}.{setting}")

    @classmethod
    def settings(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls))

    @classmethod
    def create(cls, settings: Mapping[str, Any], config: ModelConfig | None) -> Self:
        """Return the task with ``settings`` over its defaults, which may depend on the network.

        Raises ConfigError, naming the choices, for unknown settings, and for vacuous ones.
        """
        for name in settings:
            if name not in cls.settings():
                raise ConfigError(f"is not one of its settings ({', '.join(cls.settings())})", f"{cls.name}.{name}")
        task = cls(**{**({} if config is None else cls.defaults(config)), **settings})
        if config is not None:
            task.check_model(config)
        return task


class RetrievalTask(Task):
    """A task whose documents hold facts and questions."""

    metric = "recall"
    asks_all: ClassVar[bool] = False
    """True for documents with a question for each of several facts, which training documents may repeat."""

    @abstractmethod
    def plan(self, rng: random.Random, length: int) -> Plan:
        """Return facts and questions of a document of ``length`` tokens."""

    def easier(self, rng: random.Random) -> Self:
        """Return the task with settings drawn up to these, for a training document."""
        return self

    def lengths(self, length: int) -> list[int]:
        """Return the lengths, at most ``length`` tokens, that consecutive documents cycle through."""
        return [length]

    def max_distance(self, plan: Plan, speller: Speller, length: int, distance: int, rounds: int = 1) -> int:
        """Return the largest distance at which facts and questions fit into a document of ``length`` tokens. Raises
        ConfigError if ``distance`` is larger."""
        fact_tokens = sum(len(speller(piece)) for fact in plan.facts for piece in fact)
        question_tokens = sum(len(speller(part)) for question in plan.questions for part in question)
        farthest = length - 2 - fact_tokens - rounds * question_tokens  # BOS and a token of text come before the facts
        if distance > farthest:
            room = f"{count(len(plan.facts), 'fact')} of {self.name} at least {count(distance, 'token')}"
            asked = f", asked {rounds} times" if rounds > 1 else ""
            raise ConfigError(f"{length} tokens are too few for {room} before the first question{asked}", "length")
        return farthest

    def document(
        self,
        rng: random.Random,
        speller: Speller,
        filler: np.ndarray,
        length: int,
        distance: int,
        rounds: int = 1,
    ) -> Document:
        """Return a document of exactly ``length`` tokens.

        All questions are asked in random order. With several ``rounds``, they are asked again in a new order each time;
        a later question can then find its answer in an earlier one. More rounds speed up training; evaluation uses one.
        ``filler`` is tokenized text, int32 of at least ``length`` tokens. Raises ConfigError if facts and questions do
        not fit.
        """
        plan = self.plan(rng, length)
        facts = [[token for piece in pieces for token in speller(piece)] for pieces in plan.facts]
        text_tokens = 1 + self.max_distance(plan, speller, length, distance, rounds)  # without BOS and inserted facts
        last_position = text_tokens - distance  # latest position of a fact in the text
        if len(filler) < text_tokens:
            raise ConfigError(f"expected at least {count(text_tokens, 'token')} of text, found {len(filler)}", "filler")
        if plan.depth is not None:
            positions = [round(plan.depth * last_position)] * len(facts)
        else:
            positions = sorted(rng.randrange(last_position + 1) for _ in facts)
        offsets = np.repeat(positions, [len(fact) for fact in facts])
        # Tokens that are inserted at the same offset keep their order.
        text = np.insert(filler[:text_tokens], offsets, [token for fact in facts for token in fact])
        size = 1 + len(text)
        tail: list[int] = []
        answers, questions = [], []
        for _ in range(rounds):
            for question in rng.sample(plan.questions, len(plan.questions)):
                prompt, answer = speller(question.prompt), speller(question.answer)
                answers.append((size + len(prompt), size + len(prompt) + len(answer)))
                questions.append(question)
                tail += [*prompt, *answer]
                size += len(prompt) + len(answer)
        tokens = np.concatenate([[speller.tokenizer.bos_id], text, np.array(tail)]).astype(np.int32)
        return Document(tokens, answers, questions, plan.facts)
