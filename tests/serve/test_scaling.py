"""Autoscaling, and deployment by Ray's own command line. These wait for Ray Serve's fixed periods."""

import subprocess
import sys
from pathlib import Path

import pytest
import ray
from chaos import REPLICA, answers, busy, processes, wait_for
from deployments import recipe_for
from ray import serve as ray_serve

from model import checkpoint
from pipelines.steps import deploy
from serve.app import application_name


@pytest.fixture(scope="module")
def saved(tmp_path_factory, endless_model, letters) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "letters" / "final"
    checkpoint.save(endless_model, folder, letters)
    return folder


@pytest.mark.long
def test_replicas_follow_the_queue_within_bounds(ray_cluster, saved) -> None:
    recipe = recipe_for(saved.parents[1], saved, max_replicas=2, target_requests_per_replica=1, cpus_per_replica=0.1,
                        upscale_delay_seconds=0, downscale_delay_seconds=1)  # fmt: skip
    title = f"ray::ServeReplica:{application_name('letters/final')}{REPLICA}"
    with deploy.start(recipe) as deployment:
        assert len(processes(title)) == 1
        with busy(deployment.url, clients=6) as outcomes:
            wait_for(lambda: len(processes(title)) == 2)
        wait_for(lambda: len(processes(title)) == 1)
        assert answers(deployment.url)
    assert outcomes.errors == outcomes.stream_errors == []


@pytest.mark.long
def test_the_written_config_is_deployed_by_rays_command_line(ray_cluster, saved, tmp_path) -> None:
    recipe = recipe_for(saved.parents[1], saved, models={"other": str(saved)}, cpus_per_replica=0.1)
    path = deploy.write_serve_config(recipe, tmp_path / "serve.yaml")
    dashboard = f"http://{ray._private.worker._global_node.webui_url}"
    command = [str(Path(sys.executable).with_name("serve")), "deploy", str(path), "--address", dashboard]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
        url = f"http://127.0.0.1:{recipe.serve.port}"
        wait_for(lambda: answers(url, model="letters/final") and answers(url, model="other"))
        assert not answers(url, model="none")
    finally:
        ray_serve.shutdown()
