"""Clients of a listening server: the openai package, lm-eval, and raw sockets."""

import asyncio
import json
import re
import shlex
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path

import httpx
import openai
import pytest
from listening_server import Listening, listening

from serve.api.config import HttpConfig
from serve.engine import Engine, EngineConfig

PROMPT = "the other rain"


@pytest.fixture(scope="module", params=["h11", "httptools"])
def server(request, endless_model, letters) -> Iterator[Listening]:
    with listening(Engine(endless_model, letters), request.param) as server:
        yield server


@pytest.fixture(scope="module")
def client(server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1/", api_key="none", max_retries=0) as client:
        yield client


def test_openai_client(client, letters) -> None:
    [card] = client.models.list().data
    assert client.models.retrieve("letters") == card
    ask = dict(model="letters", prompt=PROMPT, max_tokens=20, seed=5, user="me", best_of=1, logit_bias={}, suffix=None)
    whole = client.completions.create(**ask)
    assert whole.usage.prompt_tokens == 1 + len(letters.encode(PROMPT))
    options = {"include_usage": True, "include_obfuscation": True}
    chunks = list(client.completions.create(**ask, stream=True, stream_options=options))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    extra = {"top_k": -1, "repetition_penalty": 1.0, "min_p": 0, "ignore_eos": False, "metadata": {}}
    assert client.completions.create(**ask, extra_body=extra).choices == whole.choices


CHAT = dict(model="letters", messages=[{"role": "user", "content": PROMPT}], max_completion_tokens=20, seed=5)


def test_openai_client_chats(client) -> None:
    whole = client.chat.completions.create(**CHAT, n=2, logprobs=True, top_logprobs=2, user="me", tools=openai.omit)
    [first, second] = whole.choices
    assert first.message.role == "assistant" and first.message.content != second.message.content
    assert len(first.logprobs.content) == 20
    assert whole.usage.prompt_tokens_details.cached_tokens == 0
    chunks = list(client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices) == first.message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == first.finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 20
    text = first.message.content
    # The client accumulates chunks itself, and raises if the answer ends by its length.
    with client.chat.completions.stream(**CHAT, stop=text[10:13]) as events:
        assert events.get_final_completion().choices[0].message.content == text[: text.index(text[10:13])]


def test_openai_client_chats_asynchronously(server) -> None:
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            create = client.chat.completions.create
            whole, other, chunks = await asyncio.gather(
                create(**CHAT), create(**CHAT | {"seed": 6}), create(**CHAT, stream=True)
            )
            text = "".join([choice.delta.content or "" async for chunk in chunks for choice in chunk.choices])
            assert text == whole.choices[0].message.content != other.choices[0].message.content

    asyncio.run(main())


def test_openai_client_sends_the_key(endless_model, letters, tmp_path) -> None:
    (tmp_path / "key").write_text("correct-horse\n")
    config = HttpConfig(api_key_file=str(tmp_path / "key"))
    with listening(Engine(endless_model, letters), config=config) as server:
        for key, fails in (("correct-horse", False), ("wrong-horse", True)):
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
                if fails:
                    with pytest.raises(openai.AuthenticationError, match="wrong API key") as caught:
                        client.chat.completions.create(**CHAT)
                    assert caught.value.code == "invalid_api_key"
                else:
                    assert client.chat.completions.create(**CHAT).choices[0].message.content


def test_openai_client_gets_errors(client, server) -> None:
    with pytest.raises(openai.BadRequestError, match="repeat_penalty: not supported") as caught:
        client.completions.create(model="letters", prompt="a", extra_body={"repeat_penalty": 1.1})
    assert caught.value.param == "repeat_penalty"
    with pytest.raises(openai.NotFoundError, match="no route for POST /v1/embeddings"):
        client.embeddings.create(model="letters", input="a")
    with pytest.raises(openai.BadRequestError, match="messages: expected a list of at least one message"):
        client.chat.completions.create(model="letters", messages=[])
    with pytest.raises(openai.NotFoundError, match="is not served here") as caught:
        client.completions.create(model="gpt-3.5-turbo-instruct", prompt="a")
    assert caught.value.code == "model_not_found"


def post(body: dict, version: str = "1.1", headers: str = "Connection: close\r\n", path: str = "/v1/completions"):
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/{version}\r\nHost: t\r\nContent-Type: application/json\r\n{headers}"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def test_http_1_0(server) -> None:
    def ask(**fields) -> str:
        with socket.create_connection(server.address, timeout=120) as connection:
            connection.sendall(post({"prompt": PROMPT, "max_tokens": 5, "temperature": 0, **fields}, "1.0", ""))
            # uvicorn's httptools implementation sends chunks, which clients of HTTP/1.0 such as nginx understand.
            response = HTTPResponse(connection)
            response.begin()
            assert response.status == 200
            return response.read().decode()

    text = json.loads(ask())["choices"][0]["text"]
    events = ask(stream=True).strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text


def test_bodies_in_chunks_and_expect_continue(server) -> None:
    content = json.dumps({"prompt": "é", "max_tokens": 1}).encode()
    chunks = b"".join(b"1\r\n" + bytes([byte]) + b"\r\n" for byte in content) + b"0\r\n\r\n"
    head = b"POST /v1/completions/ HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nConnection: close\r\n"
    for extra in (b"", b"Expect: 100-continue\r\n"):
        answer = server.send(head + extra + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)
        assert (b" 100 " in answer) == bool(extra)
        assert b"HTTP/1.1 200 OK" in answer


def test_head_leaves_the_connection_usable(server) -> None:
    with httpx.Client(base_url=server.url) as client:
        for _ in range(2):
            head, answer = client.head("/v1/models/"), client.get("/v1/models/")
            assert (head.status_code, head.content) == (200, b"")
            assert head.headers["content-length"] == str(len(answer.content))
        assert client.head("/v1/completions").status_code == 405
        assert client.options("/v1/completions").headers["allow"] == "OPTIONS, POST"
        assert client.get("/" + "a" * 20_000, headers={"x-long": "x" * 20_000}).status_code == 404


def test_a_silent_stream_sends_bytes_before_the_first_token(server, monkeypatch) -> None:
    slow_down(server.engine, monkeypatch, seconds=3)
    body = {"prompt": [5] * 400, "max_tokens": 1, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=None) as response:
        assert next(response.iter_raw()) == b": keep-alive\n\n"


def slow_down(engine: Engine, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let every step take ``seconds``, as if the prompt were long."""
    step = engine._scheduler.step
    monkeypatch.setattr(engine._scheduler, "step", lambda arrivals: (time.sleep(seconds), step(arrivals))[1])


@pytest.mark.parametrize("http", ["h11", "httptools"])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_leaves_before_the_first_byte_frees_its_place(
    endless_model, letters, monkeypatch, http, streamed
) -> None:
    engine = Engine(endless_model, letters, EngineConfig(prefill_chunk=1, max_active_requests=1))
    slow_down(engine, monkeypatch, seconds=0.05)  # 400 steps without a byte
    with listening(engine, http, HttpConfig(keep_alive_seconds=100)) as server:
        body = {"prompt": [5] * 400, "max_tokens": 1, "stream": streamed}
        connections = [socket.create_connection(server.address) for _ in range(2)]  # one runs, one waits
        for connection in connections:
            connection.sendall(post(body))
        wait_for(lambda: engine.unfinished == 2)
        for connection in connections:
            connection.close()
        wait_for(lambda: engine.unfinished == 0)


def wait_for(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("batch_size", [1, 128])
def test_lm_eval_with_a_hundred_clients_waits_instead_of_failing(endless_model, letters, batch_size) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    words = ["in", "the", "other", "rain", "at", "an", "hen"]
    pairs = [(words[i % 7], " ".join(words[j % 7] for j in range(i % 5, i % 5 + 3))) for i in range(150)]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    with listening(Engine(endless_model, letters)) as server:
        most = 0

        def watch() -> None:
            nonlocal most
            while not done.wait(0.005):
                most = max(most, server.engine.unfinished)

        done = threading.Event()
        watcher = threading.Thread(target=watch)
        watcher.start()
        settings = {"base_url": f"{server.url}/v1/completions", "model": "letters", "max_length": 512}
        try:
            # Without retries, a single refusal would end the evaluation.
            many = LocalCompletionsAPI(**settings, num_concurrent=100, batch_size=batch_size, max_retries=1)
            scores = many.loglikelihood(requests)
        finally:
            done.set()
            watcher.join()
        assert most > 80  # more than may run, so the others waited
        one = LocalCompletionsAPI(**settings).loglikelihood(requests[:10])
    assert [score for score, _ in scores[:10]] == pytest.approx([score for score, _ in one], abs=1e-3)


def test_curl_as_in_the_documentation(server) -> None:
    """The commands of docs/serving.md, at another address."""
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    blocks = re.findall(r"```\n(curl .*?)```", text, re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        command = block.replace("http://127.0.0.1:8000", server.url).replace("\\\n", " ")
        answer = subprocess.run(shlex.split(command), capture_output=True, text=True, check=True).stdout
        if "-N" in shlex.split(command):
            assert answer.endswith("data: [DONE]\n\n") and '"error"' not in answer
        else:
            assert "error" not in json.loads(answer)


def test_the_openai_client_completes_asynchronously_and_streams(server) -> None:
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            ask = dict(model="letters", prompt=[PROMPT, "in"], max_tokens=10, seed=5)
            whole = await client.completions.create(**ask)
            texts = ["", ""]
            async for chunk in await client.completions.create(**ask, stream=True):
                for choice in chunk.choices:
                    texts[choice.index] += choice.text
            assert texts == [choice.text for choice in whole.choices]
            stream = await client.completions.create(**ask | {"max_tokens": 400}, stream=True)
            await anext(aiter(stream))
            await stream.close()  # cancels the rest
            while server.engine.unfinished:
                await asyncio.sleep(0.01)

    asyncio.run(main())
