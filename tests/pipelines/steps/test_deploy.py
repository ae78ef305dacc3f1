"""The deploy step: the key it requires, and its account of a deployment that failed."""

import importlib
import json
import logging
import os
import shutil
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch
import yaml
from ray import serve as ray_serve
from ray.serve import Application
from ray.serve.schema import ApplicationStatus, ServeDeploySchema

from model import checkpoint
from model.config import ModelConfig
from model.errors import CheckpointError, ConfigError, FiftyfoldError
from model.tokenizer import load_tokenizer
from model.transformer import Transformer
from pipelines.ray_runtime.serve_applications import failure, gateway_arguments, model_arguments, replacement_state
from pipelines.recipe.loading import recipe_from_dict
from pipelines.recipe.schema import Recipe, ServeSection
from pipelines.steps import deploy
from pipelines.tracking import registry, served_models
from pipelines.tracking.served_models import DeployedModel, ModelStore, model_sources
from serve.app import GATEWAY, application_name, build_model

TRACEBACK = """The deployment failed to start 3 times in a row. This may be due to a problem with its constructor or \
initial health check failing. See controller logs for details. Error:
ray::ServeReplica:fiftyfold:completions.initialize_and_get_metadata() (pid=1, ip=127.0.0.1)
  File "python/ray/cloudpickle/cloudpickle.py", line 717, in subimport
    __import__(name)
ModuleNotFoundError: No module named 'serve'
"""
SERVE = RuntimeError("Deploying application fiftyfold failed: Failed to update the deployments ['completions'].")


@pytest.fixture
def messages(monkeypatch):
    """Set the messages of the deployments in Serve's status."""

    def set_messages(*texts):
        deployments = {str(i): SimpleNamespace(message=text) for i, text in enumerate(texts)}
        status = SimpleNamespace(applications={GATEWAY: SimpleNamespace(deployments=deployments)})
        monkeypatch.setattr(ray, "is_initialized", lambda: True)
        monkeypatch.setattr(ray_serve, "status", lambda: status)

    return set_messages


def test_failure_is_the_error_of_a_replica(messages):
    messages("", TRACEBACK)
    assert failure(SERVE, [GATEWAY]) == "ModuleNotFoundError: No module named 'serve'"


def test_failure_is_a_replica_message_without_traceback(messages):
    messages("Deployment 'completions' has 1 replicas that have taken more than 30s to initialize.")
    assert failure(SERVE, [GATEWAY]).endswith("30s to initialize.")


@pytest.mark.parametrize("broken", ["no message", "no status"])
def test_failure_is_the_last_line_of_the_error_without_replica_messages(messages, monkeypatch, broken):
    messages("")
    if broken == "no status":

        def fail():
            raise RuntimeError("Serve is gone")

        monkeypatch.setattr(ray_serve, "status", fail)
    assert failure(RuntimeError("first\nlast"), [GATEWAY]) == "last"


def recipe_with(**serve) -> Recipe:
    return recipe_from_dict({"serve": serve})


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::"])
def test_an_address_that_others_can_reach_needs_a_key(host):
    with pytest.raises(
        ConfigError, match=rf"^serve.host: {host} is not a loopback address; set serve.api_key_file or "
    ):
        deploy.start(recipe_with(host=host, model_uri="nowhere"))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1"])
def test_loopback_addresses_need_none(host):
    deploy.check_key(recipe_with(host=host).serve)


def test_the_key_of_a_deployment(tmp_path, monkeypatch):
    file = tmp_path / "key"
    section = recipe_with(host="0.0.0.0", api_key_file=str(file)).serve
    with pytest.raises(ConfigError, match=r"^serve.api_key_file: \S+: No such file or directory$"):
        deploy.check_key(section)
    file.write_text("correct-horse")
    deploy.check_key(section)
    assert deploy.authorization_headers(section) == {"Authorization": "Bearer correct-horse"}
    deploy.check_key(recipe_with(host="0.0.0.0", api_key_variable="UNSET_KEY").serve)  # may be set on the nodes
    assert deploy.authorization_headers(ServeSection()) == {}


