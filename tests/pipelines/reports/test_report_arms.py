"""Tables of arms."""

from pipelines.reports.arms import rates_table


def test_a_selected_rate_at_the_edge_of_the_list_is_marked():
    arms = [
        ("edge", 1.0, {"0.5": 2.0, "1": 1.5}),
        ("bounded", 1.0, {"0.5": 2.0, "1": 1.5, "2": None}),
        ("inside", 1.0, {"0.5": 2.0, "1": 1.5, "2": 1.8}),
        ("single", 1.0, {"1": 1.5}),
    ]
    table = rates_table("study", "arm", arms, 3)
    assert table.columns == ["arm", "0.5", "1", "2", ""]
    assert table.rows == [
        ["edge", "2.0000", "1.5000 *", "-", "at the edge of the list"],
        ["bounded", "2.0000", "1.5000 *", "failed", ""],
        ["inside", "2.0000", "1.5000 *", "1.8000", ""],
        ["single", "-", "1.5000 *", "-", ""],
    ]
