"""Repair of Ray Train's checkpoint index after a torn write."""

import json
import threading

import pytest

from pipelines.ray_runtime.checkpoint_index import INDEX, back_up, repair


def listed(*steps):
    results = [{"checkpoint_dir_name": f"step_{step}", "metrics": {"step": step}} for step in steps]
    return {
        "checkpoint_results": results,
        "checkpoint_report_indices": list(range(len(steps))),
        "latest_checkpoint_result": results[-1],
    }


@pytest.fixture
def folder(tmp_path):
    (tmp_path / INDEX).write_text(json.dumps(listed(4, 8)))
    back_up(tmp_path, "step_8")
    for step in (4, 8):
        (tmp_path / f"step_{step}").mkdir()
    return tmp_path


def truncate(folder):
    (folder / INDEX).write_text(json.dumps(listed(8, 12))[:50])


def test_an_intact_index_is_kept(folder):
    (folder / "step_12").mkdir()
    (folder / INDEX).write_text(json.dumps(listed(8, 12)))
    assert repair(folder) is None
    assert json.loads((folder / INDEX).read_text()) == listed(8, 12)


def test_a_truncated_index_falls_back_to_the_backup(folder):
    truncate(folder)
    back_up(folder, None)  # truncated, so not backed up
    assert repair(folder) == 2
    assert json.loads((folder / INDEX).read_text()) == listed(4, 8)


def test_a_backup_waits_for_the_previous_checkpoint(folder):
    (folder / "step_12").mkdir()
    late = threading.Timer(0.3, lambda: (folder / INDEX).write_text(json.dumps(listed(8, 12))))
    late.start()
    back_up(folder, "step_12")
    late.join()
    (folder / INDEX).write_text("half")
    assert repair(folder) == 2
    assert json.loads((folder / INDEX).read_text()) == listed(8, 12)


def test_deleted_checkpoints_are_dropped(folder):
    truncate(folder)
    (folder / "step_8").rmdir()
    assert repair(folder) == 1
    assert json.loads((folder / INDEX).read_text()) == listed(4)


def test_a_damaged_checkpoint_may_be_deleted(folder):
    (folder / "step_8").rmdir()
    assert repair(folder) == 1
    assert json.loads((folder / INDEX).read_text()) == listed(4)


def test_without_any_checkpoint_the_run_starts_over(folder):
    truncate(folder)
    for step in (4, 8):
        (folder / f"step_{step}").rmdir()
    assert repair(folder) == 0 and not (folder / INDEX).exists()
    assert repair(folder) is None
