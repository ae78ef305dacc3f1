"""Tables and the figure of an ablation."""

import pytest

from pipelines.reports.ablation import AblationResult, ArmResult, CostStage, figure, tables
from pipelines.reports.arms import Runs


def arm(name, losses, curves, **metrics):
    runs = Runs(4, 1e9, ["a", "b", "c"], {"validation/loss": losses, **metrics}, curves)
    return ArmResult(name, name, 1.0, {"1": losses[0]}, runs)


@pytest.fixture
def result():
    curve = [(50, 3.0), (100, 1.0)]
    # Without rounding, the other arm's loss is 1.0; quantized after training, it is 2.0.
    arms = [arm("full", [1.0] * 3, [curve] * 3), arm("qat", [2.0] * 3, [curve] * 3)]
    stages = [CostStage(name, name, 8.0, 8, 8.0, 8.0, 8.0) for name in ("none", "qat")]
    return AblationResult("study", "ablate", [0, 1, 2], 64, 100, arms, stages)


def test_tokens_to_a_loss_use_the_loss_of_the_scored_network(result):
    (table,) = (each for each in tables(result) if "share of the tokens" in each.title)
    assert table.rows == [["qat", "0.75 ± 0.00", "3 of 3"]]


def test_a_waterfall_without_recall_says_so(result):
    *_, loss, recall = figure(result).axes
    assert [text.get_text() for text in recall.texts] == ["not measured"]
    assert "not measured" not in [text.get_text() for text in loss.texts]
