"""The completions route with a real engine, in OpenAI's response format."""

import asyncio
import json
import statistics
from collections.abc import Iterator

import httpx
import pytest
import torch
from fastapi.testclient import TestClient
from slow_engine import slow_down
from tokenizer_files import byte_level as byte_level_content
from tokenizer_files import unigram, write_files

from model.tokenizer import load_tokenizer
from serve.api.asgi import create_app
from serve.api.config import HttpConfig
from serve.engine import Engine

CONFIG = HttpConfig(max_body_bytes=20_000, keep_alive_seconds=60, stream_interval_seconds=0)

TEXT = "the other rain "


@pytest.fixture(scope="module")
def level_client(byte_level, random_model_of) -> Iterator[TestClient]:
    model = random_model_of(byte_level.vocab_size)
    with TestClient(create_app(Engine(model, byte_level), "level", CONFIG)) as client:
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


def test_best_of_returns_the_most_likely_completions_first(client) -> None:
    def mean(choice: dict) -> float:
        return statistics.mean(choice["logprobs"]["token_logprobs"])

    body = {"prompt": [TEXT, "in"], "seed": 5, "max_tokens": 6, "logprobs": 0, "temperature": 1.5}
    every = ask(client, **body, n=4)
    best = ask(client, **body, n=2, best_of=4)
    want = [c for start in (0, 4) for c in sorted(every["choices"][start : start + 4], key=mean, reverse=True)[:2]]
    assert [choice["text"] for choice in best["choices"]] == [choice["text"] for choice in want]
    assert [choice["text"] for choice in want] != [every["choices"][i]["text"] for i in (0, 1, 4, 5)]
    assert [choice["index"] for choice in best["choices"]] == [0, 1, 2, 3]
    assert best["usage"] == every["usage"]
    assert best["usage"]["completion_tokens"] == 8 * 6
    plain = ask(client, **body | {"logprobs": None}, n=2, best_of=4)
    assert [choice["text"] for choice in plain["choices"]] == [choice["text"] for choice in want]
    assert all(choice["logprobs"] is None for choice in plain["choices"])
    echoed = ask(client, **body | {"logprobs": None, "max_tokens": 0}, best_of=2, echo=True)
    assert [choice["text"] for choice in echoed["choices"]] == [TEXT, "in"]


def test_cached_tokens_are_those_of_an_earlier_prompt(client) -> None:
    prompt = [7, 9, *[11] * 150]
    first = ask(client, prompt=prompt)["usage"]
    again = ask(client, prompt=prompt)["usage"]
    assert first["prompt_tokens_details"] == {"cached_tokens": 0}
    assert again["prompt_tokens_details"] == {"cached_tokens": 128}  # whole pages of 64 tokens
    both = ask(client, prompt=[prompt, prompt], n=2)["usage"]
    assert both["prompt_tokens_details"] == {"cached_tokens": 2 * 128}
    assert both["prompt_tokens"] == 2 * again["prompt_tokens"]
    chunks = stream(client, prompt=prompt, stream_options={"include_usage": True})
    assert chunks[-1]["usage"] == again


def test_sampling_fields_change_the_text(client, letters) -> None:
    token = letters.encode("z")[0]
    biased = ask(client, prompt=TEXT, logit_bias={str(token): 100}, temperature=0)
    assert biased["choices"][0]["text"] == "z" * 12
    stopped = ask(client, prompt=TEXT, logit_bias={str(token): 100}, stop_token_ids=[token], temperature=0)
    assert (stopped["choices"][0]["finish_reason"], stopped["usage"]["completion_tokens"]) == ("stop", 1)
    late = ask(client, prompt=TEXT, logit_bias={str(token): 100}, stop_token_ids=[token], temperature=0, min_tokens=3)
    assert (late["choices"][0]["finish_reason"], late["usage"]["completion_tokens"]) == ("stop", 4)
    eos = {str(letters.eos_id): 100}
    assert ask(client, prompt=TEXT, logit_bias=eos)["usage"]["completion_tokens"] == 1
    assert ask(client, prompt=TEXT, logit_bias=eos, ignore_eos=True)["usage"]["completion_tokens"] == 12
    varied = ask(client, prompt=TEXT, logit_bias={str(token): 100}, frequency_penalty=2, temperature=0, max_tokens=100)
    assert set(varied["choices"][0]["text"]) > {"z"}


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


