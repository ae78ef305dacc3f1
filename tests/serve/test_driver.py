"""SIGKILL of the process that deploys, and a restart of everything."""

import signal
import socket
import subprocess

import httpx
import psutil
import pytest
import ray
from chaos import answers, busy, wait_for
from deployments import deploy, recipe_for, url_of
from ray import serve as ray_serve

from model import checkpoint
from pipelines.recipe.schema import Recipe
from pipelines.tracking.mlflow_store import open_tracking


@pytest.fixture
def recipe(tmp_path, endless_model, letters) -> Recipe:
    """A recipe with a champion in its registry."""
    checkpoint.save(endless_model, tmp_path / "one", letters)
    recipe = recipe_for(tmp_path / "runs", "models:/letters@champion", cpus_per_replica=0.1)
    client = open_tracking(recipe).client
    client.create_registered_model("letters")
    client.create_model_version("letters", (tmp_path / "one").as_uri())
    client.set_registered_model_alias("letters", "champion", "1")
    return recipe


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_a_joined_cluster_serves_on_without_the_driver(ray_cluster, recipe) -> None:
    process = deploy(recipe, ray.get_runtime_context().gcs_address)
    try:
        with busy(url_of(recipe), clients=2) as outcomes:
            kill(process)
            done = len(outcomes.complete)
            wait_for(lambda: len(outcomes.complete) >= done + 4)
        assert outcomes.errors == outcomes.stream_errors == []
        assert httpx.get(f"{url_of(recipe)}/v1/models").json()["data"][0]["version"] == "1"
    finally:
        ray_serve.shutdown()


@pytest.mark.long
def test_the_champion_survives_a_restart_of_everything(recipe) -> None:
    process = deploy(recipe, None)
    children = psutil.Process(process.pid).children(recursive=True)
    with busy(url_of(recipe), clients=2) as outcomes:
        kill(process)
        wait_for(lambda: len(outcomes.errors) >= 2)
    assert all(error.startswith(("Connect", "Remote", "Read", "Write", "a stream", "5")) for error in outcomes.errors)
    wait_for(lambda: not any(child.is_running() and child.status() != "zombie" for child in children))
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", recipe.serve.port)) != 0
    again = deploy(recipe, None)
    try:
        assert answers(url_of(recipe), model="letters")
        assert httpx.get(f"{url_of(recipe)}/v1/models").json()["data"][0]["version"] == "1"
    finally:
        again.send_signal(signal.SIGINT)
        again.communicate()
    assert again.returncode == 0
