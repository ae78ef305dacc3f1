"""The API key: where it is read from, and which requests need it."""

import hmac
import os

import pytest
from fastapi.testclient import TestClient
from pydantic import ValidationError

from model.errors import ConfigError
from serve.api.asgi import create_app
from serve.api.authorization import read_key
from serve.api.config import HttpConfig
from serve.engine import Engine

KEY = "correct-horse"


@pytest.fixture(scope="module")
def locked(tmp_path_factory, endless_model, letters):
    file = tmp_path_factory.mktemp("key") / "key"
    file.write_text(f"{KEY}\n")
    config = HttpConfig(api_key_file=str(file), allowed_origins=("http://page",))
    with TestClient(create_app(Engine(endless_model, letters), "letters", config)) as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


ROUTES = [
    "/v1/models",
    "/v1/cache",
    "/metrics",
    "/version",
    "/tokenizer_info",
    "/openapi.json",
    "/nowhere",
    "/v1/models/",
]


@pytest.mark.parametrize("route", ROUTES)
def test_routes_need_the_key(locked, route) -> None:
    missing = locked.get(route)
    assert missing.status_code == 401
    assert missing.headers["www-authenticate"] == "Bearer"
    assert missing.json()["error"] == {
        "message": "missing API key; send it as Authorization: Bearer <key>",
        "type": "invalid_request_error",
        "param": None,
        "code": "invalid_api_key",
    }
    assert locked.get(route, headers=bearer(KEY)).status_code == (404 if route == "/nowhere" else 200)
    assert locked.head(route).status_code == 401


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_generation_needs_the_key(locked, route) -> None:
    body = {"max_tokens": 1} | (
        {"messages": [{"role": "user", "content": "a"}]} if "chat" in route else {"prompt": "a"}
    )
    assert locked.post(route, json=body).status_code == 401
    assert locked.post(route, content=b"[").status_code == 401  # before the body is read
    assert locked.post(route, json=body, headers=bearer(KEY)).status_code == 200
    assert locked.post(route, json=body, headers={"authorization": f"bearer  {KEY} "}).status_code == 200


@pytest.mark.parametrize(
    "header",
    ["Bearer wrong-key", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer", f"Basic {KEY}", KEY, "Bearer \xff\xfe"],
)
def test_wrong_keys_are_refused(locked, header) -> None:
    response = locked.get("/v1/models", headers={"authorization": header.encode("latin-1")})
    assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
    assert response.json()["error"]["message"].startswith("wrong API key")
    assert KEY not in response.text


@pytest.mark.parametrize("route", ["/", "/health", "/healthz", "/healthz/"])
def test_the_page_and_health_checks_are_open(locked, route) -> None:
    assert locked.get(route).status_code == 200


def test_web_pages_may_ask_without_the_key(locked) -> None:
    asks = {"origin": "http://page", "access-control-request-method": "POST"}
    assert locked.options("/v1/completions", headers=asks).status_code == 204
    assert locked.options("/v1/completions").status_code == 204
    answer = locked.get("/v1/models", headers={"origin": "http://page"})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (401, "http://page")


def test_keys_are_compared_in_constant_time(locked, monkeypatch) -> None:
    compared = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: (compared.append((len(a), len(b))), compare(a, b))[1])
    for key in ("x", KEY, "y" * 1000):
        locked.get("/v1/models", headers=bearer(key))
    assert compared == [(32, 32)] * 3


def test_without_a_key_authorization_is_ignored(client) -> None:
    assert client.get("/v1/models", headers=bearer("anything")).status_code == 200


def test_the_key_is_kept_nowhere_but_in_its_source(locked) -> None:
    app, seen, found = locked.app, set(), []
    stack = [app, app.middleware_stack]
    while stack:
        item = stack.pop()
        if id(item) in seen or not type(item).__module__.startswith(("serve", "starlette", "fastapi")):
            continue
        seen.add(id(item))
        values = vars(item).values() if hasattr(item, "__dict__") else ()
        found += [value for value in values if KEY in repr(value)]
        stack += values
    assert len(seen) > 5
    assert found == []


def test_sources_of_the_key(tmp_path, monkeypatch) -> None:
    file = tmp_path / "key"
    file.write_text(f"  {KEY}\n")
    monkeypatch.setenv("SOME_KEY", KEY)
    assert read_key(HttpConfig()) is None
    assert read_key(HttpConfig(api_key_file=str(file))) == KEY
    assert read_key(HttpConfig(api_key_variable="SOME_KEY")) == KEY
    assert KEY not in repr(HttpConfig(api_key_file=str(file)))
    with pytest.raises(ValidationError, match=r"api_key_variable\n.*set api_key_file or api_key_variable, not both"):
        HttpConfig(api_key_file=str(file), api_key_variable="SOME_KEY")


@pytest.mark.parametrize("content", [b"", b"short", b"two words here", b"\xff" * 20, "é".encode() * 20, b"a" * 600])
def test_malformed_keys_are_refused(tmp_path, content) -> None:
    file = tmp_path / "key"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"^api_key_file: \S+: the key must be 8 to 512 printable ASCII characters"):
        read_key(HttpConfig(api_key_file=str(file)))


def test_missing_keys_are_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"^api_key_file: \S+nowhere: No such file or directory$"):
        read_key(HttpConfig(api_key_file=str(tmp_path / "nowhere")))
    with pytest.raises(ConfigError, match=r"^api_key_variable: SOME_KEY: not set in the environment of this process$"):
        read_key(HttpConfig(api_key_variable="SOME_KEY"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match=r"^api_key_file: \S+pipe: is not a regular file$"):
        read_key(HttpConfig(api_key_file=str(tmp_path / "pipe")))
