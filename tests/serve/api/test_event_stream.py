"""Server-sent events: comments while a stream is silent, and obfuscation."""

import asyncio
import json
import time

import httpx
import pytest
from slow_engine import slow_down

from serve.api.asgi import create_app
from serve.api.config import HttpConfig
from serve.api.event_stream import KEEP_ALIVE
from serve.engine import Engine, EngineConfig


def test_a_long_prompt_sends_comments_and_then_the_same_stream(endless_model, letters, monkeypatch) -> None:
    engine = Engine(endless_model, letters, EngineConfig(prefill_chunk=100))
    step = engine._scheduler.step

    def slow_step(arrivals):
        time.sleep(0.1)  # a longer prompt, or a busy machine
        return step(arrivals)

    async def main() -> list[str]:
        config = HttpConfig(keep_alive_seconds=0.02, stream_interval_seconds=0)
        transport = httpx.ASGITransport(create_app(engine, "letters", config))
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
            texts = []
            for wrapped in (step, slow_step):
                monkeypatch.setattr(engine._scheduler, "step", wrapped)
                body = {"prompt": [5] * 400, "max_tokens": 3, "seed": 1, "stream": True}
                response = await client.post("/v1/completions", json=body)
                assert response.headers["cache-control"] == "no-cache"
                assert response.headers["x-accel-buffering"] == "no"
                texts.append(response.text)
            return texts

    fast, slow = asyncio.run(main())
    assert slow.startswith(KEEP_ALIVE)
    assert slow.count(KEEP_ALIVE) > 4

    def choices(text: str) -> list:
        events = [event for event in text.split("\n\n") if event.startswith("data: {")]
        return [json.loads(event.removeprefix("data: "))["choices"] for event in events]

    assert choices(slow) == choices(fast)
    assert slow.endswith("data: [DONE]\n\n")


def test_a_late_answer_names_the_time_limit_after_the_comments(endless_model, letters) -> None:
    async def main() -> str:
        engine = Engine(endless_model, letters, EngineConfig(request_timeout_seconds=0.3))
        transport = httpx.ASGITransport(create_app(engine, "letters", HttpConfig(keep_alive_seconds=0.05)))
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
            slow_down(engine, 0.1)
            body = {"prompt": [5] * 400, "max_tokens": 100, "stream": True}
            return (await client.post("/v1/completions", json=body)).text

    text = asyncio.run(main())
    assert text.startswith(KEEP_ALIVE)
    error = json.loads(text.strip().split("\n\n")[-2].removeprefix("data: "))["error"]
    assert error["message"] == "the request did not finish within 0.3 seconds (request_timeout_seconds)"


@pytest.mark.parametrize("include", [False, True])
def test_obfuscation_hides_the_length_of_a_chunk(client, include) -> None:
    def chunks(**options) -> list[str]:
        body = {"prompt": "the", "max_tokens": 20, "seed": 1, "stream": True, "stream_options": options}
        response = client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        return response.text.removesuffix("data: [DONE]\n\n").strip().split("\n\n")

    plain, other = chunks(), chunks(include_obfuscation=include)
    texts = [[json.loads(chunk.removeprefix("data: "))["choices"][0]["text"] for chunk in c] for c in (plain, other)]
    assert texts[0] == texts[1]
    assert all(("obfuscation" in chunk) == include for chunk in other)
    if include:
        assert len({len(chunk) for chunk in plain[:-1]}) > 1
        assert len({len(chunk) for chunk in other[:-1]}) == 1
        assert other != chunks(include_obfuscation=True)
