"""Every field of a request has a limit, and hostile values are refused in one sentence."""

import json
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient
from test_fuzz import check

from serve.api.asgi import create_app
from serve.api.schemas.chat import ChatRequest
from serve.api.schemas.completions import CompletionRequest
from serve.api.schemas.generation import StreamOptions
from serve.api.schemas.tokenization import DetokenizeRequest, TokenizeRequest
from serve.engine import Engine, EngineConfig

MESSAGE = {"role": "user", "content": "a"}
SHARED = {
    "model": "m" * 1001,
    "temperature": 2.1,
    "top_p": 1.1,
    "top_k": 2**31,
    "min_p": 1.1,
    "min_tokens": 2**31,
    "repetition_penalty": 101,
    "presence_penalty": 2.1,
    "frequency_penalty": -2.1,
    "logit_bias": {str(i): 0 for i in range(1025)},
    "n": 129,
    "seed": 2**63,
    "stop": ["a"] * 1000,
    "stop_token_ids": [1] * 1025,
}
TOO_LARGE = {
    "/v1/completions": (
        CompletionRequest,
        SHARED | {"prompt": [5] * 10**6, "max_tokens": 513, "logprobs": 6, "best_of": 129},
    ),
    "/v1/chat/completions": (
        ChatRequest,
        SHARED
        | {
            "messages": [MESSAGE] * 10_001,
            "max_tokens": 513,
            "max_completion_tokens": 513,
            "top_logprobs": 21,
            "tools": [{"function": {"name": "f"}}] * 129,
            "tool_choice": "required",
            "chat_template_kwargs": {str(i): 0 for i in range(65)},
        },
    ),
    "/tokenize": (TokenizeRequest, {"model": "m" * 1001}),
    "/detokenize": (DetokenizeRequest, {"model": "m" * 1001}),
}
LIMITED_BY_THE_CONTEXT = {"max_tokens", "max_completion_tokens"}
LIMITED_BY_THE_BODY = {"/tokenize": {"prompt"}, "/detokenize": {"tokens"}}
BASES = {
    "/v1/completions": {"prompt": "a", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [MESSAGE], "max_tokens": 1},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [5]},
}


@pytest.fixture(scope="module")
def client(endless_model, letters) -> Iterator[TestClient]:
    engine = Engine(endless_model, letters, EngineConfig(max_active_requests=4, max_waiting_requests=8))
    with TestClient(create_app(engine, "letters"), raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize("path", TOO_LARGE)
def test_every_field_has_a_limit(client, path) -> None:
    schema, values = TOO_LARGE[path]
    switches = {
        name for name, field in schema.model_fields.items() if field.annotation in (bool, bool | None, StreamOptions)
    }
    assert set(values) | switches | LIMITED_BY_THE_BODY.get(path, set()) == set(schema.model_fields)
    assert all(field.annotation is bool for field in StreamOptions.model_fields.values())
    for name, value in values.items():
        body = {field: base for field, base in BASES[path].items() if name not in LIMITED_BY_THE_CONTEXT}
        body |= {"messages": [MESSAGE]} if path == "/v1/chat/completions" else {}
        response = client.post(path, json=body | {name: value})
        assert response.status_code == 400, name
        assert response.json()["error"]["param"] == name
        check(response)


HOSTILE = {
    "nested lists": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "nested objects": b'{"chat_template_kwargs": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
    "an integer of many digits": b'{"max_tokens": ' + b"9" * 100_000 + b"}",
    "a float beyond the range": b'{"temperature": 1e999}',
    "an unpaired surrogate": b'{"prompt": "\\ud83d"}',
    "surrogates in reverse": b'{"stop": ["\\udc00\\ud800"]}',
    "not a number": b'{"temperature": NaN}',
    "a million tokens": json.dumps({"prompt": [5] * 10**6}).encode(),
    "a million prompts": json.dumps({"prompt": ["a"] * 10**6}).encode(),
    "a token beyond 64 bits": b'{"prompt": [99999999999999999999999]}',
    "a thousand stop strings": json.dumps({"prompt": "a", "stop": [f"x{i}" for i in range(1000)]}).encode(),
    "a long stop string": json.dumps({"prompt": "a", "stop": "x" * 4097}).encode(),
    "many fields": json.dumps({f"field {i}": i for i in range(10**5)}).encode(),
    "a long name": json.dumps({"x" * 10**6: 1}).encode(),
    "a NUL": b'{"prompt": "a"}\x00',
    "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
    "a truncated escape": b'{"prompt": "\\u00"}',
    "ten megabytes of text": json.dumps({"prompt": "the " * 2_500_000}).encode(),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_hostile_bodies_are_refused(client, path, name) -> None:
    response = client.post(path, content=HOSTILE[name], headers={"content-type": "application/json"})
    assert response.status_code == 400
    check(response)
    assert client.post(path, json=BASES[path]).status_code == 200
