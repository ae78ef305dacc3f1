"""Error responses for invalid requests, full queues, and timeouts."""

import asyncio
import json
from collections.abc import Iterator

import httpx
import pydantic
import pytest
from slow_engine import slow_down

from serve.api.asgi import create_app
from serve.api.schemas.chat import ChatRequest
from serve.api.schemas.completions import CompletionRequest
from serve.api.schemas.tokenization import DetokenizeRequest, TokenizeRequest
from serve.engine import Engine, EngineConfig

OK = {"prompt": "the"}


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"": 1}, '""', '"": unknown field'),
        (OK | {"stream_options": {"": 1}}, "stream_options", 'stream_options."": unknown field'),
        ({"prompt": 5}, "prompt", "or a list of lists of token IDs, found 5"),
        ({"prompt": {"text": "a"}}, "prompt", "or a list of lists of token IDs, found an object"),
        ({"prompt": ["a", 1]}, "prompt", "prompt.1: expected a string, found 1"),
        ({"prompt": [1, "a"]}, "prompt", 'prompt.1: expected a token ID, found "a"'),
        ({"prompt": [1.5]}, "prompt", "prompt.0: expected a string, a token ID or a list of token IDs, found 1.5"),
        ({"prompt": [True]}, "prompt", "prompt.0: expected a string, a token ID or a list of token IDs, found true"),
        ({"prompt": [[1], "a"]}, "prompt", 'prompt.1: expected a list of token IDs, found "a"'),
        ({"prompt": [[1], [2.0, None]]}, "prompt", "prompt.1.1: expected a token ID, found null"),
        ({"prompt": [1, 38]}, "prompt", "prompt.1: token ID 38 is out of range for a vocabulary of 38"),
        ({"prompt": [[1, -4]]}, "prompt", "prompt.0.1: token ID -4"),
        (OK | {"max_tokens": -1}, "max_tokens", "at least 0"),
        (OK | {"max_tokens": 1.5}, "max_tokens", "expected a whole number"),
        (OK | {"max_tokens": "5"}, "max_tokens", "expected a whole number"),
        (OK | {"max_tokens": True}, "max_tokens", "expected a whole number"),
        (OK | {"max_tokens": 10**30}, "max_tokens", "the model's context of 512 tokens"),
        (OK | {"max_tokens": 512.0}, "max_tokens", "max_tokens: 512 leaves no room for a prompt"),
        (OK | {"max_tokens": 511}, "prompt", "tokens plus max_tokens 511 is"),
        ({"prompt": ["a", "a" * 600]}, "prompt", "prompt.1: 601 tokens plus max_tokens 16 is 617"),
        ({"prompt": [[1], [1, 38]], "n": 2}, "prompt", "prompt.1.1: token ID 38 is out of range"),
        (OK | {"prompt": "a" * 512, "max_tokens": 1}, "prompt", "the model's context of 512 tokens"),
        ({"prompt": [10**4000]}, "prompt", "is out of range for a vocabulary of 38"),
        (OK | {"temperature": 10**400}, "temperature", "number"),
        (OK | {"temperature": True}, "temperature", "number"),
        (OK | {"top_k": -2}, "top_k", "at least -1"),
        (OK | {"seed": 0.5}, "seed", "expected a whole number"),
        (OK | {"temperature": "hot"}, "temperature", "number"),
        (OK | {"temperature": 2.5}, "temperature", "at most 2"),
        (OK | {"temperature": -0.1}, "temperature", "at least 0"),
        (OK | {"top_p": 1.1}, "top_p", "at most 1"),
        (OK | {"n": 0}, "n", "at least 1"),
        (OK | {"n": 13}, None, "asks for 13 completions, but the server accepts at most 12"),
        ({"prompt": ["a"] * 5, "n": 3}, None, "asks for 15 completions, but the server accepts at most 12"),
        (OK | {"seed": 2**63}, "seed", "at most 9223372036854775807"),
        (OK | {"seed": -(2**63) - 1}, "seed", "at least -9223372036854775808"),
        (OK | {"prompt": [10**300]}, "prompt", "token ID 1" + "0" * 48 + "…" + "0" * 49 + " is out of range"),
        (OK | {"stop": 5}, "stop", "expected a string or a list of strings, found 5"),
        (OK | {"stop": ["a", None]}, "stop", "stop.1: expected a string, found null"),
        (OK | {"stop": ""}, "stop", "stop: expected 1 to 4096 characters, found 0"),
        (OK | {"stop": ["a", ""]}, "stop", "stop.1: expected 1 to 4096 characters, found 0"),
        (OK | {"stop": ["a"] * 17}, "stop", "at most 16 stop strings, found 17"),
        (OK | {"logprobs": 6}, "logprobs", "at most 5"),
        (OK | {"logprobs": True}, "logprobs", "expected a whole number"),
        (OK | {"echo": "yes"}, "echo", "true or false"),
        *(
            (
                OK | {"stream_options": {name: True}},
                "stream_options",
                f"stream_options.{name}: allowed only if stream is true, found true with stream false",
            )
            for name in ("include_usage", "include_obfuscation")
        ),
        (OK | {"stream": True, "stream_options": {"x": 1}}, "stream_options", "stream_options.x: unknown field"),
        (OK | {"suffix": "end"}, "suffix", 'except as "", found "end"'),
        (OK | {"frequency_penalty": 2.5}, "frequency_penalty", "at most 2"),
        (OK | {"presence_penalty": -2.5}, "presence_penalty", "at least -2"),
        (OK | {"repetition_penalty": 0}, "repetition_penalty", "at least 0.01"),
        (OK | {"repetition_penalty": True}, "repetition_penalty", "number"),
        (OK | {"min_p": 1.5}, "min_p", "at most 1"),
        (OK | {"min_p": False}, "min_p", "number"),
        (OK | {"ignore_eos": 0}, "ignore_eos", "true or false"),
        (OK | {"min_tokens": 17}, "min_tokens", "must be at most max_tokens (16), found 17"),
        (
            OK | {"logit_bias": {"38": 1}},
            "logit_bias",
            "logit_bias.38: token ID 38 is out of range for a vocabulary of 38",
        ),
        (OK | {"logit_bias": {"5": 101}}, "logit_bias", "logit_bias.5: expected a number from -100 to 100, found 101"),
        (
            OK | {"logit_bias": {"5": True}},
            "logit_bias",
            "expected a number from -100 to 100, found true",
        ),
        (OK | {"logit_bias": {"05": 1}}, "logit_bias", 'expected token IDs as keys, found "05"'),
        (OK | {"logit_bias": {"-1": 1}}, "logit_bias", 'expected token IDs as keys, found "-1"'),
        (OK | {"logit_bias": [[5, 1]]}, "logit_bias", 'by token ID, such as {"42": -100}, found a list'),
        (OK | {"logit_bias": {str(i): 0 for i in range(1025)}}, "logit_bias", "at most 1024 token IDs, found 1025"),
        (OK | {"stop_token_ids": [5, 38]}, "stop_token_ids", "stop_token_ids.1: token ID 38 is out of range"),
        (OK | {"stop_token_ids": 5}, "stop_token_ids", "expected a list of token IDs, found 5"),
        (OK | {"stop_token_ids": [5] * 1025}, "stop_token_ids", "at most 1024 token IDs, found 1025"),
        (OK | {"stop_token_ids": [*range(38)], "min_tokens": 1}, "stop_token_ids", "found 38 of 38 that end it"),
        (OK | {"best_of": 1, "n": 2}, "best_of", "must be at least n (2), found 1"),
        (OK | {"best_of": 2, "stream": True}, "best_of", "must equal n (1) if stream is true, found 2"),
        (OK | {"best_of": 129}, "best_of", "at most 128"),
        (OK | {"n": 1, "best_of": 13}, None, "asks for 13 completions, but the server accepts at most 12"),
        (OK | {"do_sample": False}, "do_sample", "must be true unless temperature is 0, found false with"),
        (OK | {"max_token": 5}, "max_token", "max_token: unknown field; did you mean 'max_tokens'?"),
        (OK | {"messages": []}, "messages", "messages: unknown field; did you mean 'prompt'?"),
        (OK | {"max_completion_tokens": 5}, "max_completion_tokens", "did you mean 'max_tokens'?"),
        (
            OK | {"stream": True, "stream_options": {"include_use": 1}},
            "stream_options",
            "did you mean 'include_usage'?",
        ),
        ([OK], None, "must be a JSON object, found a list"),
        ("the", None, "must be a JSON object, found a string"),
    ],
)
def test_invalid_values(client, body, param, words) -> None:
    raw = json.dumps(body)
    response = client.post("/v1/completions", content=raw, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert words in error["message"]
    assert "\n" not in error["message"] and "should" not in error["message"]


def test_a_long_field_name_is_quoted_without_its_middle(client) -> None:
    error = client.post("/v1/completions", json=OK | {"x" * 10_000: 1}).json()["error"]
    assert error["message"].endswith("x: unknown field") and len(error["message"]) < 120
    assert len(error["param"]) < 100


@pytest.mark.parametrize(
    ("schema", "body"),
    [
        (CompletionRequest, {f"field{i}": 1 for i in range(1000)}),
        (CompletionRequest, {"stream_options": {f"field{i}": 1 for i in range(1000)}}),
        (CompletionRequest, {"prompt": [0.5] * 1000}),
        (CompletionRequest, {"stop": [0.5] * 1000}),
        (CompletionRequest, {"logit_bias": {f"field{i}": 1 for i in range(1000)}}),
        (CompletionRequest, {"stop_token_ids": [0.5] * 1000}),
        (ChatRequest, {"messages": [{}] * 1000}),
        (ChatRequest, {"messages": [{"role": "user", "content": [5] * 1000}]}),
        (ChatRequest, {"messages": [{"role": "user", "content": ""}], "tools": [5] * 100}),
        (TokenizeRequest, {f"field{i}": 1 for i in range(1000)}),
        (DetokenizeRequest, {"tokens": [0.5] * 1000}),
    ],
)
def test_validation_ends_at_the_first_error_of_many(schema, body) -> None:
    """A list of a million errors would block the server for minutes."""
    with pytest.raises(pydantic.ValidationError) as caught:
        schema.model_validate(body)
    assert caught.value.error_count() <= 2


def test_what_the_client_sent_is_quoted_in_one_short_printable_line(client) -> None:
    error = client.post("/v1/completions", json={"a\n\0b": 5}).json()["error"]
    assert (error["message"], error["param"]) == (r"a\n\x00b: unknown field", r"a\n\x00b")
    error = client.post("/v1/completions", json={"x" * 2000: 5}).json()["error"]
    assert error["message"].startswith("xxx") and error["message"].endswith("xxx: unknown field")
    assert len(error["message"]) < 600 and len(error["param"]) < 600
    for response in (
        client.get(f"/v1/models/{'a' * 50_000}"),
        client.get(f"/{'a' * 50_000}"),
        client.post("/v1/completions", json={"model": "a" * 1_000}),
    ):
        assert response.status_code == 404
        assert len(response.json()["error"]["message"]) < 600


def test_other_errors(client) -> None:
    response = client.post("/v1/completions", json={"prompt": "a", "model": "gpt"})
    assert response.status_code == 404
    assert response.json()["error"] == {
        "message": "model: 'gpt' is not served here, only 'letters' is",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }
    assert client.get("/v1/models/gpt").json()["error"]["code"] == "model_not_found"
    response = client.get("/v1/nothing")
    assert (response.status_code, response.json()["error"]["message"]) == (404, "no route for GET /v1/nothing")
    response = client.post("/detokenize", json={"tokens": [99]})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tokens")
    response = client.post("/tokenize", json={})
    assert (response.status_code, response.json()["error"]["message"]) == (400, "prompt: missing, expected a string")


@pytest.mark.parametrize("streamed", [False, True])
def test_longer_than_the_context(client, streamed) -> None:
    response = client.post("/v1/completions", json={"prompt": [5] * 500, "max_tokens": 13, "stream": streamed})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["message"] == (
        "prompt: 500 tokens plus max_tokens 13 is 513, more than the model's context of 512 tokens"
    )


def test_too_many_prompts_are_refused_before_they_are_encoded(client, letters, monkeypatch) -> None:
    monkeypatch.setattr(type(letters), "encode", lambda *_: pytest.fail("encoded"))
    response = client.post("/v1/completions", json={"prompt": ["a"] * 13})
    assert (response.status_code, "at most 12" in response.json()["error"]["message"]) == (400, True)


def test_body_too_large(client) -> None:
    def pieces() -> Iterator[bytes]:  # without Content-Length, the server counts bytes
        for _ in range(30):
            yield b" " * 1000

    for content in (b" " * 20_001, pieces()):
        response = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        assert response.status_code == 413
        assert response.json()["error"]["message"] == (
            "the request body is larger than the limit of 20000 bytes (max_body_bytes)"
        )


def test_a_full_queue_and_a_timeout(endless_model, letters) -> None:
    async def main() -> None:
        engine = Engine(
            endless_model,
            letters,
            EngineConfig(max_active_requests=1, max_waiting_requests=1, request_timeout_seconds=0.5),
        )
        slow_down(engine)
        transport = httpx.ASGITransport(create_app(engine, "letters"))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            body = {"prompt": "the", "max_tokens": 500, "temperature": 0}
            slow = [
                asyncio.ensure_future(client.post("/v1/completions", json=b)) for b in (body, body | {"stream": True})
            ]
            while engine.unfinished < 2:
                await asyncio.sleep(0.01)
            refused = await client.post("/v1/completions", json=body)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert refused.json()["error"]["code"] == "rate_limit_exceeded"
            assert "max_waiting_requests" in refused.json()["error"]["message"]
            late, late_stream = await asyncio.gather(*slow)
            assert (late.status_code, late.json()["error"]["code"]) == (504, "request_timeout")
            assert "within 0.5 seconds (request_timeout_seconds)" in late.json()["error"]["message"]
            # The stream has already sent status 200, so the error is an event.
            events = late_stream.text.strip().split("\n\n")
            assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "request_timeout"
            assert events[-1] == "data: [DONE]"

    asyncio.run(main())
