"""Needle among needles of other keys (Hsieh et al. 2024, "RULER", multi-key NIAH)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Self

from evals.documents.base import Plan, Question, RetrievalTask
from evals.documents.facts import KEYS, MARKER, VALUES


@dataclass(frozen=True)
class MultiKey(RetrievalTask):
    """``keys`` facts such as ``@K7`` at random positions, one of which is asked by ``@K``."""

    name = "multi_key"
    keys: int = 8

    def check(self) -> None:
        self.require("keys", 2, len(KEYS), "a single key has no distractor, and keys are letters")

    def plan(self, rng: random.Random, length: int) -> Plan:
        facts = [(MARKER + key, rng.choice(VALUES)) for key in rng.sample(KEYS, self.keys)]
        return Plan(facts, [Question(*rng.choice(facts))])

    def easier(self, rng: random.Random) -> Self:
        return type(self)(rng.randint(2, self.keys))
