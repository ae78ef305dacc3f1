"""The deploy step: the key it requires, and its account of a deployment that failed."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ray import serve as ray_serve

from model.errors import ConfigError
from pipelines.recipe.loading import recipe_from_dict
from pipelines.recipe.schema import Recipe, ServeSection
from pipelines.steps import deploy

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
        status = SimpleNamespace(applications={deploy.APPLICATION: SimpleNamespace(deployments=deployments)})
        monkeypatch.setattr(ray, "is_initialized", lambda: True)
        monkeypatch.setattr(ray_serve, "status", lambda: status)

    return set_messages


def test_failure_is_the_error_of_a_replica(messages):
    messages("", TRACEBACK)
    assert deploy._failure(SERVE) == "ModuleNotFoundError: No module named 'serve'"


def test_failure_is_a_replica_message_without_traceback(messages):
    messages("Deployment 'completions' has 1 replicas that have taken more than 30s to initialize.")
    assert deploy._failure(SERVE).endswith("30s to initialize.")


@pytest.mark.parametrize("broken", ["no message", "no status"])
def test_failure_is_the_last_line_of_the_error_without_replica_messages(messages, monkeypatch, broken):
    messages("")
    if broken == "no status":

        def fail():
            raise RuntimeError("Serve is gone")

        monkeypatch.setattr(ray_serve, "status", fail)
    assert deploy._failure(RuntimeError("first\nlast")) == "last"


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


def test_replicas_get_the_path_of_the_key_and_not_the_key(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("key").write_text("correct-horse")
    section = recipe_with(api_key_file="key").serve
    arguments = deploy._arguments(section, tmp_path, "name")
    assert arguments["api_key_file"] == str(tmp_path / "key")
    deploy._print_endpoint(
        SimpleNamespace(checkpoint="c", model_name="name", url="http://t", weights="float32"), section
    )
    printed = capsys.readouterr().out
    assert '-H "Authorization: Bearer $(cat key)"' in printed
    assert "correct-horse" not in printed + repr(arguments)
