"""Scores of arms over seeds: their tables, with paired tests, and the table of learning rates."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipelines.recipe.metrics import LOSS, RECALL
from pipelines.reports.statistics import (
    adjusted,
    estimate,
    format_difference,
    format_estimate,
    format_p,
    paired,
    too_few,
)
from pipelines.reports.tables import Table

METRICS = {
    "validation loss": LOSS,
    "loss on text": "validation/text_loss",
    "recall": RECALL,
    "needle recall": "validation/needle_recall",
}
"""Metrics of the tables by title."""
TESTED = ("validation loss", "recall")


@dataclass(frozen=True)
class Runs:
    """Trainings of an arm, one per seed."""

    steps: int
    flops: float
    """FLOPs of one training."""
    run_ids: list[str]
    metrics: dict[str, list[float]]
    """Values by metric, in the order of the seeds."""
    curves: list[list[tuple[int, float]]] = field(default_factory=list)
    """(tokens, validation loss) of each training."""

    @property
    def means(self) -> dict[str, float]:
        """Mean over the seeds by metric."""
        return {name: sum(values) / len(values) for name, values in self.metrics.items()}


def score_cells(metrics: Mapping[str, list[float]], names: Mapping[str, str]) -> list[str]:
    """Return the estimates of the metrics ``names`` as text, "-" where one was not measured."""
    return [format_estimate(estimate(metrics[metric])) if metric in metrics else "-" for metric in names.values()]


def differences(title: str, arms: Mapping[str, Runs], seeds: Sequence[int]) -> Table:
    """Return the table of paired differences from the first arm, with tests."""
    (_, reference), *others = arms.items()
    tested = [name for name in TESTED if METRICS[name] in reference.metrics]
    found = {
        (arm, name): paired(runs.metrics[METRICS[name]], reference.metrics[METRICS[name]])
        for arm, runs in others
        for name in tested
    }
    corrected = {name: adjusted({arm: found[arm, name].p for arm, _ in others}) for name in tested}
    rows = []
    for arm, _ in others:
        cells = ((format_difference(found[arm, name]), format_p(corrected[name][arm])) for name in tested)
        rows.append([arm, *itertools.chain(*cells)])
    note = too_few(seeds) or (
        "paired by seed, ± half width of the 95% t interval; p: two-sided paired t-test, with Holm's correction over "
        "the rows"
    )
    return Table(title, ["arm", *itertools.chain(*([name, "p"] for name in tested))], rows, note)


def rates_table(
    name: str, column: str, arms: Sequence[tuple[str, float, Mapping[str, float | None]]], seed: int
) -> Table:
    """Return the table of the losses by learning rate.

    Args:
        name: Name of the experiment.
        column: Title of the first column.
        arms: Title of each arm, its selected multiple of the learning rates, and the losses by multiple: None where the
            training failed or diverged.
        seed: Seed with which the rates were tried.
    """
    rates = sorted({float(rate) for _, _, losses in arms for rate in losses})
    rows = []
    for title, selected, by_name in arms:
        losses = {float(rate): loss for rate, loss in by_name.items()}
        cells = [_loss_cell(losses[rate]) if rate in losses else "-" for rate in rates]
        cells[rates.index(selected)] += " *"
        rows.append([title, *cells, "at the edge of the list" if at_the_edge(selected, list(losses)) else ""])
    note = "*: selected. At the edge, a rate outside the list may be better"
    heading = f"{name}: validation loss by multiple of the learning rates, seed {seed}"
    return Table(heading, [column, *(f"{rate:g}" for rate in rates), ""], rows, note)


def _loss_cell(loss: float | None) -> str:
    return "failed" if loss is None else f"{loss:.4f}"


def at_the_edge(selected: float, rates: Sequence[float]) -> bool:
    """Return whether the selected rate is the lowest or the highest of several."""
    return len(rates) > 1 and selected in (min(rates), max(rates))
