"""Several keys asked at once (Hsieh et al. 2024, "RULER", multi-query NIAH)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Self

from evals.documents.base import MAX_ANSWER, Plan, Question, RetrievalTask
from evals.documents.facts import KEYS, MARKER, VALUES


@dataclass(frozen=True)
class MultiQuery(RetrievalTask):
    """``keys`` facts such as ``@K7`` and ``@M3``. ``@MK`` asks for the values of ``queries`` of them, in its order,
    ``37``."""

    name = "multi_query"
    keys: int = 8
    queries: int = 4

    def check(self) -> None:
        self.require("queries", 2, MAX_ANSWER, "one query is a needle among needles, as in multi_key")
        self.require("keys", self.queries + 1, len(KEYS), "one fact must be a distractor, and keys are letters")

    def plan(self, rng: random.Random, length: int) -> Plan:
        values = {key: rng.choice(VALUES) for key in rng.sample(KEYS, self.keys)}
        asked = rng.sample(list(values), self.queries)
        question = Question(MARKER + "".join(asked), "".join(values[key] for key in asked))
        return Plan([(MARKER + key, value) for key, value in values.items()], [question])

    def easier(self, rng: random.Random) -> Self:
        queries = rng.randint(2, self.queries)
        return type(self)(rng.randint(queries + 1, self.keys), queries)
