"""Results of a step in MLflow and in a folder, and the quick form of a recipe."""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from model.atomic_files import write_text
from pipelines.experiments.scoring import fewest_samples
from pipelines.recipe.loading import load_recipe, with_overrides
from pipelines.recipe.paths import check_creatable, path_option, without_password
from pipelines.recipe.schema import Recipe
from pipelines.reports.figures import save_figure
from pipelines.reports.tables import Table
from pipelines.tracking.mlflow_store import TrackedRun
from pipelines.training.curriculum import curriculum

RESULTS = "results.json"
"""Artifact with the results of a step, from which its figures are drawn."""
_QUICK_STEPS, _QUICK_ROWS = 16, 4
_SECTIONS = ("ablate", "compare")
_URI_OPTION = "--tracking.uri"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of a step with results."""
    parser.add_argument("--quick", action="store_true", help="the same shape with a few short trainings")
    parser.add_argument(
        "--write", metavar="FOLDER", type=path_option("--write"), help="also write results and figures to FOLDER"
    )


def loader(step: str) -> Callable[[argparse.Namespace, Sequence[Path], Sequence[str]], Recipe]:
    """Return the function that loads the recipe of a step with results, in its quick form if asked for. It takes
    ``quick`` out of the options, and raises ConfigError."""

    def load(options: argparse.Namespace, files: Sequence[Path], overrides: Sequence[str]) -> Recipe:
        if options.write is not None:
            check_creatable(options.write / f"{step}.json", "--write")
        recipe = load_recipe(files, overrides)
        return quick(recipe) if vars(options).pop("quick") else recipe

    return load


def quick(recipe: Recipe) -> Recipe:
    """Return the recipe with short trainings and few samples. Stages, arms, seeds and tasks stay."""
    stages = recipe.to_dict()["train"]["stages"]
    planned = curriculum(recipe)
    for stage, full in zip(stages, planned):
        steps = max(2, round(full.steps * _QUICK_STEPS / planned[-1].end))
        stage |= {"steps": steps, "tokens": None, "batch_rows": None}
    changes: dict[str, Any] = {
        "train.stages": stages,
        "train.workers": 1,
        "train.batch_rows": _QUICK_ROWS,
        "train.accumulation_steps": 1,
        "train.warmup_steps": 2,
        "train.validation_rows": 16,
        "train.validate_every": 4,
        "train.checkpoint_every": 4,
        "train.log_every": 4,
        "tracking.system_metrics_interval": None,
        "evaluate.samples": max(2, fewest_samples(recipe)),
        "evaluate.lengths": recipe.evaluate.lengths[:2],
        "evaluate.depths": recipe.evaluate.depths[:1],
        "ablate.context": 4096,
        "compare.timed_lengths": [256, 1024],
        "compare.timed_prefill": 256,
        "compare.max_measured_bytes": 1 << 24,
    }
    for name in _SECTIONS:
        section = getattr(recipe, name)
        rates = list(section.rates)
        changes[f"{name}.rates"] = rates if len(rates) < 3 else [rates[len(rates) // 2], rates[-1]]
        changes[f"{name}.further_rates"] = 0
        changes[f"{name}.name"] = f"{section.name}-quick"
    return with_overrides(recipe, changes)


def command_line(step: str) -> str:
    """Return the command of this process, or the step's name where another program runs the step."""
    return _to_command(_arguments() or [step])


def command_of(step: str) -> str:
    """Return the command of another ``step`` with the recipe files and settings of this process."""
    arguments = _arguments() or [step]
    index = 0  # index of the step; options and their values may precede it
    while arguments[index].startswith("-"):
        index += 1 if "=" in arguments[index] else 2
    return _to_command([*arguments[:index], step, *arguments[index + 1 :]])


def _arguments() -> list[str]:
    """Return the arguments of this process with passwords removed. Empty if another program runs the step."""
    if Path(sys.argv[0]).parts[-2:] != ("pipelines", "__main__.py"):
        return []
    return [_without_password(argument, before) for before, argument in itertools.pairwise(["", *sys.argv[1:]])]


def _without_password(argument: str, before: str) -> str:
    """Return an argument without the password of the tracking store's URI. ``before`` is the argument before it."""
    if before == _URI_OPTION:
        return without_password(argument)
    option, _, uri = argument.partition("=")
    return f"{option}={without_password(uri)}" if option == _URI_OPTION and uri else argument


def _to_command(arguments: Sequence[str]) -> str:
    return shlex.join(["python", "-m", "pipelines", *arguments])


def publish(
    tracked: TrackedRun,
    step: str,
    result: Mapping[str, Any],
    tables: Sequence[Table],
    figures: Mapping[str, Figure],
    folder: Path | None,
) -> None:
    """Print the tables, and log results, tables and figures; also write them to ``folder`` if it is given."""
    for table in tables:
        table.show()
    text = json.dumps({"step": step, "run_id": tracked.run_id, "result": result}, indent=1) + "\n"
    tracked.log_dict(json.loads(text), RESULTS)
    tracked.log_dict({"tables": [vars(table) for table in tables]}, "tables.json")
    for name, figure in figures.items():
        tracked.log_figure(figure, f"{name}.png")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / f"{step}.json", text)
        for name, figure in figures.items():
            save_figure(figure, folder / f"{name}.png")
        print(f"results: {folder}", flush=True)
    print(f"run: {tracked.run_id} ({tracked.url_hint()})", flush=True)