def test_a_missing_variable_is_named_before_a_local_cluster_starts(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(deploy.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(deploy, "ray_session", lambda **_: pytest.fail("a cluster was started"))
    recipe = recipe_with(api_key_variable="UNSET_KEY", model_uri="nowhere")
    with pytest.raises(ConfigError, match=r"^serve\.api_key_variable: UNSET_KEY: not set in the environment"):
        deploy.start(recipe)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(CheckpointError, match="nowhere: no such checkpoint folder"):  # the key may be on the nodes
        deploy.start(recipe)


def test_a_start_is_announced_once_its_models_are_found(monkeypatch, capsys, tmp_path):
    recipe = recipe_with(host="::1", port=1, model_uri="models:/a@b", models={"c": str(tmp_path)})
    monkeypatch.setattr(deploy, "check_port", lambda *_: None)
    monkeypatch.setattr(deploy, "ray_session", lambda **_: pytest.fail(capsys.readouterr().out))

    def nothing(_):
        raise ConfigError("serve.model_uri: not found")

    monkeypatch.setattr(ModelStore, "find", nothing)
    with pytest.raises(ConfigError, match="not found"):
        deploy.start(recipe)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(ModelStore, "find", lambda _: [])
    line = f"starting Ray Serve at http://[::1]:1 with 'a' from models:/a@b, 'c' from {tmp_path}\n"
    with pytest.raises(pytest.fail.Exception) as caught:
        deploy.start(recipe)
    assert str(caught.value) == line


def test_warnings_about_replicas_that_end_are_not_printed_and_errors_are(monkeypatch):
    logger, records = logging.getLogger("ray.serve"), []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "handle", records.append)
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "level", logging.WARNING)

    def log(name):
        logger.warning(f"{name}: replica is temporarily unavailable")
        logger.error(f"{name}: failed")

    monkeypatch.setattr(deploy, "drain", lambda *_: log("drain"))
    monkeypatch.setattr(deploy.Deployment, "follow_aliases", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    undo = ExitStack()
    undo.callback(log, "stop")
    section = ServeSection(alias_poll_seconds=1e-3)
    with deploy.Deployment("http://t", [], "float32", section, None, undo) as deployment:
        deployment.serve_until_signal()
        log("between")
    printed = [record.getMessage() for record in records]
    warning = "between: replica is temporarily unavailable"
    assert printed == ["drain: failed", warning, "between: failed", "stop: failed"]


def test_a_damaged_model_is_named_by_its_key(tmp_path):
    for key in ("serve.model_uri", "serve.models.a"):
        model = DeployedModel("a", str(tmp_path), key, tmp_path)
        with pytest.raises(CheckpointError, match=rf"^{key}: {tmp_path}/config\.json: No such file"):
            deploy.check_model(model, ServeSection())


def test_the_printed_command_survives_any_path_and_name(capsys):
    section = ServeSection(api_key_file="my $key's file")
    model = DeployedModel("it's", "c", "serve.model_uri", Path("c"))
    deploy._print_endpoint(
        SimpleNamespace(models=[model], model_name="it's", url="http://t", weights="float32"), section
    )
    command = capsys.readouterr().out.rpartition("  curl ")[2]
    printed = subprocess.run(
        ["sh", "-c", "cat() { echo $1; }; printf '%s\\n' " + command], capture_output=True, text=True
    )
    assert "Authorization: Bearer my $key's file" in printed.stdout.splitlines()
    assert json.loads(printed.stdout.splitlines()[-1])["model"] == "it's"


def test_replicas_get_the_path_of_the_key_and_not_the_key(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("key").write_text("correct-horse")
    section = recipe_with(api_key_file="key").serve
    model = DeployedModel("name", "c", "serve.model_uri", Path("c"))
    arguments = [gateway_arguments(section, [model]), model_arguments(section, model)]
    assert arguments[0]["api_key_file"] == str(tmp_path / "key")
    deploy._print_endpoint(
        SimpleNamespace(models=[model], model_name="name", url="http://t", weights="float32"), section
    )
    printed = capsys.readouterr().out
    assert '-H "Authorization: Bearer $(cat key)"' in printed
    assert "correct-horse" not in printed + repr(arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "small" / "final"
    torch.manual_seed(0)
    checkpoint.save(Transformer(ModelConfig.from_preset("tiny", max_positions=256)), folder, load_tokenizer("byte"))
    return folder


def test_write_config_is_a_valid_serve_config(tmp_path, folder):
    key = tmp_path / "key"
    key.write_text("correct-horse")
    recipe = recipe_with(
        model_uri=str(folder), models={"other": str(folder)}, host="0.0.0.0", port=8123, api_key_file=str(key),
        max_replicas=3, target_requests_per_replica=5, allowed_origins=["http://a"],
    )  # fmt: skip
    path = tmp_path / "serve.yaml"
    deploy.run(recipe, path)
    text = path.read_text()
    assert "correct-horse" not in text
    config = ServeDeploySchema.model_validate(yaml.safe_load(text))
    assert (config.http_options.host, config.http_options.port) == ("0.0.0.0", 8123)
    gateway, first, second = config.applications
    assert (gateway.name, gateway.route_prefix) == (GATEWAY, "/")
    assert [gateway.args["models"], first.args["model_name"], second.args["model_name"]] == [
        ["small/final", "other"], "small/final", "other",
    ]  # fmt: skip
    for application in config.applications:
        module, _, name = application.import_path.partition(":")
        assert application.route_prefix in ("/", None)
        built = getattr(importlib.import_module(module), name)(application.args)
        assert isinstance(built, Application)


def test_write_config_refuses_what_deploy_refuses(tmp_path, folder):
    with pytest.raises(ConfigError, match=r"^serve.host: 0\.0\.0\.0 is not a loopback address"):
        deploy.run(recipe_with(model_uri=str(folder), host="0.0.0.0"), tmp_path / "serve.yaml")
    with pytest.raises(ConfigError, match=r"^--write-config: .* cannot be created, because"):
        deploy.run(recipe_with(model_uri=str(folder)), folder / "config.json" / "serve.yaml")
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        deploy.run(recipe_with(model_uri=str(tmp_path / "none")), tmp_path / "serve.yaml")
    with pytest.raises(
        ConfigError, match=r"^serve\.speculative_tokens: the model has no multi-token .*; expected 0, found 2$"
    ):
        deploy.run(recipe_with(model_uri=str(folder), speculative_tokens=2), tmp_path / "serve.yaml")
    assert not (tmp_path / "serve.yaml").exists()


def options_of(**settings):
    """Return the options of a model's deployment."""
    application = build_model({"model_name": "m", "checkpoint": "c", **settings})
    return application._bound_deployment._deployment_config


def test_autoscaling_follows_the_queue_within_bounds():
    assert options_of(replicas=2).autoscaling_config is None
    assert options_of(replicas=2).num_replicas == 2
    scaling = options_of(replicas=2, max_replicas=5, max_active_requests=7, upscale_delay_seconds=3).autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 5)
    assert scaling.target_ongoing_requests == 7  # more requests than that wait in the engine's queue
    assert (scaling.upscale_delay_s, scaling.downscale_delay_s) == (3, 300)
    assert options_of(max_replicas=2, target_requests_per_replica=3).autoscaling_config.target_ongoing_requests == 3


def test_replicas_are_checked_drained_and_replaced_by_new_ones_first():
    options = options_of(health_check_seconds=2, drain_seconds=45)
    assert (options.health_check_period_s, options.graceful_shutdown_timeout_s) == (2, 45)
    assert options.max_surge_percent == 100
    assert options.request_router_config.get_request_router_class().__name__ == "PrefixRouter"


def test_names_of_models():
    sources = model_sources(recipe_with(model_uri="models:/a@b", models={"c": "models:/a/3"}).serve)
    assert sources == [("a", "models:/a@b", "serve.model_uri"), ("c", "models:/a/3", "serve.models.c")]
    with pytest.raises(ConfigError, match=r"^serve.models: 'a' is the name of serve.model_uri already$"):
        model_sources(recipe_with(model_uri="models:/a@b", models={"a": "models:/a/3"}).serve)
    assert len({application_name(name) for name in ("a/b", "a-b", "a b", "é", "ü")}) == 5


def test_copies_of_a_tracking_server_are_removed(tmp_path, folder, monkeypatch):
    recipe = recipe_from_dict({"run": {"folder": str(tmp_path)}, "serve": {"model_uri": "models:/small@champion"}})
    number = 1

    def copy(tracking, uri, destination, key):
        assert uri == f"models:/small/{number}"
        return Path(shutil.copytree(folder, destination / "final"))

    monkeypatch.setattr(served_models, "open_tracking", lambda *_, **__: SimpleNamespace(uri="http://tracking"))
    monkeypatch.setattr(served_models, "find_version", lambda *_: SimpleNamespace(version=number))
    monkeypatch.setattr(served_models, "download", copy)
    store = ModelStore(recipe)
    [first] = store.find()
    assert (first.version, store.newer_version(first)) == ("1", None)
    number = 2
    second = store.newer_version(first)
    assert second.version == "2" and second.checkpoint != first.checkpoint
    assert store.newer_version(first) == second, "a version is copied once"
    store.discard_others(second)
    assert not first.checkpoint.exists() and second.checkpoint.is_dir()
    monkeypatch.setattr(served_models, "download", lambda *_: 1 / 0)
    number = 3
    with pytest.raises(ZeroDivisionError):
        store.newer_version(second)
    assert len(list((tmp_path / "served").iterdir())) == 1
    store.close()
    assert not (tmp_path / "served").exists()


@pytest.fixture
def copied(tmp_path, folder, monkeypatch):
    """A recipe with a model of a tracking server, whose only version is copied to ``served``."""
    store = SimpleNamespace(uri="http://tracking")
    monkeypatch.setattr(served_models, "open_tracking", lambda *_, **__: store)
    monkeypatch.setattr(served_models, "find_version", lambda *_: SimpleNamespace(version="1"))
    monkeypatch.setattr(served_models, "download", lambda _, __, to, ___: Path(shutil.copytree(folder, to / "final")))
    return recipe_from_dict({"run": {"folder": str(tmp_path)}, "serve": {"model_uri": "models:/small@champion"}})


def test_copies_stay_for_a_serve_config_and_are_removed_if_none_is_written(copied, tmp_path, monkeypatch):
    monkeypatch.setattr(deploy, "check_model", lambda *_: (_ for _ in ()).throw(CheckpointError("damaged")))
    with pytest.raises(CheckpointError, match="damaged"):
        deploy.run(copied, tmp_path / "serve.yaml")
    assert not (tmp_path / "served").exists()
    monkeypatch.setattr(deploy, "check_model", lambda *_: None)
    deploy.run(copied, tmp_path / "serve.yaml")
    (copy,) = (tmp_path / "served").iterdir()
    assert str(copy / "final") in (tmp_path / "serve.yaml").read_text()


class RayServeException(Exception):
    """Like Serve's own, derived from nothing else."""


def deployment_of(recipe):
    model = DeployedModel("small", "models:/small@champion", "serve.model_uri", Path("old"), "0")
    return deploy.Deployment("http://t", [model], "float32", recipe.serve, ModelStore(recipe), ExitStack())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RayServeException("gone"), KeyError("x")])
