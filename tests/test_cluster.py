"""The manifests use existing entry points and settings."""

import shlex
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from pipelines.__main__ import parse
from pipelines.recipe.loading import load_recipe
from serve.app import GATEWAY, GatewayArgs, ModelArgs, application_name

CLUSTER = Path(__file__).parents[1] / "cluster"


def manifest(name, kind):
    return next(d for d in yaml.safe_load_all((CLUSTER / name).read_text()) if d["kind"] == kind)


def test_the_job_is_a_pipeline_step():
    command = shlex.split(manifest("rayjob.yaml", "RayJob")["spec"]["entrypoint"])
    assert command[:3] == ["python", "-m", "pipelines"]
    step, files, overrides, *_ = parse(command[3:])
    recipe = load_recipe([CLUSTER.parent / file for file in files], overrides)
    assert step == "train" and recipe.run.folder.is_absolute()


def test_the_service_runs_the_deploy_applications():
    serve = yaml.safe_load(manifest("rayservice.yaml", "RayService")["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(serve)
    gateway, model = serve["applications"]
    assert (gateway["import_path"], model["import_path"]) == ("serve.app:build_gateway", "serve.app:build_model")
    args = ModelArgs.model_validate(model["args"])
    assert (args.replicas, args.most_replicas) == (2, 4)
    assert GatewayArgs.model_validate(gateway["args"]).models == [args.model_name]
    assert (gateway["name"], model["name"]) == (GATEWAY, application_name(args.model_name))


@pytest.mark.parametrize("name", ["rayjob.yaml", "rayservice.yaml"])
def test_the_ray_version_is_the_pinned_one(name):
    pinned = next(line for line in (CLUSTER.parent / "pyproject.toml").read_text().splitlines() if '"ray[' in line)
    documents = list(yaml.safe_load_all((CLUSTER / name).read_text()))
    spec = documents[0]["spec"]
    version = (spec.get("rayClusterSpec") or spec["rayClusterConfig"])["rayVersion"]
    assert f"=={version}" in pinned
