"""Signals to the process that deploys: requests end before the server does, unless a second signal follows."""

import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import ray
from chaos import PATIENCE_SECONDS, wait_for
from deployments import deploy, recipe_for, url_of
from ray import serve as ray_serve

from model import checkpoint
from pipelines.recipe.schema import Recipe

LONG = {"prompt": "the", "max_tokens": 300, "temperature": 0}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, endless_model, letters) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "letters" / "final"
    checkpoint.save(endless_model, folder, letters)
    return folder


@contextmanager
def deployed(recipe: Recipe) -> Iterator[subprocess.Popen]:
    """Deploy a recipe on the cluster of the tests, in a process of its own."""
    process = deploy(recipe, ray.get_runtime_context().gcs_address)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
            ray_serve.shutdown()


def test_running_requests_end_before_the_server_does(ray_cluster, saved) -> None:
    recipe = recipe_for(saved.parents[1], saved, cpus_per_replica=0.1, max_active_requests=2)
    url, answers = url_of(recipe), []

    def ask(**fields: object) -> httpx.Response:
        return httpx.post(f"{url}/v1/completions", json=LONG | fields, timeout=PATIENCE_SECONDS)

    with deployed(recipe) as process:
        client = threading.Thread(target=lambda: answers.append(ask(n=16)))
        body = LONG | {"n": 8, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=PATIENCE_SECONDS) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            client.start()
            wait_for(lambda: httpx.get(f"{url}/healthz").json()["unfinished"] > 8)
            process.send_signal(signal.SIGTERM)
            wait_for(lambda: httpx.get(f"{url}/healthz").status_code == 503)
            refused = ask(max_tokens=1)
            events = [line for line in lines if line]
        client.join()
        output, _ = process.communicate()
    assert (refused.status_code, refused.json()["error"]["message"]) == (503, "the server is stopping")
    assert events[-1] == "data: [DONE]" and sum('"finish_reason":"length"' in event for event in events) == 8
    assert answers[0].status_code == 200 and len(answers[0].json()["choices"]) == 16
    assert process.returncode == 0
    assert output.splitlines() == ["stopping; requests have 120 seconds to end (Ctrl-C ends them now)"]


def test_a_second_signal_ends_running_requests(ray_cluster, saved) -> None:
    # One after the other, the completions would take minutes.
    recipe = recipe_for(saved.parents[1], saved, cpus_per_replica=0.1, max_active_requests=1)
    with deployed(recipe) as process:
        body = LONG | {"n": 128, "stream": True}
        with httpx.stream("POST", f"{url_of(recipe)}/v1/completions", json=body, timeout=PATIENCE_SECONDS) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline().startswith("stopping; ")
            process.send_signal(signal.SIGINT)
            with pytest.raises(httpx.RemoteProtocolError):
                list(lines)
        output, _ = process.communicate()
    assert process.returncode == 0
    assert output.splitlines() == ["stopping with unfinished requests"]
