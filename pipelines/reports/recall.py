"""Recall scores of an evaluation, and their figure."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.figure import Figure

from evals.scores import Point


@dataclass(frozen=True)
class Score:
    """Recall of one task at one length and depth."""

    task: str
    length: int
    depth: float | None
    """None for tasks without depths."""
    recall: float
    stderr: float | None
    questions: int


def scores_from_metrics(metrics: dict[str, float]) -> list[Score]:
    """Return the recalls among the metrics of :func:`evals.run.evaluate`, in the order of evaluation."""
    scores = []
    for name, value in metrics.items():
        match Point.parse(name):
            case point, "recall":
                stderr = metrics.get(point.metric("recall_stderr"))
                scores.append(Score(*point, value, stderr, int(metrics[point.metric("questions")])))
    return scores


def recall_figure(scores: list[Score]) -> Figure:
    """Draw recall by length for every task, and a heat map by length and depth if there are needle scores."""
    needles = [score for score in scores if score.depth is not None]
    figure = Figure(figsize=(10 if needles else 5, 4), layout="constrained")
    axes = figure.subplots(1, 2 if needles else 1, squeeze=False)[0]

    lengths = sorted({score.length for score in scores})
    for task in dict.fromkeys(score.task for score in scores):
        of_task = [[score for score in scores if score.task == task and score.length == length] for length in lengths]
        means = [sum(score.recall for score in group) / len(group) for group in of_task]
        errors = [sum((score.stderr or 0.0) ** 2 for score in group) ** 0.5 / len(group) for group in of_task]
        label = f"{task} (mean over depths)" if of_task[0][0].depth is not None else task
        axes[0].errorbar(lengths, means, yerr=errors, marker="o", capsize=3, label=label)
    axes[0].set_xscale("log", base=2)
    axes[0].set_xticks(lengths, [str(length) for length in lengths])
    axes[0].minorticks_off()
    axes[0].set(xlabel="document length (tokens)", ylabel="recall", ylim=(-0.03, 1.03), title="Recall by length")
    axes[0].grid(alpha=0.3)
    if scores:
        axes[0].legend()

    if needles:
        depths = sorted({score.depth for score in needles if score.depth is not None})
        recalls = {(score.depth, score.length): score.recall for score in needles}
        grid = [[recalls[depth, length] for length in lengths] for depth in depths]
        image = axes[1].imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for row, values in enumerate(grid):
            for column, value in enumerate(values):
                color = "black" if value > 0.5 else "white"
                axes[1].text(column, row, f"{value:.2f}", ha="center", va="center", color=color)
        axes[1].set_xticks(range(len(lengths)), [str(length) for length in lengths])
        axes[1].set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
        axes[1].set(xlabel="document length (tokens)", ylabel="needle depth (0 = start)", title="Needle in real text")
        figure.colorbar(image, ax=axes[1], label="recall")
    return figure
