"""Two models on Ray Serve: routing, versions that move, and processes that are killed under load."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import ray
from chaos import CONTROLLER, GATEWAY, PATIENCE_SECONDS, PROXY, REPLICA, answers, busy, kill, processes, wait_for
from deployments import recipe_for

from model import checkpoint
from pipelines.steps.deploy import Deployment, start
from pipelines.tracking.mlflow_store import open_tracking
from serve.app import application_name

SECRET = "zebra quilt zebra"
LETTERS = f"ray::ServeReplica:{application_name('letters')}{REPLICA}"


@pytest.fixture(scope="module")
def versions(tmp_path_factory, random_model_of, endless_model, letters) -> list[Path]:
    """Two versions of a model that generate different text."""
    folder = tmp_path_factory.mktemp("versions")
    for name, model in (("one", endless_model), ("two", random_model_of(letters.vocab_size))):
        checkpoint.save(model, folder / name, letters)
    return [folder / "one", folder / "two"]


@pytest.fixture(scope="module")
def deployment(ray_cluster, versions, tmp_path_factory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("runs")
    recipe = recipe_for(folder, "models:/letters@champion", replicas=2, cpus_per_replica=0.1, drain_seconds=60,
                        health_check_seconds=1, models={"other": str(versions[1])})  # fmt: skip
    client = open_tracking(recipe).client
    client.create_registered_model("letters")
    for version in versions:
        client.create_model_version("letters", version.as_uri())
    client.set_registered_model_alias("letters", "champion", "1")
    with start(recipe) as deployment:
        yield deployment


def text_of(url: str, model: str) -> str:
    body = {"model": model, "prompt": "the rain", "max_tokens": 20, "temperature": 0}
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
    assert response.json()["model"] == model
    return response.json()["choices"][0]["text"]


def test_models_are_served_side_by_side(deployment) -> None:
    cards = httpx.get(f"{deployment.url}/v1/models").json()["data"]
    assert [(card["id"], card["version"]) for card in cards] == [("letters", "1"), ("other", None)]
    assert text_of(deployment.url, "letters") != text_of(deployment.url, "other")
    report = httpx.get(f"{deployment.url}/healthz").json()
    assert [model["model"] for model in report["models"]] == ["letters", "other"]


def test_bodies_of_many_megabytes_pass_in_both_directions(deployment) -> None:
    def ask(**fields: object) -> httpx.Response:
        return httpx.post(
            f"{deployment.url}/v1/completions", json={"model": "letters", **fields}, timeout=PATIENCE_SECONDS
        )

    refused = ask(prompt="a" * 9_000_000)  # gRPC's own limit is 4 MiB
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "context_length_exceeded"
    scored = ask(prompt=[[5] * 480] * 64, max_tokens=0, echo=True, logprobs=5)
    assert scored.status_code == 200 and len(scored.content) > 4 * 2**20
    assert len(scored.json()["choices"]) == 64


def test_requests_with_a_common_prefix_reach_the_replica_that_holds_it(deployment) -> None:
    assert len(processes(LETTERS)) == 2
    shared = "the other rain in the end " * 8  # three pages
    cached = []
    for i in range(8):
        body = {"prompt": f"{shared} {chr(97 + i)}", "max_tokens": 1}
        usage = httpx.post(f"{deployment.url}/v1/completions", json=body, timeout=120).json()["usage"]
        cached.append(usage["prompt_tokens_details"]["cached_tokens"])
    assert cached[0] == 0 and min(cached[2:]) >= 64  # the second one shows where prompts part


def test_a_killed_replica_costs_no_request_that_has_no_output(deployment) -> None:
    before = set(processes(LETTERS))
    with busy(deployment.url) as outcomes:
        kill(LETTERS, 1)
        done = len(outcomes.complete)
        wait_for(lambda: len(outcomes.complete) >= done + 8)
        wait_for(lambda: len(processes(LETTERS)) == 2 and set(processes(LETTERS)) != before)
    assert outcomes.errors == []
    assert {error["code"] for error in outcomes.stream_errors} <= {"unavailable"}
    assert answers(deployment.url)


def test_all_replicas_of_a_model_may_be_killed(deployment) -> None:
    with busy(deployment.url, clients=2, model="other") as other:
        with busy(deployment.url, clients=2, model="letters") as outcomes:
            kill(LETTERS)
            wait_for(lambda: len(processes(LETTERS)) == 2 and answers(deployment.url, model="letters"))
        assert {error["code"] for error in outcomes.stream_errors} <= {"unavailable"}
        assert all(error.startswith("503 ") and '"unavailable"' in error for error in outcomes.errors)
    assert other.errors == other.stream_errors == []  # other models go on


@pytest.mark.parametrize("process", [GATEWAY, PROXY])
def test_a_killed_gateway_or_proxy_is_replaced(deployment, process) -> None:
    before = processes(process)
    with busy(deployment.url) as outcomes:
        kill(process)
        wait_for(lambda: processes(process) not in ([], before))
        wait_for(lambda: answers(deployment.url))
        done = len(outcomes.complete)
        wait_for(lambda: len(outcomes.complete) >= done + 4)
    # A connection that breaks, or a status that says so: never a response that looks complete and is not.
    assert all(error.startswith(("5", "Connect", "Remote", "Read", "Write", "a stream")) for error in outcomes.errors)
    assert outcomes.stream_errors == []


def test_a_killed_controller_is_replaced_and_requests_go_on(deployment) -> None:
    before = processes(CONTROLLER)
    with busy(deployment.url) as outcomes:
        kill(CONTROLLER)
        wait_for(lambda: processes(CONTROLLER) not in ([], before))
    assert outcomes.errors == outcomes.stream_errors == []


def test_a_moved_alias_is_followed_without_losing_a_request(deployment, versions) -> None:
    old, other = text_of(deployment.url, "letters"), text_of(deployment.url, "other")
    registry = deployment._store._open().client
    with busy(deployment.url) as outcomes:
        deployment.follow_aliases()  # nothing has moved
        assert deployment.models[0].version == "1"
        registry.set_registered_model_alias("letters", "champion", "2")
        deployment.follow_aliases()
        done = len(outcomes.complete)
        wait_for(lambda: len(outcomes.complete) >= done + 4)
    assert outcomes.errors == outcomes.stream_errors == []
    cards = httpx.get(f"{deployment.url}/v1/models").json()["data"]
    assert [(card["id"], card["version"]) for card in cards] == [("letters", "2"), ("other", None)]
    assert deployment.models[0].version == "2"
    assert text_of(deployment.url, "letters") == text_of(deployment.url, "other") == other != old


def test_a_damaged_version_is_not_served(deployment, versions, letters, tmp_path, capsys) -> None:
    checkpoint.save(checkpoint.load(versions[0]), tmp_path / "damaged", letters)
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"x")
    registry = deployment._store._open().client
    number = registry.create_model_version("letters", (tmp_path / "damaged").as_uri()).version
    registry.set_registered_model_alias("letters", "champion", number)
    for reported in (True, False):  # once
        deployment.follow_aliases()
        assert ("'letters' stays at version" in capsys.readouterr().out) == reported
    assert httpx.get(f"{deployment.url}/v1/models/letters").json()["version"] != str(number)
    registry.delete_registered_model_alias("letters", "champion")
    deployment.follow_aliases()
    assert "'letters' stays at version" in capsys.readouterr().out
    assert answers(deployment.url)


def test_prompts_are_in_no_log_of_ray(deployment) -> None:
    body = {"prompt": SECRET, "max_tokens": 2}
    for change in ({}, {"stream": True}, {"temperature": 9}, {"model": "none"}, {"max_tokens": 10**6}):
        httpx.post(f"{deployment.url}/v1/completions", json=body | change, timeout=120)
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    files = [path for path in logs.rglob("*") if path.is_file()]
    assert any("serve" in path.parts for path in files)
    assert [path for path in files if b"zebra" in path.read_bytes()] == []
    assert json.dumps(SECRET)  # the marker itself is plain text
