"""The steps of ``python -m pipelines``, one module each.

The module of a step defines ``STEP``; ``pipelines/__main__.py`` lists its name and summary.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.recipe.loading import load_recipe
from pipelines.recipe.schema import Recipe


def _no_options(parser: argparse.ArgumentParser) -> None:
    pass


def _load_files(options: argparse.Namespace, files: Sequence[Path], overrides: Sequence[str]) -> Recipe:
    return load_recipe(files, overrides)


@dataclass(frozen=True)
class Step:
    """One step of the command line."""

    run: Callable[..., Any]
    """``run(recipe, **options)`` with the options that ``add_options`` declares."""
    add_options: Callable[[argparse.ArgumentParser], None] = _no_options
    """Declare command-line options of the step's own."""
    load: Callable[[argparse.Namespace, Sequence[Path], Sequence[str]], Recipe] = _load_files
    """``load(options, files, overrides)`` returns the recipe to run."""
    resumes: bool = False
    """Run again after an interruption, the step continues where it stopped."""
