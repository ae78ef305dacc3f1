"""The deploy step's account of a deployment that failed."""

from types import SimpleNamespace

import pytest
import ray
from ray import serve as ray_serve

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
