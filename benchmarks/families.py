"""The hybrid beside published families, trained with the demo's recipe.

    python -m benchmarks.families [--families v4 v32 mamba2 kimi gqa] [--seeds 0 1 2] [--rates 0.5 1 2]
        [--set run.folder=FOLDER ...] [--quick] [--write docs/families.md]

Every network has the width, depth, experts and vocabulary of `tiny`, and within 3% its parameters (presets `tiny-*`).
All train on the same rows, in the same order, for the same number of steps, with the same optimizer. The first seed
selects each network's learning rates, by final validation loss, among multiples of the recipe's (`--rates`).

The plain trainer runs in this process, without Ray. Every run is logged to MLflow (in `run.folder`, by default `runs`),
and finished runs are reused. `--quick` trains a few steps on little data, to see that everything works.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.lib.harness import Result, make_parser, run_benchmark, run_main
from benchmarks.lib.report import table
from benchmarks.lib.trained_runs import LOSS, STEP_SECONDS, Curve, prepared, spread, trained
from model.costs import cache_bytes, count_parameters
from model.errors import ConfigError
from model.transformer import Transformer
from pipelines.recipe.loading import load_recipe
from pipelines.recipe.schema import Recipe
from pipelines.reports.cache_measurement import BYTES_PER_TOKEN, MEASURED_TOKENS, measured_cache
from pipelines.training.curriculum import total_steps

CONFIGS = Path(__file__).parents[1] / "configs"
FAMILIES = {"v4": [], **{name: [CONFIGS / f"{name}.yaml"] for name in ("v32", "mamba2", "kimi", "gqa")}}
"""Recipe files over configs/tiny.yaml by family."""
METRICS = {
    "validation loss": LOSS,
    "loss on text": "validation/text_loss",
    "recall": "validation/recall",
    "needle recall": "validation/needle_recall",
}
_QUICK = (
    "data.name=families-quick",
    "data.max_text_bytes=60000",
    "data.retrieval_validation_documents=24",
    "train.batch_rows=4",
    "train.validation_rows=8",
    "train.warmup_steps=1",
    "train.log_every=1",
)


def load(family: str, options: argparse.Namespace) -> Recipe:
    """Return the recipe of a family, for one process. Raises ConfigError."""
    overrides = ["train.workers=1", *options.set]
    if options.quick:
        overrides += _QUICK
    recipe = load_recipe([CONFIGS / "tiny.yaml", *FAMILIES[family]], overrides)
    if options.quick:
        stages = tuple(stage.model_copy(update={"steps": 1}) for stage in recipe.train.stages)
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"stages": stages})})
    return recipe


def best_rate(recipe: Recipe, name: str, options: argparse.Namespace) -> float:
    """Return the multiple of the learning rates with the lowest final validation loss for the first seed."""
    if len(options.rates) == 1:
        return options.rates[0]
    losses = {rate: train(recipe, name, options.seeds[0], rate).last(LOSS) for rate in options.rates}
    return min(losses, key=lambda rate: losses[rate])


def train(recipe: Recipe, name: str, seed: int, rate: float) -> Curve:
    """Return the curve of a run at a multiple of the recipe's learning rates."""
    optimizer = recipe.train.optimizer
    changes: dict[str, Any] = {
        f"train.optimizer.{key}": getattr(optimizer, key) * rate for key in ("learning_rate", "adamw_learning_rate")
    }
    return trained(recipe, f"families-{name}-{rate:g}", seed, changes)[0]


def sizes(recipe: Recipe) -> list[str]:
    """Return parameters, active parameters and cache bytes per token: measured, and in closed form."""
    with torch.device("meta"):
        count = count_parameters(Transformer(recipe.model))
    tokens = min(MEASURED_TOKENS, recipe.model.max_positions)
    closed = cache_bytes(recipe.model, tokens) / tokens
    measured = measured_cache(recipe.model)[BYTES_PER_TOKEN]
    return [f"{count.total:,}", f"{count.active:,}", f"{measured:,.1f}", f"{closed:,.1f}"]


def measure(options: argparse.Namespace) -> Result:
    if options.write and (options.quick or set(options.families) != set(FAMILIES)):
        raise ConfigError("--write: a page contains all families, trained in full; omit --families and --quick")
    torch.set_num_threads(options.threads)
    recipes = {name: load(name, options) for name in options.families}
    rows, curves = [], {}
    for name in options.families:
        recipe = prepared(recipes[name])
        rate = best_rate(recipe, name, options)
        runs = curves[name] = [train(recipe, name, seed, rate) for seed in options.seeds]
        seconds = statistics.median(value for run in runs for _, value in run.line(STEP_SECONDS))
        scores = [spread([run.last(metric) for run in runs]) for metric in METRICS.values()]
        rows.append([name, *sizes(recipe), f"{rate:g}", *scores, f"{1e3 * seconds:.0f}"])
    steps = " or ".join(map(str, sorted({total_steps(recipe) for recipe in recipes.values()})))
    header = ["network", "parameters", "active", "bytes per token", "closed form", "rate", *METRICS, "ms per step"]
    text = (
        f"{steps} steps, seeds {', '.join(map(str, options.seeds))}; mean and range over them. Bytes per token: of "
        f"a cache of {MEASURED_TOKENS:,} tokens, fixed state included, measured and in closed form. Rate: multiple of "
        "the recipe's learning rates.\n\n"
    )
    return Result(text + table(header, rows), draw(curves), "Validation loss and recall over the tokens seen")


def draw(curves: dict[str, list[Curve]]) -> Figure:
    """Return a figure of loss and recall, with a line per network: the mean over its runs."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, metric, label in zip(
        figure.subplots(1, 2), (LOSS, METRICS["recall"]), ("validation loss, nats per token", "recall")
    ):
        for name, runs in curves.items():
            lines = [run.line(metric) for run in runs]
            tokens = [each[0] for each in lines[0]]
            axes.plot(tokens, [statistics.fmean(value for _, value in column) for column in zip(*lines)], label=name)
        axes.set(xlabel="tokens seen", ylabel=label)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    return figure


def main(arguments: list[str] | None = None) -> str:
    parser = make_parser(__doc__, threads=2)
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 1.0, 2.0])
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="overrides of all recipes")
    parser.add_argument("--quick", action="store_true", help="train one step per stage")
    return run_benchmark(parser, measure, arguments)


if __name__ == "__main__":
    run_main(main)
