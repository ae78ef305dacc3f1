"""Residue sweep: needles in documents of every length modulo the compression ratios.

A compressed layer treats the tokens that fill no block yet apart from the others, so each remainder is a case of its
own.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from evals.documents.base import Plan, Question, RetrievalTask
from evals.documents.facts import KEYS, MARKER, VALUES
from model.config import ModelConfig
from model.errors import ConfigError


@dataclass(frozen=True)
class Residue(RetrievalTask):
    """``keys`` facts such as ``@K7`` at random positions, one of which is asked by ``@K``, in documents of ``span``
    consecutive lengths up to the given one. By default that is the model's largest compression ratio, which has every
    remainder of all ratios."""

    name = "residue"
    span: int = 32
    keys: int = 2

    def check(self) -> None:
        self.require("span", 2, 1 << 16, "a single length has a single remainder")
        self.require("keys", 2, len(KEYS), "a single key has no distractor, and keys are letters")

    def check_model(self, config: ModelConfig) -> None:
        if self.span < largest_ratio(config):
            raise ConfigError(
                f"{self.span} is too short, because it leaves out remainders of the compression ratio "
                f"{largest_ratio(config)}",
                f"{self.name}.span",
            )

    @classmethod
    def defaults(cls, config: ModelConfig) -> dict[str, int]:
        return {"span": largest_ratio(config)}

    @property
    def fewest_samples(self) -> int:
        return self.span

    def plan(self, rng: random.Random, length: int) -> Plan:
        facts = [(MARKER + key, rng.choice(VALUES)) for key in rng.sample(KEYS, self.keys)]
        return Plan(facts, [Question(*rng.choice(facts))])

    def lengths(self, length: int) -> list[int]:
        return list(range(length, length - self.span, -1))


def largest_ratio(config: ModelConfig) -> int:
    """Return the larger compression ratio, which counts for networks without such layers, too: they are compared on
    equal documents."""
    return max(config.csa_ratio, config.hca_ratio)
