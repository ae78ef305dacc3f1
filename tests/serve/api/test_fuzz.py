"""Arbitrary requests get 2xx, or 4xx in OpenAI's error format."""

import gzip
import json
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from serve.api.schemas.chat import ChatRequest
from serve.api.schemas.completions import CompletionRequest
from serve.api.schemas.messages import ROLES
from serve.api.schemas.neutral_fields import CHAT_NEUTRAL_TYPES, CHAT_NEUTRAL_VALUES, NEUTRAL_TYPES, NEUTRAL_VALUES

ROUTES = (
    *("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/v1/models", "/v1/models/x"),
    *("/", "/health", "/healthz", "/version", "/metrics", "/v1/cache", "/tokenizer_info"),
)
NAMES = [*CompletionRequest.model_fields, *NEUTRAL_VALUES, *NEUTRAL_TYPES, "tokens", "add_special_tokens"]
TEXT = st.text(st.characters(codec=None), max_size=8)  # includes surrogates and control characters
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 40),
    st.integers(),
    st.floats(),
    st.sampled_from([10**40, -(2**63), 2**64, 1e308, 5e-324, 16.0, -0.0, "", "letters"]),
    TEXT,
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6
)
# Mostly valid requests, so that many reach the model, with up to three arbitrary fields.
BODIES = st.builds(
    lambda valid, changes: valid | changes,
    st.fixed_dictionaries(
        {"max_tokens": st.integers(0, 3)},
        optional={
            "prompt": st.sampled_from(["", "the", [], [""], [[]], [1, 2], [[1], [2, 3]], ["a", "b"]]),
            "n": st.integers(1, 3),
            "echo": st.booleans(),
            "logprobs": st.integers(0, 5),
            "temperature": st.floats(0, 2),
            "top_p": st.floats(0, 1),
            "top_k": st.integers(-1, 10**30),
            "stop": st.sampled_from([None, [], "a", ["a", "the"], "\0"]),
            "stop_token_ids": st.lists(st.integers(0, 37), max_size=40),
            "min_tokens": st.integers(0, 2),
            "min_p": st.floats(0, 1),
            "repetition_penalty": st.floats(0.01, 100),
            "presence_penalty": st.floats(-2, 2),
            "frequency_penalty": st.floats(-2, 2),
            "logit_bias": st.dictionaries(st.integers(0, 37).map(str), st.floats(-100, 100), max_size=3),
            "ignore_eos": st.booleans(),
            "best_of": st.integers(1, 3),
            "stream": st.booleans(),
            "stream_options": st.dictionaries(st.sampled_from(["include_usage", "include_obfuscation"]), SCALARS),
        },
    ),
    st.dictionaries(st.sampled_from(NAMES) | TEXT, VALUES, max_size=3),
)
PARTS = st.fixed_dictionaries({"type": st.sampled_from(["text"] * 4 + ["image_url"])}, optional={"text": TEXT | VALUES})
CALLS = st.lists(
    st.fixed_dictionaries(
        {"function": st.fixed_dictionaries({"name": TEXT}, optional={"arguments": st.sampled_from(["{}", "[", 5])})}
    ),
    max_size=2,
)
MESSAGES = st.lists(
    st.builds(
        lambda valid, changes: valid | changes,
        st.fixed_dictionaries(
            {"role": st.sampled_from(ROLES), "content": TEXT | st.sampled_from(["the", "<s>", "s>", "</s>a<"])},
            optional={"name": TEXT},
        ),
        st.just({})
        | st.dictionaries(st.sampled_from(["role", "content", "tool_calls"]) | TEXT, VALUES, max_size=1)
        | st.fixed_dictionaries({"content": st.lists(PARTS, max_size=2)})
        | st.fixed_dictionaries({"tool_calls": CALLS}),
    ),
    min_size=1,
    max_size=3,
)
CHAT_NAMES = [*ChatRequest.model_fields, *CHAT_NEUTRAL_VALUES, *CHAT_NEUTRAL_TYPES]
CHAT_BODIES = st.builds(
    lambda valid, changes: valid | changes,
    st.fixed_dictionaries(
        {"messages": MESSAGES, "max_tokens": st.integers(0, 3)},
        optional={
            "n": st.integers(1, 3),
            "logprobs": st.booleans(),
            "stream": st.booleans(),
            "tool_choice": st.sampled_from(["auto", "none", "required", {"type": "function"}]),
            "add_generation_prompt": st.booleans(),
        },
    ),
    st.dictionaries(st.sampled_from(CHAT_NAMES) | TEXT, VALUES, max_size=2),
)
ENCODED = st.one_of(
    CHAT_BODIES.map(lambda body: json.dumps(body).encode()),
    BODIES.map(lambda body: json.dumps(body).encode()),
    VALUES.map(lambda body: json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    st.binary(max_size=30),
)
TYPES = st.sampled_from(["application/json"] * 8 + [None, "application/json; charset=latin-1", "text/plain", "\xff;"])
NAMES_IN_PATHS = st.text(max_size=5).map(lambda text: f"/v1/models/{quote(text)}")
FUZZ = settings(
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def check(response) -> None:
    assert 200 <= response.status_code < 300 or 400 <= response.status_code < 500, response.text
    if response.status_code >= 400 and response.request.method != "HEAD":
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert error["message"].isprintable() and len(error["message"]) < 600
    assert "text/event-stream" not in response.headers.get("content-type", "") or '"error"' not in response.text


@pytest.mark.parametrize(("path", "bodies"), [("/v1/completions", BODIES), ("/v1/chat/completions", CHAT_BODIES)])
def test_bodies(client, path, bodies) -> None:
    answered = []

    @settings(FUZZ, max_examples=250)
    @given(bodies)
    def run(body) -> None:
        content = json.dumps(body).encode()
        response = client.post(path, content=content, headers={"content-type": "application/json"})
        check(response)
        answered.append(response.status_code)

    run()
    assert answered.count(200) > 40
    assert answered.count(400) > 40


def test_requests(client) -> None:
    @settings(FUZZ, max_examples=300)
    @given(
        st.sampled_from(["POST"] * 6 + ["GET", "HEAD", "OPTIONS", "PUT", "BREW"]),
        st.sampled_from([*ROUTES, *ROUTES, "/v1/models/"])
        | st.text(max_size=5).map(lambda text: f"/v1/models/{quote(text)}"),
        TYPES,
        st.sampled_from([None] * 5 + ["gzip", "br", ""]),
        ENCODED,
    )
    def run(method, path, content_type, encoding, content) -> None:
        headers = {"accept": "*/*", "origin": "http://page"} if content_type == "text/plain" else {}
        headers |= {} if content_type is None else {"content-type": content_type.encode("latin-1")}
        headers |= {} if encoding is None else {"content-encoding": encoding}
        content = gzip.compress(content) if encoding == "gzip" and len(content) % 2 else content
        check(client.request(method, path, content=content, headers=headers))

    run()
