"""Take each of the recipe's five choices away: ``python -m pipelines ablate --config configs/evidence.yaml``.

Every arm gets the best of the same few learning rates on the first seed, and is trained with all seeds, for equal
tokens and for equal FLOPs. Trials run under Ray Tune. An ablation that is run again reuses its finished trials.
"""

from __future__ import annotations

from pathlib import Path

from pipelines.experiments.ablation import run_ablation
from pipelines.experiments.outputs import add_options, loader
from pipelines.recipe.schema import Recipe
from pipelines.reports.ablation import AblationResult
from pipelines.steps import Step


def run(recipe: Recipe, write: Path | None = None) -> AblationResult:
    """Run the ablation; see :func:`pipelines.experiments.ablation.run_ablation`."""
    return run_ablation(recipe, write)


STEP = Step(run, add_options, loader("ablate"), resumes=True)
