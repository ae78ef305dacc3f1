"""The advice on a damaged checkpoint."""

from pipelines.ray_runtime.worker import _outcome_of_deletion


def test_an_earlier_checkpoint_is_promised_only_if_there_is_one(tmp_path):
    last = tmp_path / "step_000008"
    last.mkdir()
    (tmp_path / "checkpoint_manager_snapshot.json").write_text("{}")
    assert _outcome_of_deletion(last).startswith("start over")
    (tmp_path / "step_000004").mkdir()
    assert _outcome_of_deletion(last) == "resume from an earlier checkpoint"
