"""Selective copy (Gu and Dao 2023, "Mamba"): marked items among noise, to be repeated in order."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Self

from evals.documents.base import MAX_ANSWER, Plan, Question, RetrievalTask
from evals.documents.facts import MARKER, VALUES


@dataclass(frozen=True)
class SelectiveCopy(RetrievalTask):
    """``items`` items such as ``@7`` and ``@3`` at random positions; ``@@`` asks for all of them in order, ``73``. The
    noise between them is real text."""

    name = "selective_copy"
    items: int = 8

    def check(self) -> None:
        self.require("items", 2, MAX_ANSWER, "a single item has no order")

    def plan(self, rng: random.Random, length: int) -> Plan:
        items = rng.choices(VALUES, k=self.items)
        return Plan([(MARKER, item) for item in items], [Question(2 * MARKER, "".join(items))])

    def easier(self, rng: random.Random) -> Self:
        return type(self)(rng.randint(2, self.items))
