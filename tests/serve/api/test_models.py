"""Model, health, and schema routes."""

import asyncio
import tomllib
from pathlib import Path

from fastapi.testclient import TestClient

from serve.api.asgi import create_app
from serve.engine import Engine


def test_models(client, letters_model) -> None:
    listing = client.get("/v1/models").json()
    assert listing["object"] == "list"
    [card] = listing["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("letters", "model", 512)
    assert 0 < card["cache_bytes_per_token"] < 500
    assert card["chat_template"] == "built-in"
    assert client.get("/v1/models/letters").json() == card


def test_healthz(client) -> None:
    for path in ("/healthz", "/health"):
        response = client.get(path)
        assert (response.status_code, response.json()["status"]) == (200, "ok")


def test_version_is_the_project_s(client) -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert client.get("/version").json() == {"version": project["version"]}


def test_healthz_of_a_stopped_engine(letters_model, letters) -> None:
    engine = Engine(letters_model, letters)
    asyncio.run(engine.stop())
    with TestClient(create_app(engine, "letters")) as client:
        assert client.get("/healthz").status_code == client.get("/health").status_code == 503
        assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 500


def test_openapi_schema(client) -> None:
    schema = client.get("/openapi.json").json()
    fields = schema["components"]["schemas"]["CompletionRequest"]["properties"]
    assert {"prompt", "max_tokens", "stream", "echo", "logprobs"} <= set(fields)
    assert len(fields["prompt"]["anyOf"]) == 5
