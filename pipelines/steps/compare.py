"""Compare the hybrid with other families: ``python -m pipelines compare --config configs/evidence.yaml``.

Every network has as many parameters, sees the same rows, and gets the best of the same few learning rates. Caches,
FLOPs and times are measured beside the scores. Trials run under Ray Tune, and finished ones are reused.
"""

from __future__ import annotations

from pathlib import Path

from pipelines.experiments.comparison import run_comparison
from pipelines.experiments.outputs import add_options, loader
from pipelines.recipe.schema import Recipe
from pipelines.reports.comparison import ComparisonResult
from pipelines.steps import Step


def run(recipe: Recipe, write: Path | None = None) -> ComparisonResult:
    """Run the comparison; see :func:`pipelines.experiments.comparison.run_comparison`."""
    return run_comparison(recipe, write)


STEP = Step(run, add_options, loader("compare"), resumes=True)