def test_echo_lists_bos_as_a_token_but_not_in_the_text(client, letters) -> None:
    choice = ask(client, prompt="the", echo=True, logprobs=1, max_tokens=0)["choices"][0]
    assert choice["text"] == "the"
    assert choice["logprobs"]["tokens"][0] == letters.bos_token
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert choice["logprobs"]["token_logprobs"][1] < 0


@pytest.mark.parametrize("kind", ["byte", "level"])
@pytest.mark.parametrize("max_tokens", [0, 1, 8])
def test_echo_of_a_prompt_cut_inside_a_character(byte_client, level_client, byte_tokenizer, kind, max_tokens) -> None:
    client = byte_client if kind == "byte" else level_client
    whole, names = byte_tokenizer.encode("ab€𝄞é"), {"<s>": 0, "</s>": 1}
    names |= {byte_tokenizer.bos_token: 0, byte_tokenizer.eos_token: 1}
    for cut in range(1, len(whole) + 1):
        body = {"prompt": whole[:cut], "echo": True, "logprobs": 0, "max_tokens": max_tokens, "seed": cut}
        choice = ask(client, **body)["choices"][0]
        tokens = choice["logprobs"]["tokens"]
        ids = [int(t[9:]) if t.startswith("token_id:") else names.get(t, byte_tokenizer.encode(t)[0]) for t in tokens]
        assert ids[:cut] == whole[:cut]
        assert choice["text"] == byte_tokenizer.decode(ids)
        assert "".join(chunk["choices"][0]["text"] for chunk in stream(client, **body)) == choice["text"]
        offsets = choice["logprobs"]["text_offset"]
        assert offsets == sorted(offsets) and max(offsets) <= len(choice["text"])


def test_logprobs_show_the_space_in_front_of_a_token(byte_model, tmp_path) -> None:
    content = unigram("abc")
    content["model"]["vocab"].append(["▁a", -1.0])
    tokenizer = load_tokenizer(write_files(tmp_path, content))
    with TestClient(create_app(Engine(byte_model, tokenizer), "abc", CONFIG)) as client:
        choice = ask(client, prompt="b a", echo=True, logprobs=0, max_tokens=0)["choices"][0]
    assert choice["text"] == "b a"
    assert choice["logprobs"]["tokens"] == ["<s>", " ", "b", " a"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 0, 1]


def test_special_tokens_in_a_prompt_are_text_unless_asked(level_client) -> None:
    def count(**body) -> int:
        return ask(level_client, max_tokens=1, **body)["usage"]["prompt_tokens"]

    text = "<s>a<|im_end|>"
    assert count(prompt=text) == 1 + len(text)
    assert count(prompt=text, parse_special=True) == 3  # its BOS is not doubled
    assert count(prompt="a<|im_end|>", parse_special=True) == 3
    body = {"prompt": text, "add_special_tokens": False}
    assert level_client.post("/tokenize", json=body).json()["count"] == len(text)
    parsed = level_client.post("/tokenize", json={**body, "parse_special": True}).json()["tokens"]
    assert parsed == [0, ord("a") + 2, 258]


@pytest.mark.parametrize(
    ("text", "tokens", "offsets"),
    [
        ("<s>a", ["<s>", "a"], [0, 3]),
        ("a<|im_end|>b", ["<s>", "a", "token_id:258", "b"], [0, 0, 1, 11]),
        ("<|im_end|><|im_end|>a", ["<s>", "token_id:258", "token_id:258", "a"], [0, 0, 10, 20]),
    ],
)
def test_offsets_count_the_spellings_of_special_tokens_in_a_parsed_prompt(level_client, text, tokens, offsets) -> None:
    body = {"prompt": text, "echo": True, "logprobs": 0, "parse_special": True, "max_tokens": 0}
    choice = ask(level_client, **body)["choices"][0]
    assert choice["text"] == text
    assert choice["logprobs"]["tokens"] == tokens
    assert choice["logprobs"]["text_offset"] == offsets
    for token, offset in zip(tokens[1:], offsets[1:]):
        assert token.startswith("token_id") or text[offset : offset + len(token)] == token


