"""The manifests use existing entry points and settings."""

import shlex
from pathlib import Path

import pytest
import yaml

from pipelines.__main__ import parse
from pipelines.recipe.loading import load_recipe
from serve.app import ServeArgs

CLUSTER = Path(__file__).parents[1] / "cluster"


def manifest(name, kind):
    return next(d for d in yaml.safe_load_all((CLUSTER / name).read_text()) if d["kind"] == kind)


def test_the_job_is_a_pipeline_step():
    command = shlex.split(manifest("rayjob.yaml", "RayJob")["spec"]["entrypoint"])
    assert command[:3] == ["python", "-m", "pipelines"]
    step, files, overrides, *_ = parse(command[3:])
    recipe = load_recipe([CLUSTER.parent / file for file in files], overrides)
    assert step == "train" and recipe.run.folder.is_absolute()


def test_the_service_runs_the_deploy_application():
    serve = yaml.safe_load(manifest("rayservice.yaml", "RayService")["spec"]["serveConfigV2"])
    (application,) = serve["applications"]
    assert application["import_path"] == "serve.app:build"
    assert ServeArgs.model_validate(application["args"]).replicas == 2


@pytest.mark.parametrize("name", ["rayjob.yaml", "rayservice.yaml"])
def test_the_ray_version_is_the_pinned_one(name):
    pinned = next(line for line in (CLUSTER.parent / "pyproject.toml").read_text().splitlines() if '"ray[' in line)
    documents = list(yaml.safe_load_all((CLUSTER / name).read_text()))
    spec = documents[0]["spec"]
    version = (spec.get("rayClusterSpec") or spec["rayClusterConfig"])["rayVersion"]
    assert f"=={version}" in pinned
