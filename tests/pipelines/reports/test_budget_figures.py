"""Figures of the budget step."""

import itertools

from model.config import ModelConfig
from pipelines.reports.budget import budget_of
from pipelines.reports.budget_figures import budget_figure


def test_labels_of_neighboring_crossovers_do_not_touch():
    config = ModelConfig.from_preset("base")
    budget = budget_of(config, config.max_positions)
    crossings = {crossover.key: crossover for crossover in budget.crossovers}
    lines = [crossings[key].tokens for key in ("index", "attention", "hca")]
    assert lines[1] < lines[2] < 1.3 * lines[1]  # 59.4K and 73K
    figure = budget_figure([1 << 10, 1 << 22], budget.own, budget.references, crossings, config)
    figure.canvas.draw()
    parts = figure.axes[2]
    boxes = [text.get_window_extent() for text in parts.texts]
    assert len(boxes) == 3
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    for tokens in lines:
        x = parts.transData.transform((tokens, 1e8))[0]
        assert not any(box.x0 + 1 < x < box.x1 - 1 for box in boxes)
