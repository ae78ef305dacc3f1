"""The HTTP API with a real engine: OpenAI's response format, and errors for invalid requests."""

import asyncio
import json
from collections.abc import Iterator

import httpx
import pytest
import torch
from fastapi.testclient import TestClient

from serve.api.asgi import create_app
from serve.engine import Engine, EngineConfig

TEXT = "the other rain "
MAX_BODY_BYTES = 20_000


@pytest.fixture(scope="module")
def client(endless_model, letters) -> Iterator[TestClient]:
    engine = Engine(
        endless_model, letters, EngineConfig(max_active_requests=4, max_waiting_requests=8, prefill_chunk=32)
    )
    with TestClient(create_app(engine, "letters", MAX_BODY_BYTES), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def byte_client(byte_model, byte_tokenizer) -> Iterator[TestClient]:
    with TestClient(create_app(Engine(byte_model, byte_tokenizer), "bytes", MAX_BODY_BYTES)) as client:
        yield client


def ask(client: TestClient, **body) -> dict:
    response = client.post("/v1/completions", json={"max_tokens": 12, "seed": 3, **body})
    assert response.status_code == 200, response.text
    return response.json()


def stream(client: TestClient, **body) -> list[dict]:
    response = client.post("/v1/completions", json={"max_tokens": 12, "seed": 3, "stream": True, **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events.pop() == ""
    assert events.pop() == "data: [DONE]"
    assert all(event.startswith("data: {") for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_completion_fields(client, letters) -> None:
    answer = ask(client, prompt=TEXT, model="letters", user="someone")
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert answer["model"] == "letters"
    assert isinstance(answer["created"], int)
    [choice] = answer["choices"]
    assert set(choice) == {"index", "text", "logprobs", "finish_reason"}
    assert (choice["index"], choice["logprobs"]) == (0, None)
    prompt_tokens = 1 + len(letters.encode(TEXT))
    assert answer["usage"]["prompt_tokens"] == prompt_tokens
    assert answer["usage"]["total_tokens"] == prompt_tokens + answer["usage"]["completion_tokens"]
    assert answer["fiftyfold"]["cache_nbytes"] > 0


def test_prompt_forms(client, letters) -> None:
    tokens = letters.encode(TEXT)
    text = ask(client, prompt=TEXT)["choices"][0]["text"]
    assert ask(client, prompt=[TEXT])["choices"][0]["text"] == text
    # Text is encoded with BOS in front; token IDs are used unchanged.
    assert ask(client, prompt=[letters.bos_id, *tokens])["choices"][0]["text"] == text
    assert ask(client, prompt=tokens)["usage"]["prompt_tokens"] == len(tokens)
    answer = ask(client, prompt=[[letters.bos_id, *tokens], tokens[:3]])
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["choices"][0]["text"] == text
    assert answer["usage"]["prompt_tokens"] == 1 + len(tokens) + 3


@pytest.mark.parametrize("prompt", ["", [], [[]], [""], None])
def test_empty_prompts_start_from_bos(client, letters, prompt) -> None:
    answer = ask(client, prompt=prompt)
    assert answer["usage"]["prompt_tokens"] == 1
    assert answer["choices"][0]["text"] == ask(client, prompt=[letters.bos_id])["choices"][0]["text"]


def test_prompt_may_be_omitted(client) -> None:
    assert ask(client)["choices"] == ask(client, prompt="")["choices"]


def test_n_completions_per_prompt_in_order(client) -> None:
    answer = ask(client, prompt=[TEXT, "in"], n=2, seed=5)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts[0] == ask(client, prompt=TEXT, seed=5)["choices"][0]["text"]
    assert texts[1] == ask(client, prompt=TEXT, seed=6)["choices"][0]["text"]
    assert texts[3] == ask(client, prompt="in", seed=6)["choices"][0]["text"]
    assert len(set(texts)) == 4
    single = ask(client, prompt=TEXT)["fiftyfold"]["cache_nbytes"]
    assert answer["fiftyfold"]["cache_nbytes"] > 3 * single


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": TEXT},
        {"prompt": [TEXT, "an"], "n": 2, "max_tokens": 5},
        {"prompt": TEXT, "echo": True, "logprobs": 2},
        {"prompt": "", "logprobs": 0, "temperature": 0},
        {"prompt": TEXT, "max_tokens": 0, "echo": True, "logprobs": 1},
    ],
)
def test_stream_concatenates_to_the_response(client, body) -> None:
    whole = ask(client, **body)
    chunks = stream(client, **body)
    assert len({chunk["id"] for chunk in chunks}) == 1
    for choice in whole["choices"]:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [choice["finish_reason"]]
        if choice["logprobs"] is None:
            assert all(part["logprobs"] is None for part in parts)
        else:
            for key, values in choice["logprobs"].items():
                assert [value for part in parts for value in part["logprobs"][key]] == values
    assert not any("usage" in chunk for chunk in chunks)
    assert [chunk.get("fiftyfold") for chunk in chunks] == [None] * (len(chunks) - 1) + [whole["fiftyfold"]]


def test_stream_of_bytes_concatenates_to_the_response(byte_client) -> None:
    body = {"prompt": "€", "max_tokens": 60, "temperature": 1.3}
    # Random weights may generate EOS at once: use the seed with the longest text.
    lengths = {seed: ask(byte_client, **body, seed=seed)["usage"]["completion_tokens"] for seed in range(8)}
    body["seed"] = max(lengths, key=lambda seed: lengths[seed])
    chunks = stream(byte_client, **body)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == ask(byte_client, **body)["choices"][0]["text"]
    assert len(chunks) > 10


def test_usage_in_a_stream(client) -> None:
    chunks = stream(client, prompt=TEXT, stream_options={"include_usage": True})
    whole = ask(client, prompt=TEXT)
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    assert chunks[-1]["fiftyfold"] == whole["fiftyfold"]


def test_stop(client) -> None:
    whole = ask(client, prompt=TEXT, temperature=0)["choices"][0]["text"]
    stop = whole[5:8]
    for value in (stop, ["!", stop]):
        answer = ask(client, prompt=TEXT, temperature=0, stop=value)["choices"][0]
        assert answer["text"] == whole[: whole.index(stop)]
        assert answer["finish_reason"] == "stop"


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_with_logprobs_scores_the_prompt(client, letters, endless_model, max_tokens) -> None:
    """The request that lm-eval's local-completions sends to score text."""
    prompt = letters.encode(TEXT * 5)
    answer = ask(client, prompt=[prompt], echo=True, logprobs=1, max_tokens=max_tokens, temperature=0)
    choice = answer["choices"][0]
    logprobs = choice["logprobs"]
    assert choice["text"].startswith(TEXT * 5)
    assert {len(values) for values in logprobs.values()} == {len(prompt) + max_tokens}
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    with torch.inference_mode():
        want = endless_model(torch.tensor([prompt]))[0].log_softmax(dim=-1)
    for i in range(1, len(prompt)):
        assert logprobs["token_logprobs"][i] == pytest.approx(want[i - 1, prompt[i]].item(), abs=1e-3)
        # lm-eval detects a greedy match by exact equality with the largest alternative.
        greedy = logprobs["token_logprobs"][i] == max(logprobs["top_logprobs"][i].values())
        assert greedy == (want[i - 1].argmax().item() == prompt[i])
        offset = logprobs["text_offset"][i]
        token = logprobs["tokens"][i]
        assert choice["text"][offset : offset + len(token)] == token


def test_echo_lists_bos_as_a_token_but_not_in_the_text(client) -> None:
    choice = ask(client, prompt="the", echo=True, logprobs=1, max_tokens=0)["choices"][0]
    assert choice["text"] == "the"
    assert choice["logprobs"]["tokens"][0] == "<|bos|>"
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert choice["logprobs"]["token_logprobs"][1] < 0


def test_logprobs_of_bytes_have_distinct_strings(byte_client) -> None:
    choice = ask(byte_client, prompt="€ß", echo=True, logprobs=5, max_tokens=4)["choices"][0]
    assert choice["logprobs"]["tokens"][1:4] == [f"token_id:{byte + 2}" for byte in "€".encode()]
    assert all(len(top) in (5, 6) for top in choice["logprobs"]["top_logprobs"][1:])


def test_models(client, letters_model) -> None:
    listing = client.get("/v1/models").json()
    assert listing["object"] == "list"
    [card] = listing["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("letters", "model", 512)
    assert 0 < card["cache_bytes_per_token"] < 500
    assert client.get("/v1/models/letters").json() == card


def test_openapi_schema(client) -> None:
    schema = client.get("/openapi.json").json()
    fields = schema["components"]["schemas"]["CompletionRequest"]["properties"]
    assert {"prompt", "max_tokens", "stream", "echo", "logprobs"} <= set(fields)
    assert len(fields["prompt"]["anyOf"]) == 5


def test_healthz(client) -> None:
    response = client.get("/healthz")
    assert (response.status_code, response.json()["status"]) == (200, "ok")


def test_healthz_of_a_stopped_engine(letters_model, letters) -> None:
    engine = Engine(letters_model, letters)
    asyncio.run(engine.stop())
    with TestClient(create_app(engine, "letters", MAX_BODY_BYTES)) as client:
        assert client.get("/healthz").status_code == 503
        assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 500


def test_tokenizer_routes(client, letters) -> None:
    info = client.get("/tokenizer_info").json()
    for name, token in (("bos_token", letters.bos_id), ("eos_token", letters.eos_id)):
        body = {"prompt": info[name], "add_special_tokens": False}
        assert client.post("/tokenize", json=body).json()["tokens"] == [token]
    tokens = client.post("/tokenize", json={"prompt": TEXT}).json()["tokens"]
    assert tokens == [letters.bos_id, *letters.encode(TEXT)]
    assert client.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": TEXT}


OK = {"prompt": "the"}


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"prompt": 5}, "prompt", "expected a string, a list of strings"),
        ({"prompt": ["a", 1]}, "prompt", "expected a string"),
        ({"prompt": [1.5]}, "prompt", "expected a string"),
        ({"prompt": [True]}, "prompt", "expected a string"),
        ({"prompt": [[1], "a"]}, "prompt", "expected a string"),
        ({"prompt": {"text": "a"}}, "prompt", "expected a string"),
        ({"prompt": "\ud800"}, "prompt", "unpaired surrogate"),
        ({"prompt": [1, 38]}, "prompt", "token ID 38 is out of range for a vocabulary of 38"),
        ({"prompt": [-1]}, "prompt", "token ID -1"),
        (OK | {"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        (OK | {"max_tokens": 1.5}, "max_tokens", "integer"),
        (OK | {"max_tokens": "5"}, "max_tokens", "integer"),
        (OK | {"max_tokens": True}, "max_tokens", "integer"),
        (OK | {"max_tokens": 10**30}, "prompt", "the model's context of 512 tokens"),
        (OK | {"temperature": "hot"}, "temperature", "number"),
        (OK | {"temperature": 2.5}, "temperature", "less than or equal to 2"),
        (OK | {"temperature": -0.1}, "temperature", "greater than or equal to 0"),
        (OK | {"top_p": 1.1}, "top_p", "less than or equal to 1"),
        (OK | {"n": 0}, "n", "greater than or equal to 1"),
        (OK | {"n": 13}, None, "asks for 13 completions, but the server accepts at most 12"),
        (OK | {"seed": 2**63}, "seed", "less than"),
        (OK | {"stop": 5}, "stop", "expected a string or a list of strings"),
        (OK | {"stop": ""}, "stop", "empty stop string"),
        (OK | {"stop": ["a"] * 17}, "stop", "at most 16 stop strings, found 17"),
        (OK | {"logprobs": 6}, "logprobs", "less than or equal to 5"),
        (OK | {"logprobs": True}, "logprobs", "integer"),
        (OK | {"echo": "yes"}, "echo", "boolean"),
        (OK | {"stream_options": {"include_usage": True}}, "stream_options", "allowed only if stream is true"),
        (OK | {"stream": True, "stream_options": {"x": 1}}, "stream_options", "stream_options.x: unknown field"),
        (OK | {"suffix": "end"}, "suffix", "not supported"),
        (OK | {"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
        (OK | {"presence_penalty": 0.5}, "presence_penalty", "not supported"),
        (OK | {"logit_bias": {"5": 1.0}}, "logit_bias", "not supported"),
        (OK | {"best_of": 3}, "best_of", "not supported"),
        (OK | {"max_token": 5}, "max_token", "unknown field"),
        ([OK], None, "must be a JSON object"),
        ("the", None, "must be a JSON object"),
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
    assert "\n" not in error["message"]


def test_neutral_values_are_accepted(client) -> None:
    neutral = {"best_of": 1, "suffix": "", "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}}
    nulls = {
        "max_tokens": None,
        "temperature": None,
        "top_p": None,
        "n": None,
        "stop": None,
        "echo": None,
        "stream": None,
    }
    assert ask(client, **OK, **neutral)["choices"] == ask(client, **OK)["choices"]
    assert ask(client, **OK, **nulls)["choices"] == ask(client, **OK, max_tokens=16)["choices"]


@pytest.mark.parametrize(
    ("content", "headers", "words"),
    [
        (b'{"prompt": "a",', {"content-type": "application/json"}, "not valid JSON"),
        (b"", {"content-type": "application/json"}, "must be a JSON object"),
        (b'{"prompt": "a"}', {"content-type": "text/plain"}, "Content-Type: application/json"),
        (b'{"prompt": "\xff"}', {"content-type": "application/json"}, "body"),
        (b'{"prompt": "a", "temperature": NaN}', {"content-type": "application/json"}, "temperature"),
        (b"[" * 19_000, {"content-type": "application/json"}, "body"),
    ],
)
def test_malformed_bodies(client, content, headers, words) -> None:
    response = client.post("/v1/completions", content=content, headers=headers)
    assert response.status_code == 400, response.text
    assert words in response.json()["error"]["message"]


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
    response = client.get("/v1/completions")
    assert response.status_code == 405
    assert "does not accept GET" in response.json()["error"]["message"]
    response = client.post("/detokenize", json={"tokens": [99]})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tokens")
    response = client.post("/tokenize", json={})
    assert (response.status_code, response.json()["error"]["message"]) == (400, "prompt: missing")


@pytest.mark.parametrize("streamed", [False, True])
def test_longer_than_the_context(client, streamed) -> None:
    response = client.post("/v1/completions", json={"prompt": [5] * 500, "max_tokens": 13, "stream": streamed})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["message"] == (
        "prompt: 500 tokens plus max_tokens 13 is 513, more than the model's context of 512 tokens"
    )


def test_body_too_large(client) -> None:
    def pieces() -> Iterator[bytes]:  # without Content-Length, the server counts bytes
        for _ in range(30):
            yield b" " * 1000

    for content in (b" " * 20_001, pieces()):
        response = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        assert response.status_code == 413
        assert response.json()["error"]["message"] == "the request body is larger than the limit of 20000 bytes"


def test_a_full_queue_and_a_timeout(endless_model, letters) -> None:
    async def main() -> None:
        engine = Engine(
            endless_model,
            letters,
            EngineConfig(max_active_requests=1, max_waiting_requests=1, request_timeout_seconds=0.5),
        )
        transport = httpx.ASGITransport(create_app(engine, "letters", MAX_BODY_BYTES))
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
            late, late_stream = await asyncio.gather(*slow)
            assert (late.status_code, late.json()["error"]["code"]) == (504, "request_timeout")
            # The stream has already sent status 200, so the error is an event.
            events = late_stream.text.strip().split("\n\n")
            assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "request_timeout"
            assert events[-1] == "data: [DONE]"

    asyncio.run(main())


@pytest.mark.parametrize("streamed", [False, True])
def test_a_disconnect_aborts_the_request(endless_model, letters, streamed) -> None:
    async def main() -> None:
        engine = Engine(endless_model, letters)
        app = create_app(engine, "letters", MAX_BODY_BYTES)
        body = json.dumps({"prompt": "the", "max_tokens": 500, "temperature": 0, "stream": streamed}).encode()
        disconnected = asyncio.Event()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict:
            if messages:
                return messages.pop()
            await disconnected.wait()
            return {"type": "http.disconnect"}

        sent = []

        async def send(message: dict) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}
        answer = asyncio.ensure_future(app(scope, receive, send))
        while not engine.unfinished:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        disconnected.set()
        await asyncio.wait_for(answer, 5)
        for _ in range(100):
            if not engine.unfinished:
                break
            await asyncio.sleep(0.01)
        assert engine.unfinished == 0
        assert b"[DONE]" not in b"".join(message.get("body", b"") for message in sent)

    asyncio.run(main())


def test_the_model_does_not_block_the_event_loop(endless_model, letters) -> None:
    async def main() -> None:
        engine = Engine(endless_model, letters)
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(create_app(engine, "letters", MAX_BODY_BYTES)), base_url="http://t"
        ) as client:
            ask = asyncio.ensure_future(client.post("/v1/completions", json={"prompt": [5] * 400, "max_tokens": 1}))
            turns = 0
            while not ask.done():
                await asyncio.sleep(0)
                turns += engine.unfinished  # the request takes a single step
            assert (await ask).status_code == 200
            assert turns > 50

    asyncio.run(main())