def test_a_prompt_that_the_tokenizer_cannot_encode_is_refused(byte_model, tmp_path) -> None:
    tokenizer = load_tokenizer(write_files(tmp_path, unigram("abc", unknown=False)))
    with TestClient(create_app(Engine(byte_model, tokenizer), "abc", CONFIG)) as client:
        for prompt, name in (("abcd", "prompt"), (["a", "abcd"], "prompt.1")):
            response = client.post("/v1/completions", json={"prompt": prompt})
            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (400, "prompt")
            assert error["message"].startswith(f"{name}: ") and "cannot encode 'd'" in error["message"]


def test_offsets_of_a_prompt_that_decodes_to_more_text(byte_model, tmp_path) -> None:
    content = {**byte_level_content(), "normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaa"}}
    tokenizer = load_tokenizer(write_files(tmp_path, content))
    with TestClient(create_app(Engine(byte_model, tokenizer), "abc", CONFIG)) as client:
        choice = ask(client, prompt="ab", echo=True, logprobs=0, max_tokens=2)["choices"][0]
    assert choice["text"].startswith("ab")
    assert choice["logprobs"]["text_offset"][:7] == [0, 0, 1, 2, 2, 2, 2]


def test_logprobs_of_bytes_have_distinct_strings(byte_client) -> None:
    choice = ask(byte_client, prompt="€ß", echo=True, logprobs=5, max_tokens=4)["choices"][0]
    assert choice["logprobs"]["tokens"][1:4] == [f"token_id:{byte + 2}" for byte in "€".encode()]
    assert all(len(top) in (5, 6) for top in choice["logprobs"]["top_logprobs"][1:])


@pytest.mark.parametrize("streamed", [False, True])
def test_a_disconnect_aborts_the_request(endless_model, letters, streamed) -> None:
    async def main() -> None:
        engine = Engine(endless_model, letters)
        slow_down(engine)
        app = create_app(engine, "letters")
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
        await answer
        while engine.unfinished:
            await asyncio.sleep(0.01)
        assert b"[DONE]" not in b"".join(message.get("body", b"") for message in sent)

    asyncio.run(main())


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_a_disconnect_within_the_body_ends_the_request(letters_model, letters, encoding) -> None:
    async def main() -> None:
        app = create_app(Engine(letters_model, letters), "letters")
        messages = [
            {"type": "http.disconnect"},
            {"type": "http.request", "body": b'{"prompt"', "more_body": True},
        ]
        sent = []

        async def receive() -> dict:
            return messages.pop()

        async def send(message: dict) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json"), (b"content-encoding", encoding.encode())]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}
        await app(scope, receive, send)
        assert sent[0]["status"] == 499

    asyncio.run(main())


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
def test_a_stream_ends_quietly_if_sending_fails(endless_model, letters, spec_version) -> None:
    """From version 2.4 of ASGI on, a server reports a disconnect by an OSError of ``send``."""

    async def main() -> None:
        engine = Engine(endless_model, letters)
        app = create_app(engine, "letters")
        body = json.dumps({"prompt": "the", "max_tokens": 400, "stream": True}).encode()
        messages = [{"type": "http.disconnect"}, {"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict:
            if len(messages) == 1:
                await asyncio.sleep(0.2 if spec_version == "2.3" else 3600)
            return messages.pop()

        async def send(message: dict) -> None:
            if message["type"] == "http.response.body" and spec_version == "2.4":
                raise OSError("closed")

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}
        await app(scope | {"asgi": {"spec_version": spec_version}}, receive, send)
        while engine.unfinished:
            await asyncio.sleep(0.01)

    asyncio.run(main())


def test_long_prompts_are_encoded_and_echoed_off_the_event_loop(
    client, letters, lengths_on_event_loop, monkeypatch
) -> None:
    monkeypatch.setattr("serve.api.completions._LARGE_PROMPT", 100)
    text = "the rain in " * 20
    for prompt in (text, letters.encode(text)):
        assert ask(client, prompt=prompt, echo=True, max_tokens=0)["choices"][0]["text"] == text
    assert max(lengths_on_event_loop, default=0) < 100


def test_the_model_does_not_block_the_event_loop(endless_model, letters) -> None:
    async def main() -> None:
        engine = Engine(endless_model, letters)
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(create_app(engine, "letters")), base_url="http://t"
        ) as client:
            ask = asyncio.ensure_future(client.post("/v1/completions", json={"prompt": [5] * 400, "max_tokens": 1}))
            turns = 0
            while not ask.done():
                await asyncio.sleep(0)
                turns += engine.unfinished  # the request takes a single step
            assert (await ask).status_code == 200
            assert turns > 50

    asyncio.run(main())
