"""Frequent-word extraction (Hsieh et al. 2024, "RULER"): the most frequent of coded words."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar, Self

from evals.documents.base import MAX_ANSWER, Plan, Question, RetrievalTask
from evals.documents.facts import KEYS, MARKER
from model.errors import ConfigError

EXPONENT = 2.0
"""Exponent of the Zipf distribution of word counts, as in RULER."""


@dataclass(frozen=True)
class FrequentWords(RetrievalTask):
    """Coded words such as ``@K``, ``words`` different ones, at random positions. ``@@`` asks for the ``top`` most
    frequent ones in order, ``KQM``. They are about ``share`` of the document's tokens, and their counts follow a Zipf
    distribution: the word of rank r occurs in proportion to r ** -2. The ``top`` words and the next one have different
    counts."""

    name = "frequent_words"
    chance: ClassVar[float] = 1 / len(KEYS)
    words: int = 8
    top: int = 3
    share: float = 0.25

    def check(self) -> None:
        self.require("top", 1, MAX_ANSWER, "these are the words asked for")
        self.require("words", self.top + 1, len(KEYS), "at least one word must be a distractor, and words are letters")
        if not 0 < self.share <= 0.5:
            raise ConfigError(f"must be above 0 and at most 0.5, found {self.share}", f"{self.name}.share")

    def plan(self, rng: random.Random, length: int) -> Plan:
        ranks = range(1, self.words + 1)
        occurrences = self.share * length / len(MARKER + KEYS[0])
        unit = occurrences / sum(rank**-EXPONENT for rank in ranks)
        counts = [max(1, round(unit * rank**-EXPONENT)) for rank in ranks]
        first = counts[: self.top + 1]
        if len(set(first)) < len(first):
            raise ConfigError(
                f"{length} tokens are too few for {self.top} words of different counts at a share of {self.share:g}; "
                f"lower {self.name}.top or raise {self.name}.share",
                "length",
            )
        words = rng.sample(KEYS, self.words)
        facts = [(MARKER + word,) for word, count in zip(words, counts) for _ in range(count)]
        rng.shuffle(facts)
        return Plan(facts, [Question(2 * MARKER, "".join(words[: self.top]))])

    def easier(self, rng: random.Random) -> Self:
        top = rng.randint(1, self.top)
        return type(self)(rng.randint(top + 1, self.words), top, self.share)
