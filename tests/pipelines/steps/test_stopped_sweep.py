"""A killed or interrupted sweep resumes where it stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pipelines.__main__ import INTERRUPTED
from pipelines.recipe.loading import with_overrides
from pipelines.steps import sweep
from pipelines.tracking.mlflow_store import open_tracking


@pytest.mark.long
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.timeout(600)
def test_a_stopped_sweep_resumes(prepared, tmp_path, sent):
    recipe = with_overrides(
        prepared,
        {
            "sweep": {
                "name": f"stopped-{sent.name}",
                "space": {"model.index_topk": [2, 3, 4]},
                "max_concurrent": 1,
                "overrides": {"train.stages": [{"attention": "sparse", "steps": 6}], "train.validate_every": 3},
            }
        },
    )
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.to_dict()))
    command = [sys.executable, "-m", "pipelines", "sweep", "--config", str(file)]
    process = subprocess.Popen(
        command, cwd=Path(__file__).parents[3], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert any("trial 1/" in line for line in process.stdout)  # reads no further
    states = recipe.sweep_folder / "tune"
    while not any("TERMINATED" in state.read_text() for state in states.glob("experiment_state-*.json")):
        time.sleep(0.1)  # Tune saves finished trials with a delay
    if sent == signal.SIGINT:  # as a shell's Ctrl-C, but to the driver alone
        process.send_signal(sent)
        assert process.wait() == INTERRUPTED
    else:
        os.killpg(process.pid, sent)
        process.wait()

    result = sweep.run(recipe)
    points = json.loads((recipe.sweep_folder / "sweep.json").read_text())["result"]["points"]
    assert len(points) == 3 and {point["steps"] for point in points} <= {3, 6}
    client = open_tracking(recipe).client
    experiment = client.get_run(result.run_id).info.experiment_id
    nested = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{result.run_id}'")
    assert len(nested) == 3 and {run.info.status for run in nested} == {"FINISHED"}
    (done,) = (run for run in nested if run.data.params["model.index_topk"] == "2")
    steps = [point.step for point in client.get_metric_history(done.info.run_id, "train/loss")]
    assert len(steps) == len(set(steps))  # not trained again
