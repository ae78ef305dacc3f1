"""Neither keys nor prompts reach a log, whatever the request and however it ends."""

import hmac
import io
import json
import logging
from contextlib import redirect_stderr, redirect_stdout

import pytest
from fastapi.testclient import TestClient
from replicas import Replicas

from serve.api import authorization
from serve.api.asgi import create_app
from serve.api.config import HttpConfig
from serve.engine import Engine
from serve.gateway.asgi import create_gateway

KEY, PROMPT = "correct-horse-battery", "zebra quilt zebra"
BODIES = {
    "completion": ("/v1/completions", {"prompt": PROMPT, "max_tokens": 2}),
    "stream": ("/v1/completions", {"prompt": PROMPT, "max_tokens": 2, "stream": True}),
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 2}),
    "tokenize": ("/tokenize", {"prompt": PROMPT}),
    "invalid field": ("/v1/completions", {"prompt": PROMPT, "temperature": 9}),
    "invalid prompt": ("/v1/completions", {"prompt": {PROMPT: 1}}),
    "too long": ("/v1/completions", {"prompt": PROMPT, "max_tokens": 5000}),
    "unknown model": ("/v1/completions", {"prompt": PROMPT, "model": "none"}),
}


@pytest.fixture
def app(endless_model, letters, tmp_path):
    (tmp_path / "key").write_text(KEY)
    config = HttpConfig(api_key_file=str(tmp_path / "key"))
    engine = Engine(endless_model, letters)
    replicas = Replicas(create_app(engine, "letters", config.behind_gateway()))
    return engine, create_gateway({"letters": replicas}, config, 60)


def recorded(app, caplog, requests) -> str:
    """Return everything that is logged or printed during requests, at the finest level."""
    output = io.StringIO()
    recording = (caplog.at_level(logging.DEBUG), redirect_stdout(output), redirect_stderr(output))
    with recording[0], recording[1], recording[2], TestClient(app, raise_server_exceptions=False) as client:
        requests(client)
    return caplog.text + output.getvalue()


@pytest.mark.parametrize("name", BODIES)
def test_requests_leave_no_trace(app, caplog, name) -> None:
    path, body = BODIES[name]

    def requests(client: TestClient) -> None:
        for key in (KEY, f"wrong-{KEY}", ""):
            client.post(path, json=body, headers={"Authorization": f"Bearer {key}"} if key else {})

    logging.getLogger("serve").debug("the recorder works")
    text = recorded(app[1], caplog, requests)
    assert "zebra" not in text and KEY not in text


def test_a_failing_engine_leaves_no_trace_of_its_requests(app, caplog, monkeypatch) -> None:
    engine, gateway = app

    def fail(arrivals):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine._scheduler, "step", fail)

    def requests(client: TestClient) -> None:
        path, body = BODIES["completion"]
        answer = client.post(path, json=body, headers={"Authorization": f"Bearer {KEY}"})
        assert answer.status_code == 500
        assert "zebra" not in answer.text

    text = recorded(gateway, caplog, requests)
    assert "the engine failed" in text  # so failures are recorded, without data
    assert "zebra" not in text and KEY not in text


def test_keys_are_compared_in_constant_time(app, caplog, monkeypatch) -> None:
    compared = []

    def compare(first: bytes, second: bytes) -> bool:
        compared.append((len(first), len(second)))
        return hmac_compare(first, second)

    hmac_compare = hmac.compare_digest
    monkeypatch.setattr(authorization.hmac, "compare_digest", compare)

    def requests(client: TestClient) -> None:
        for key, status in ((KEY, 200), (KEY[:-1], 401), (KEY + "x", 401), ("x", 401), ("é" * 100, 401), ("", 401)):
            header = f"Bearer {key}".encode()
            assert client.get("/v1/models", headers={"Authorization": header}).status_code == status

    recorded(app[1], caplog, requests)
    assert compared == [(32, 32)] * 6  # digests of equal length, whatever was sent


def test_settings_and_arguments_hold_no_key(app, tmp_path) -> None:
    config = HttpConfig(api_key_file=str(tmp_path / "key"))
    assert KEY not in json.dumps(config.model_dump()) + repr(config)
    assert KEY not in repr([middleware.kwargs for middleware in app[1].user_middleware])
