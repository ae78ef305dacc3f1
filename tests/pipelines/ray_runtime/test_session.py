"""Starting a local Ray cluster, and what workers of a joined one import."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import ray
import yaml
from ray.exceptions import AuthenticationError

from model.errors import ConfigError, FiftyfoldError
from pipelines import __main__ as cli
from pipelines.ray_runtime import session
from pipelines.ray_runtime.session import PACKAGES, PROJECT, ray_session
from pipelines.recipe.loading import with_overrides
from pipelines.steps import ablate, sweep, train
from pipelines.tracking.mlflow_store import open_tracking
from pipelines.tracking.run_folder import RUN_FILE, bind

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


def test_a_failed_cluster_start_ends_the_step_with_one_sentence(prepared, started, tmp_path, capsys):
    recipe = with_overrides(prepared, {"run.name": "no-cluster"})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    processes = started(3)
    assert cli.main(["train", "--config", str(tmp_path / "recipe.yaml")]) == cli.USER_ERROR
    assert capsys.readouterr().err == f"error: Ray: no local cluster started in two attempts ({TIMED_OUT})\n"
    assert [p.is_running() for p in processes] == [False, False]
    assert not (recipe.run_folder / RUN_FILE).exists()


SWEEP = {"sweep.name": "no-cluster", "sweep.space": {"model.index_topk": [2, 3]}}
ABLATION = {"ablate.name": "no-cluster", "ablate.choices": ["qat"], "ablate.context": 64}


@pytest.mark.parametrize(("step", "changes"), [(train, {"run.name": "no-cluster"}), (sweep, SWEEP), (ablate, ABLATION)])
def test_a_run_is_left_as_it_was_where_ray_does_not_start(prepared, started, step, changes):
    recipe = with_overrides(prepared, {**changes, "tracking.experiment": "no-cluster"})
    folders = {
        train: recipe.run_folder,
        sweep: recipe.sweep_folder,
        ablate: recipe.experiments_folder / recipe.ablate.name,
    }
    tracking = open_tracking(recipe)
    with tracking.start_run("earlier", kind="train", recipe=recipe) as run:
        run.log_metrics({"validation/loss": 2.0})
    folders[step].mkdir(parents=True, exist_ok=True)
    bind(folders[step], run)
    before = tracking.client.get_run(run.run_id).to_dictionary()
    started(9)
    with pytest.raises(FiftyfoldError, match="no local cluster started"):
        step.run(recipe)
    assert tracking.client.get_run(run.run_id).to_dictionary() == before
    assert [each.info.run_id for each in tracking.client.search_runs([tracking.experiment_id])] == [run.run_id]
    tracking.client.delete_run(run.run_id)
    with pytest.raises(ConfigError, match=rf"^run {run.run_id}: was deleted"):
        step.run(recipe)
    (folders[step] / RUN_FILE).unlink()


@pytest.fixture
def joined(monkeypatch):
    """Return the options of ``ray.init`` when a step joins a cluster."""
    found = {}
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "init", lambda **options: found.update(options))
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        yield found


@pytest.mark.parametrize("error", [AuthenticationError("no token"), ConnectionError("no\ncluster")])
def test_a_cluster_that_refuses_to_be_joined_ends_the_step_with_one_sentence(joined, monkeypatch, error):
    def refuse(**options):
        raise error

    monkeypatch.setattr(ray, "init", refuse)
    message = r"^RAY_ADDRESS: cannot join the Ray cluster at .* \(no (token|cluster)\b.*\)$"
    with pytest.raises(FiftyfoldError, match=message), ray_session():
        pass


def job(**environment):
    return json.dumps({"runtime_env": environment})


@pytest.mark.parametrize("environment", [None, "{}", job(), job(working_dir="gcs://other.zip")])
def test_a_joined_cluster_gets_the_five_packages_and_no_user_data(joined, monkeypatch, tmp_path, environment):
    monkeypatch.chdir(tmp_path)
    if environment is not None:
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", environment)
    with ray_session():
        pass
    sent = joined["runtime_env"]["py_modules"]
    assert {Path(path).name for path in sent} == set(PACKAGES)
    assert all((Path(path) / "__init__.py").is_file() for path in sent)
    assert not any(path.stat().st_size > 1e6 for folder in sent for path in Path(folder).rglob("*.*"))


@pytest.mark.parametrize("environment", [job(working_dir="gcs://project.zip"), job(py_modules=["gcs://x.zip"])])
def test_a_job_that_brings_the_packages_sends_nothing_else(joined, monkeypatch, environment):
    monkeypatch.chdir(PROJECT)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", environment)
    with ray_session():
        pass
    assert joined["runtime_env"] == {}


def test_workers_of_a_local_cluster_search_absolute_folders(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(("", "lib", str(PROJECT))))
    assert session._search_path().split(os.pathsep) == [str(PROJECT), str(tmp_path), str(tmp_path / "lib")]


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_temporary_folder_too_long_for_sockets_is_named(started, monkeypatch, tmp_path, name):
    processes = started(1)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(name, f"/tmp/{'x' * 60}")
    with (
        pytest.raises(ConfigError, match=rf"^{name}: /tmp/x+ is \d+ bytes too long .* set RAY_TMPDIR to"),
        ray_session(),
    ):
        pass
    assert not processes
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    with ray_session():
        assert len(processes) == 1
