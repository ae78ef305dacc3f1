"""Variable tracking (Hsieh et al. 2024, "RULER"): chains of assignments to be followed.

RULER asks for all variables of a chain; these documents ask for the value of its last one.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Self

from evals.documents.base import Plan, Question, RetrievalTask
from evals.documents.facts import KEYS, MARKER, VALUES


@dataclass(frozen=True)
class VariableTracking(RetrievalTask):
    """``chains`` chains of ``hops`` assignments: ``@K7`` sets K to 7, and ``@MK`` sets M to K. ``@@M`` asks for the
    value of the last variable of each chain. The assignments of a chain are in order, among those of the others. Chains
    have different values."""

    name = "variable_tracking"
    asks_all = True
    chains: int = 3
    hops: int = 2

    def check(self) -> None:
        self.require("hops", 1, len(KEYS) - 1, "without a hop there is nothing to follow, and variables are letters")
        most = min(len(KEYS) // (self.hops + 1), len(VALUES))
        self.require("chains", 2, most, f"one chain has no distractor, and chains of {self.hops} hops use all letters")

    def plan(self, rng: random.Random, length: int) -> Plan:
        size = self.hops + 1
        variables = rng.sample(KEYS, self.chains * size)
        chains = [variables[start : start + size] for start in range(0, len(variables), size)]
        values = rng.sample(VALUES, self.chains)
        order = [chain for chain in range(self.chains) for _ in range(size)]
        rng.shuffle(order)
        steps = [
            iter([(MARKER + chain[0], value), *((MARKER + to, of) for of, to in itertools.pairwise(chain))])
            for chain, value in zip(chains, values)
        ]
        facts = [next(steps[chain]) for chain in order]
        return Plan(facts, [Question(2 * MARKER + chain[-1], value) for chain, value in zip(chains, values)])

    def easier(self, rng: random.Random) -> Self:
        return type(self)(rng.randint(2, self.chains), rng.randint(1, self.hops))