def test_no_problem_with_a_moved_alias_ends_the_deployment(copied, tmp_path, monkeypatch, capsys, error):
    def fail(*_):
        raise error

    deployment = deployment_of(copied)
    monkeypatch.setattr(deploy, "check_model", lambda *_: None)
    monkeypatch.setattr(deploy, "replace_model", fail)
    for _ in range(2):
        deployment.follow_aliases()
    assert capsys.readouterr().out == f"'small' stays at version 0: {error}\n"  # once
    assert len(list((tmp_path / "served").iterdir())) == 1, "new replicas may have begun to load the copy"
    monkeypatch.setattr(deploy, "check_model", lambda *_: (_ for _ in ()).throw(CheckpointError("damaged")))
    deployment.follow_aliases()
    assert not list((tmp_path / "served").iterdir()), "a damaged version is not kept"


def test_a_replacement_is_awaited_through_any_problem(copied, monkeypatch, capsys):
    states = [KeyError("x"), RayServeException("gone"), RayServeException("gone"), (ApplicationStatus.RUNNING, "")]

    def state(_):
        found = states.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    deployment = deployment_of(copied)
    monkeypatch.setattr(deploy, "check_model", lambda *_: None)
    monkeypatch.setattr(deploy, "replace_model", lambda *_: None)
    monkeypatch.setattr(deploy, "replacement_state", state)
    monkeypatch.setattr(deploy, "_POLL_SECONDS", 0)
    deployment.follow_aliases()
    first, second, last = capsys.readouterr().out.splitlines()
    assert (first, second) == ("waiting for version 1 of 'small': 'x'", "waiting for version 1 of 'small': gone")
    assert last.startswith("serving version 1 of 'small'") and deployment.models[0].version == "1"


