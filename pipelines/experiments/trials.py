"""One trial of an experiment: the training of an arm with a seed and a learning rate, and its scores.

A trial has a folder of its own under ``experiments/trials``, named by everything that determines its result.
Experiments with equal trials share them.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from model.atomic_files import write_text
from pipelines.experiments.arms import Arm, with_rate
from pipelines.recipe.loading import recipe_from_dict, with_overrides
from pipelines.recipe.schema import Recipe
from pipelines.tracking.run_folder import training_identity

RESULT, TRIAL, LAST, FINAL = "result.json", "trial.json", "last", "final"
"""Names in a trial's folder: its result, its description, the checkpoint to resume from, and the trained network."""
QUANTIZATION = "quantization.json"
"""Name of the scores of the trained network in other formats, in a trial's folder."""


@dataclass(frozen=True)
class Trial:
    """A training to run, or to reuse."""

    arm: str
    seed: int
    rate: float
    """Multiple of the recipe's learning rates."""
    recipe: Recipe
    scored: Mapping[str, Any] = field(default_factory=dict)
    evaluated: bool = False
    """True to score the network on the tasks of the evaluate section."""

    @property
    def label(self) -> str:
        return f"{self.arm}, rate {self.rate:g}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        identity = {"training": training_identity(self.recipe), "scored": dict(self.scored)}
        digest = sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return self.recipe.experiments_folder / "trials" / digest[:20]

    @property
    def evaluation_file(self) -> Path:
        section = self.recipe.evaluate.model_dump(mode="json", exclude={"checkpoint"})
        digest = sha256(json.dumps(section, sort_keys=True).encode()).hexdigest()
        return self.folder / f"evaluation-{digest[:12]}.json"

    @property
    def is_finished(self) -> bool:
        return (self.folder / RESULT).exists() and (not self.evaluated or self.evaluation_file.exists())

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "recipe": self.recipe.to_dict(), "scored": dict(self.scored)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Trial:
        """Build from plain values."""
        return cls(**{**values, "recipe": recipe_from_dict(values["recipe"])})

    def write(self) -> None:
        """Write the trial's description to its folder, without the tracking store, whose URI may hold a password."""
        values = self.to_dict()
        values["recipe"]["tracking"]["uri"] = None
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / TRIAL, json.dumps(values, indent=2) + "\n")

    def result(self) -> Result:
        """Return the result of a finished trial."""
        values = json.loads((self.folder / RESULT).read_text())
        result = Result(values["run_id"], values["metrics"], values["curve"])
        if self.evaluated:
            evaluation = json.loads(self.evaluation_file.read_text())
            result = dataclasses.replace(result, metrics=result.metrics | evaluation)
        return result


@dataclass(frozen=True)
class Result:
    """Result of a trial."""

    run_id: str
    metrics: dict[str, float]
    """Scores of the trained network: those of validation, and of tasks as ``eval/...``."""
    curve: list[tuple[int, dict[str, float]]]
    """Tokens seen and validation metrics, in order."""

    def line(self, metric: str) -> list[tuple[int, float]]:
        return [(tokens, metrics[metric]) for tokens, metrics in self.curve if metric in metrics]


def plan(arm: Arm, seed: int, rate: float, evaluated: bool = False) -> Trial:
    """Return the trial of an arm. The seed determines the weights and the order of the data."""
    recipe = with_overrides(with_rate(arm.recipe, rate), {"run.seed": seed, "train.workers": 1})
    return Trial(arm.name, seed, rate, recipe, arm.scored, evaluated)


@contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Hold a trial's folder. Waits for another experiment that trains the same trial, whose result is then reused."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
