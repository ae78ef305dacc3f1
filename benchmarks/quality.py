"""Quality effects of Muon, the curriculum, and quantization-aware training, over several seeds.

    python -m benchmarks.quality [--config configs/study.yaml] [--studies muon curriculum qat] [--seeds 0 1 2]
        [--set run.folder=FOLDER ...] [--write docs/quality.md]

* muon: Muon and AdamW for equal tokens, with dense attention. The first seed selects each optimizer's learning rate, by
  final validation loss, from equally many candidates. The result is the share of tokens after which Muon's validation
  loss reaches AdamW's final loss, per seed.
* curriculum: the recipe's stages, the same number of steps without indexer warm-up, and sparse from the start. The
  results are losses, recall, and the attention mass of the selected entries.
* qat: networks trained with and without quantization, scored by `pipelines compare`; the former are from curriculum.

A seed determines the weights and the order of the data; validation rows are fixed. The plain trainer runs in this
process, without Ray. Every run is logged to MLflow (in `run.folder`, by default `runs`), and finished runs are reused.
Separate processes may run muon, and curriculum with qat, at the same time; the latter two share runs.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.lib.harness import Result, make_parser, run_benchmark, run_main
from benchmarks.lib.report import table
from benchmarks.lib.trained_runs import LOSS, Curve, prepared, spread, trained
from model.errors import ConfigError
from pipelines.recipe.loading import load_recipe, with_overrides
from pipelines.recipe.schema import Recipe
from pipelines.steps import compare
from pipelines.steps.compare import METRICS as COMPARED
from pipelines.steps.compare import VARIANTS
from pipelines.tracking.mlflow_store import open_tracking

RECIPE = Path(__file__).parents[1] / "configs/study.yaml"
STUDIES = ("muon", "curriculum", "qat")
RATES = {"muon": (3.2e-2, 6.4e-2, 0.128), "adamw": (1e-3, 3e-3, 1e-2)}


def tokens_to(line: Sequence[tuple[int, float]], loss: float) -> float:
    """Return the tokens at which a (tokens, loss) line first reaches ``loss``, interpolated, or infinity."""
    for (before, high), (after, low) in itertools.pairwise(line):
        if low <= loss:
            return before if high <= loss else before + (after - before) * (high - loss) / (high - low)
    return math.inf


# --- the studies


class Studies:
    def __init__(self, recipe: Recipe, seeds: list[int]):
        self.recipe, self.seeds = recipe, seeds
        self.figure = Figure(figsize=(11, 4.2), layout="constrained")
        self.left, self.right = self.figure.subplots(1, 2)

    def muon(self) -> str:
        steps = sum(stage.steps or 0 for stage in self.recipe.train.stages if stage.attention != "sparse")
        stages = {"train.stages": [{"attention": "dense", "steps": steps}]}
        curves: dict[str, list[Curve]] = {}
        sweep = []
        for rule, rates in RATES.items():

            def run(rate: float, seed: int, rule: str = rule) -> Curve:
                changes: dict[str, Any] = {"train.optimizer.rule": rule, "train.optimizer.learning_rate": rate}
                if rule == "adamw":
                    changes["train.optimizer.adamw_learning_rate"] = rate
                return trained(self.recipe, f"{rule}-{rate:g}", seed, {**stages, **changes})[0]

            losses = {rate: run(rate, self.seeds[0]).last(LOSS) for rate in rates}
            rate = min(losses, key=lambda rate: losses[rate])
            sweep += [[rule, f"{r:g}", f"{loss:.4f}", "best" if r == rate else ""] for r, loss in losses.items()]
            curves[f"{rule}, {rate:g}"] = [run(rate, seed) for seed in self.seeds]
        (muon_name, muons), (adamw_name, adamws) = curves.items()
        shares, rows = [], []
        for seed, muon, adamw in zip(self.seeds, muons, adamws):
            total = adamw.points[-1][0]
            shares.append(tokens_to(muon.line(LOSS), adamw.last(LOSS)) / total)
            rows.append([seed, f"{adamw.last(LOSS):.4f}", f"{muon.last(LOSS):.4f}", f"{shares[-1]:.2f}"])
        rows.append(
            ["mean and range", *(spread([c.last(LOSS) for c in each]) for each in (adamws, muons)), spread(shares, 2)]
        )
        draw(self.left, {muon_name: muons, adamw_name: adamws}, LOSS, "validation loss, nats per token")
        header = ["seed", "AdamW's final loss", "Muon's", "share of the tokens after which Muon has AdamW's final loss"]
        return (
            f"### Muon against AdamW, {steps} dense steps\n\n"
            + table(["rule", f"rate, seed {self.seeds[0]}", "final validation loss", ""], sweep)
            + "\n"
            + table(header, rows)
        )

    def curriculum(self) -> str:
        steps = sum(stage.steps or 0 for stage in self.recipe.train.stages)
        stages = self.recipe.to_dict()["train"]["stages"]
        first, last = stages[0], stages[-1]
        schedules: dict[str, dict[str, Any]] = {
            "dense, warm-up, sparse": {},
            "dense, sparse": {"train.stages": [first, {**last, "steps": steps - first["steps"]}]},
            "sparse from the start": {"train.stages": [{**last, "steps": steps}]},
        }
        metrics = {
            "loss": "validation/loss",
            "recall": "validation/recall",
            "mass held, of the teacher's": "validation/recall_at_k",
            "of its best k": "validation/recall_at_k_of_best",
            "queries that choose": "validation/choosing_share",
        }
        curves = {
            name: [trained(self.recipe, _key(name), seed, changes)[0] for seed in self.seeds]
            for name, changes in schedules.items()
        }
        rows = [[name, *(spread([c.last(m) for c in each]) for m in metrics.values())] for name, each in curves.items()]
        draw(self.right, curves, "validation/recall_at_k_of_best", "share of the best k's attention mass")
        return (
            f"### Curriculum, {steps} steps, k = {self.recipe.model.index_topk} of "
            f"{self.recipe.data.sequence_length // self.recipe.model.csa_ratio} entries\n\n"
            + table(["stages", *metrics], rows)
        )

    def qat(self) -> str:
        pairs: dict[bool, list[Path]] = {}
        for qat, name in ((True, "dense, warm-up, sparse"), (False, "without QAT")):
            changes = {} if qat else {"model.qat": False}
            pairs[qat] = [trained(self.recipe, _key(name), seed, changes)[1] for seed in self.seeds]
        recipe = with_overrides(self.recipe, {"run.name": "qat-compared"})
        section = recipe.compare.model_copy(update={"qat": tuple(pairs[True]), "plain": tuple(pairs[False])})
        scores = compare.run(recipe.model_copy(update={"compare": section}))
        rows = [[v.name, *(spread(scores[v.name][metric]) for metric in COMPARED)] for v in VARIANTS]
        names = ("with QAT, quantized", "with QAT, BF16 index keys")
        fp4, bf16 = (scores[name]["recall_at_k_of_best"] for name in names)
        kept = [a / b for a, b in zip(fp4, bf16)]
        return (
            "### Quantization in the loop against after the fact\n\n"
            + table(["checkpoints", *COMPARED], rows)
            + f"\nAfter QAT, what is selected by FP4 index keys holds {spread(kept)} of what BF16 ones hold.\n"
        )


def _key(name: str) -> str:
    return name.replace(",", "").replace(" ", "-").lower()


def draw(axes: Axes, curves: Mapping[str, Iterable[Curve]], metric: str, label: str) -> None:
    """Plot the mean over the runs of each name, with the range as a band."""
    for (name, each), color in zip(curves.items(), ("#2c5f8a", "#c0392b", "#b07d2b")):
        lines = [curve.line(metric) for curve in each]
        tokens = [point[0] for point in lines[0]]
        values = list(zip(*([value for _, value in line] for line in lines)))
        axes.plot(tokens, [statistics.fmean(v) for v in values], color=color, label=name)
        axes.fill_between(tokens, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.2, lw=0)
    axes.set(xlabel="tokens", ylabel=label)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=9)


def measure(options: argparse.Namespace) -> Result:
    if options.write and set(options.studies) != set(STUDIES):
        raise ConfigError("--write: a page contains all studies; omit --studies")
    torch.set_num_threads(options.threads)
    recipe = load_recipe([options.config], options.set)
    stages = recipe.train.stages
    if len(stages) < 2 or any(s.steps is None or s.sequence_length or s.batch_rows for s in stages):
        raise ConfigError("train.stages: expected at least two stages, given in steps, with the same batch shape")
    recipe = prepared(recipe)
    studies = Studies(recipe, options.seeds)
    text = "\n".join(getattr(studies, name)() for name in options.studies)
    text = f"Seeds {', '.join(map(str, options.seeds))}; mean and range over them.\n\n{text}"
    tracked = open_tracking(recipe).start_run("quality", kind="study", recipe=recipe)
    with tracked:
        tracked.log_figure(studies.figure, "quality.png")
        tracked.log_dict({"tables": text}, "quality.json")
    return Result(text, studies.figure, "Validation loss of Muon and AdamW, and what the selected entries hold")


def main(arguments: list[str] | None = None) -> str:
    parser = make_parser(__doc__, threads=1)
    parser.add_argument("--config", type=Path, default=RECIPE)
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=STUDIES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="overrides of the recipe")
    return run_benchmark(parser, measure, arguments)


if __name__ == "__main__":
    run_main(main)
