"""A killed or interrupted ablation resumes where it stopped."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipelines.__main__ import INTERRUPTED
from pipelines.experiments.trials import RESULT
from pipelines.recipe.loading import with_overrides
from pipelines.steps import ablate
from pipelines.tracking.mlflow_store import open_tracking


@pytest.mark.long
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.timeout(900)
def test_a_stopped_ablation_keeps_its_finished_trials(prepared, tmp_path, sent):
    recipe = with_overrides(
        prepared,
        {
            "tracking.experiment": f"stopped-{sent.name}",
            "tracking.system_metrics_interval": None,
            "model.index_topk": 2,
            "ablate": {"name": f"stopped-{sent.name}", "choices": ["qat"], "seeds": [sent, sent + 50], "rates": [1.0],
                       "context": 256, "max_concurrent": 1},
        },
    )  # fmt: skip
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.to_dict()))
    command = [sys.executable, "-m", "pipelines", "ablate", "--config", str(file)]
    process = subprocess.Popen(
        command, cwd=Path(__file__).parents[3], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    seen = 1 if sent == signal.SIGINT else 2  # Tune ignores Ctrl-C after the last of the first two trials
    assert any(f"trial {seen}/" in line for line in process.stdout)  # reads no further
    if sent == signal.SIGINT:  # as a shell's Ctrl-C, but to the driver alone
        process.send_signal(sent)
        assert process.wait() == INTERRUPTED
    else:
        os.killpg(process.pid, sent)
        process.wait()
    folder = recipe.experiments_folder / "trials"
    finished = {path: path.stat().st_mtime_ns for path in folder.glob(f"*/{RESULT}")}
    assert len(finished) >= seen

    result = ablate.run(recipe)
    assert all(path.stat().st_mtime_ns == made for path, made in finished.items())
    assert [len(arm.equal_tokens.run_ids) for arm in result.arms] == [2, 2]
    tracking = open_tracking(recipe)
    runs = tracking.client.search_runs([tracking.experiment_id])
    assert sorted(run.data.tags["kind"] for run in runs) == ["ablate", *["ablate_trial"] * 4]
    assert {run.info.status for run in runs} == {"FINISHED"}
