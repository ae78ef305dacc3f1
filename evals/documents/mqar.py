"""Multi-query associative recall (Arora et al. 2023, "Zoology"): many key-value pairs, all of them asked."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Self

from evals.documents.base import Plan, Question, RetrievalTask
from evals.documents.facts import KEYS, MARKER, VALUES


@dataclass(frozen=True)
class Mqar(RetrievalTask):
    """Facts such as ``@K7`` at random positions, each asked by ``@K``."""

    name = "mqar"
    asks_all = True
    pairs: int = 8

    def check(self) -> None:
        self.require("pairs", 2, len(KEYS), "a single pair has no distractor, and keys are letters")

    def plan(self, rng: random.Random, length: int) -> Plan:
        facts = [(MARKER + key, rng.choice(VALUES)) for key in rng.sample(KEYS, self.pairs)]
        return Plan(facts, [Question(*fact) for fact in facts])

    def easier(self, rng: random.Random) -> Self:
        return type(self)(rng.randint(2, self.pairs))
