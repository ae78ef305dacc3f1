"""A local Ray cluster that does not start is tried once more, and then named."""

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
    """Stand-ins for Ray's processes, one for every attempt to start it, of which those before the ``n``-th fail."""
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


def test_a_second_attempt_follows_a_failed_one_and_what_that_left(started, capsys):
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