def test_a_deleted_application_does_not_stop_other_aliases(copied, monkeypatch, capsys):
    deployment = deployment_of(copied)
    monkeypatch.setattr(deploy, "check_model", lambda *_: None)
    monkeypatch.setattr(deploy, "replace_model", lambda *_: None)
    monkeypatch.setattr(ray_serve, "status", lambda: SimpleNamespace(applications={}))
    deployment.follow_aliases()
    assert "version 1 of 'small' does not start: Ray Serve has no application" in capsys.readouterr().out


def test_an_application_that_serve_does_not_know_is_named(monkeypatch):
    monkeypatch.setattr(ray_serve, "status", lambda: SimpleNamespace(applications={}))
    with pytest.raises(FiftyfoldError, match=r"^Ray Serve has no application '.*small.*'$"):
        replacement_state(DeployedModel("small", "c", "serve.model_uri", Path("c"), "1"))


@pytest.mark.parametrize(
    ("store", "source", "copies"),
    [
        ("postgresql://host/db", "s3://bucket/model", True),
        ("databricks://profile", "dbfs:/model", True),
        ("http://tracking", "mlflow-artifacts:/model", True),
        ("sqlite:////x/mlflow.db", "file:///x/model", False),
    ],
)
def test_checkpoints_outside_the_file_system_are_copied(tmp_path, monkeypatch, store, source, copies):
    found = []

    def fetch(artifact_uri, dst_path, tracking_uri):
        found.append(dst_path)
        return dst_path or "/x/model"

    client = SimpleNamespace(
        get_model_version_by_alias=lambda *_: SimpleNamespace(name="small", version=1),
        get_model_version=lambda *_: SimpleNamespace(name="small", version=1),
        get_model_version_download_uri=lambda *_: source,
    )
    tracking = SimpleNamespace(uri=store, client=client)
    monkeypatch.setattr(served_models, "open_tracking", lambda *_, **__: tracking)
    monkeypatch.setattr(registry.mlflow.artifacts, "download_artifacts", fetch)
    recipe = recipe_from_dict({"run": {"folder": str(tmp_path)}, "serve": {"model_uri": "models:/small@champion"}})
    [model] = ModelStore(recipe).find()
    assert model.checkpoint.is_relative_to(tmp_path / "served") == copies
    assert found == [str(model.checkpoint) if copies else None]
