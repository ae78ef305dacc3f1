"""A key with several values (Hsieh et al. 2024, "RULER", multi-value NIAH)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Self

from evals.documents.base import MAX_ANSWER, Plan, Question, RetrievalTask
from evals.documents.facts import KEYS, MARKER, VALUES


@dataclass(frozen=True)
class MultiValue(RetrievalTask):
    """``keys`` keys with ``values`` different values each, such as ``@K7`` and ``@K3``. ``@@K`` asks for all values of
    one key in the order of the text, ``73``."""

    name = "multi_value"
    keys: int = 2
    values: int = 4

    def check(self) -> None:
        self.require("keys", 2, len(KEYS), "a single key has no distractor, and keys are letters")
        self.require("values", 2, min(MAX_ANSWER, len(VALUES)), "values of a key are different digits")

    def plan(self, rng: random.Random, length: int) -> Plan:
        values = {key: rng.sample(VALUES, self.values) for key in rng.sample(KEYS, self.keys)}
        order = [key for key in values for _ in range(self.values)]
        rng.shuffle(order)
        left = {key: iter(of_key) for key, of_key in values.items()}
        facts = [(MARKER + key, next(left[key])) for key in order]
        key = rng.choice(list(values))
        return Plan(facts, [Question(2 * MARKER + key, "".join(values[key]))])

    def easier(self, rng: random.Random) -> Self:
        return type(self)(rng.randint(2, self.keys), rng.randint(2, self.values))
