"""Needle in a haystack (Kamradt 2023): one fact at a given depth of a real text."""

from __future__ import annotations

import random
from dataclasses import dataclass

from evals.documents.base import Plan, Question, RetrievalTask
from evals.documents.facts import KEYS, MARKER, VALUES
from model.errors import ConfigError


@dataclass(frozen=True)
class Needle(RetrievalTask):
    """A single fact such as ``@K7``, asked by ``@K``. ``depth`` is 0 at the start of the text and 1 at the last
    position allowed; None draws it."""

    name = "needle"
    per_depth = True
    depth: float | None = None

    def check(self) -> None:
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise ConfigError(f"must be from 0 to 1, found {self.depth}", f"{self.name}.depth")

    def plan(self, rng: random.Random, length: int) -> Plan:
        depth = rng.random() if self.depth is None else self.depth
        fact = (MARKER + rng.choice(KEYS), rng.choice(VALUES))
        return Plan([fact], [Question(*fact)], depth)
