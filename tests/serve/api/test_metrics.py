"""Prometheus metrics of requests and of the engine."""

import asyncio

import httpx
import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from serve.api.asgi import create_app
from serve.api.cache import CacheReporter
from serve.api.metrics import Metrics
from serve.engine import Delta, Engine, EngineConfig, EngineError, RequestAbortedError, SamplingParams
from serve.engine.sequence import Sequence


def parse(text: str) -> dict:
    """Return values by sample name and label values."""
    return {
        (sample.name.removeprefix("fiftyfold_"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def served(endless_model, letters):
    with TestClient(create_app(Engine(endless_model, letters, EngineConfig(prefill_chunk=64)), "letters")) as client:
        yield client


def test_requests_and_tokens_are_counted(served) -> None:
    answer = served.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert parse(answer.text)["generated_tokens_total",] == 0
    prompt = [5] * 200
    served.post("/v1/completions", json={"prompt": prompt, "max_tokens": 9, "n": 2, "temperature": 0})
    served.post("/v1/completions", json={"prompt": prompt, "max_tokens": 3, "stream": True})
    served.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}], "max_tokens": 1})
    stop = served.post("/v1/completions", json={"prompt": "a", "max_tokens": 90, "stop_token_ids": [*range(38)]})
    served.post("/v1/completions", json={"prompt": 5})
    served.get("/nowhere")
    served.get("/v1/models/letters")
    found = parse(served.get("/metrics").text)
    assert stop.json()["choices"][0]["finish_reason"] == "stop"
    assert found["requests_total", "/v1/completions", "200"] == 3
    assert found["requests_total", "/v1/completions", "400"] == 1
    assert found["requests_total", "/v1/chat/completions", "200"] == 1
    assert found["requests_total", "/v1/models/{name:path}", "200"] == 1
    assert found["requests_total", "other", "404"] == 1
    assert found["completions_total", "length"] == 4
    assert found["completions_total", "stop"] == 1
    assert found["generated_tokens_total",] == 2 * 9 + 3 + 1 + 1
    chat_tokens = found["prompt_tokens_total",] - 3 * 200 - 2
    assert chat_tokens > 3
    assert found["prefix_hit_tokens_total",] == found["prompt_tokens_total",] - found["prefill_tokens_total",] > 0
    assert found["time_to_first_token_seconds_count",] == found["end_to_end_seconds_count",] == 5
    assert found["inter_token_seconds_count",] == 2 * 8 + 2
    assert found["end_to_end_seconds_sum",] >= found["time_to_first_token_seconds_sum",] > 0
    assert (
        found["pages_used",] + found["pages_free",]
        == served.get("/v1/cache").json()["pages"]["free"] + found["pages_used",]
    )
    assert (found["running",], found["waiting",], found["batch_size",]) == (0, 0, 0)
    assert found["preemptions_total",] == 0


def test_gauges_follow_running_and_waiting_completions(endless_model, letters) -> None:
    async def main() -> None:
        engine = Engine(endless_model, letters, EngineConfig(max_active_requests=2))
        app = create_app(engine, "letters")
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
            stream = engine.submit([([5] * 100, SamplingParams(max_tokens=400, temperature=0))] * 3)
            while engine.decoding < 2:
                await asyncio.sleep(0.005)
            found = parse((await client.get("/metrics")).text)
            assert (found["running",], found["waiting",], found["batch_size",]) == (2, 1, 2)
            assert found["cache_bytes", "window"] > 0
            assert found["pages_used",] >= 2
            stream.abort()
            await engine.stop()
            found = parse((await client.get("/metrics")).text)
            assert found["completions_total", "aborted"] == 3

    asyncio.run(main())


def test_drafts_are_counted(random_model_of, letters) -> None:
    model = random_model_of(letters.vocab_size, mtp_layers=1)
    engine = Engine(model, letters, EngineConfig(speculative_tokens=2))
    with TestClient(create_app(engine, "letters")) as client:
        body = {"prompt": [5] * 9, "max_tokens": 40, "ignore_eos": True}
        answer = client.post("/v1/completions", json=body).json()
        found = parse(client.get("/metrics").text)
    stats = engine.stats
    assert answer["usage"]["completion_tokens"] == found["generated_tokens_total",] == 40
    assert found["draft_tokens_total",] == stats.drafted_tokens > stats.decode_steps > 0
    assert found["accepted_tokens_total",] == stats.accepted_tokens == 39 - stats.decode_steps
    assert found["inter_token_seconds_count",] == 39


def sequence_of(letters, engine: Engine, now: float, prompt: int = 3) -> Sequence:
    deadline = now + engine.config.request_timeout_seconds
    return Sequence([5] * prompt, SamplingParams(max_tokens=9), letters, deadline)


def test_latencies(endless_model, letters, monkeypatch) -> None:
    """Time from arrival to the first token, between tokens, and to the end; a step may produce several tokens."""
    engine = Engine(endless_model, letters)
    metrics = Metrics(engine, CacheReporter(engine))
    now = [100.0]
    monkeypatch.setattr("serve.api.metrics.time.monotonic", lambda: now[0])
    sequence = sequence_of(letters, engine, now[0])
    for seconds, delta in (
        (2.0, Delta("a", tokens=1)),
        (0.3, Delta(tokens=1)),
        (0.4, Delta("b", tokens=2)),
        (0.5, Delta("c", (), "stop", tokens=1)),
    ):
        now[0] += seconds
        sequence.tokens += [5] * 5  # the thread of the model may be ahead of the outputs
        metrics.observe(sequence, delta)
    found = {name: value for (name, *_), value in samples(metrics).items()}
    assert found["time_to_first_token_seconds_sum"] == pytest.approx(2.0)
    assert found["inter_token_seconds_sum"] == pytest.approx(0.3 + 0.4 + 0.5)
    assert found["inter_token_seconds_count"] == 4
    assert found["end_to_end_seconds_sum"] == pytest.approx(3.2)
    assert found["generated_tokens_total"] == 5
    assert found["prompt_tokens_total"] == 3


def samples(metrics: Metrics) -> dict:
    return {
        (sample.name.removeprefix("fiftyfold_"), *sample.labels.values()): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
    }


def test_outcomes_of_errors(endless_model, letters) -> None:
    engine = Engine(endless_model, letters)
    metrics = Metrics(engine, CacheReporter(engine))
    for error in (RequestAbortedError("gone"), EngineError("broken"), EngineError("broken")):
        metrics.observe(sequence_of(letters, engine, 0.0), Delta(error=error))
    found = samples(metrics)
    assert (found["completions_total", "aborted"], found["completions_total", "error"]) == (1, 2)
    assert found["prompt_tokens_total",] == 0
    assert found["time_to_first_token_seconds_count",] == 0


def test_two_applications_have_separate_metrics(served, client) -> None:
    served.get("/version")
    assert ("requests_total", "/version", "200") in parse(served.get("/metrics").text)
    assert parse(served.get("/metrics").text)["requests_total", "/version", "200"] == 1
