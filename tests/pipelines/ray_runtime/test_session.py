"""Starting a local Ray cluster: a second attempt, then an error."""

import subprocess
import sys

import psutil
import pytest
import ray
import yaml

from pipelines import __main__ as cli
from pipelines.ray_runtime.session import ray_session
from pipelines.recipe.loading import with_overrides
from pipelines.tracking.mlflow_store import open_tracking
from pipelines.tracking.run_folder import RUN_FILE

TIMED_OUT = "The current node timed out during startup."


@pytest.fixture
def started(monkeypatch):
    """Replace ``ray.init`` with a stand-in that starts a process and fails before the ``n``-th attempt."""
    processes = []

    def fail_until(n):
        def init(**options):
            assert options["address"] == "local"
            child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
            processes.append(psutil.Process(child.pid))
            if len(processes) < n:
                raise Exception(f"{TIMED_OUT}\nSee the logs.")  # Ray raises no narrower type

        monkeypatch.setattr(ray, "init", init)
        return processes

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # other tests of this process may have a cluster
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    yield fail_until
    for process in processes:
        if process.is_running():
            process.kill()
            process.wait()


def test_a_second_attempt_kills_the_processes_of_the_first(started, capsys):
    processes = started(2)
    with ray_session():
        assert [p.is_running() for p in processes] == [False, True]
    assert capsys.readouterr().out == f"Ray did not start ({TIMED_OUT}); trying once more\n"


def test_a_step_whose_cluster_does_not_start_ends_with_one_sentence(prepared, started, tmp_path, capsys):
    recipe = with_overrides(prepared, {"run.name": "no-cluster"})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    processes = started(3)
    assert cli.main(["train", "--config", str(tmp_path / "recipe.yaml")]) == cli.USER_ERROR
    assert capsys.readouterr().err == f"error: Ray: no local cluster started in two attempts ({TIMED_OUT})\n"
    assert [p.is_running() for p in processes] == [False, False]
    run_id = yaml.safe_load((recipe.run_folder / RUN_FILE).read_text())["run_id"]
    assert open_tracking(recipe).client.get_run(run_id).info.status == "FAILED"
