"""What is left of Ray Train's list of checkpoints when its writing was cut short."""

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


def cut(folder):
    (folder / INDEX).write_text(json.dumps(listed(8, 12))[:50])


def test_a_whole_list_stays(folder):
    (folder / "step_12").mkdir()
    (folder / INDEX).write_text(json.dumps(listed(8, 12)))
    assert repair(folder) is None
    assert json.loads((folder / INDEX).read_text()) == listed(8, 12)


def test_of_half_a_list_the_one_before_is_back(folder):
    cut(folder)
    back_up(folder, None)  # which is no whole list, and so no copy
    assert repair(folder) == 2
    assert json.loads((folder / INDEX).read_text()) == listed(4, 8)


def test_a_copy_waits_for_the_checkpoint_before_it(folder):
    (folder / "step_12").mkdir()
    late = threading.Timer(0.3, lambda: (folder / INDEX).write_text(json.dumps(listed(8, 12))))
    late.start()
    back_up(folder, "step_12")
    late.join()
    (folder / INDEX).write_text("half")
    assert repair(folder) == 2
    assert json.loads((folder / INDEX).read_text()) == listed(8, 12)


def test_checkpoints_that_are_gone_are_left_out(folder):
    cut(folder)
    (folder / "step_8").rmdir()
    assert repair(folder) == 1
    assert json.loads((folder / INDEX).read_text()) == listed(4)


def test_a_damaged_checkpoint_may_be_deleted(folder):
    (folder / "step_8").rmdir()
    assert repair(folder) == 1
    assert json.loads((folder / INDEX).read_text()) == listed(4)


def test_without_any_checkpoint_the_run_begins_anew(folder):
    cut(folder)
    for step in (4, 8):
        (folder / f"step_{step}").rmdir()
    assert repair(folder) == 0 and not (folder / INDEX).exists()
    assert repair(folder) is None
