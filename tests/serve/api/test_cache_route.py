"""Reported cache bytes, compared with the caches themselves."""

import asyncio

import httpx
import pytest

from model.cache import Cache
from model.costs import gqa8_costs
from serve.api.asgi import create_app
from serve.engine import Engine, EngineConfig, SamplingParams


def run_with_report(engine: Engine, requests, check) -> None:
    """Call ``check`` with a report taken between two steps, while every request is decoded."""

    async def main() -> None:
        transport = httpx.ASGITransport(create_app(engine, "letters"))
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
            stream = engine.submit(requests)
            step, ready, resume = engine._scheduler.step, asyncio.Event(), asyncio.Event()
            loop = asyncio.get_running_loop()

            def pausing_step(arrivals):
                results = step(arrivals)
                if len(engine._scheduler.batch) == len(requests) and not ready.is_set():
                    loop.call_soon_threadsafe(ready.set)
                    asyncio.run_coroutine_threadsafe(resume.wait(), loop).result(20)
                return results

            engine._scheduler.step = pausing_step
            await asyncio.wait_for(ready.wait(), 20)
            try:
                check((await client.get("/v1/cache")).json())
            finally:
                resume.set()
            stream.abort()
            await engine.stop()

    asyncio.run(main())


def test_drafts_have_a_window_of_their_own(random_model_of, letters) -> None:
    model = random_model_of(letters.vocab_size, mtp_layers=1)
    engine = Engine(model, letters, EngineConfig(kept_prefixes=0, speculative_tokens=3))
    params = SamplingParams(max_tokens=100, ignore_eos=True)

    def check(report) -> None:
        cache = engine._scheduler.batch.cache
        assert report["total"]["components"] == {component: cache.nbytes(component) for component in cache.components}
        assert report["sequences"][0]["bytes"] == cache.nbytes() > Cache(model.config, 1, 90).nbytes()

    run_with_report(engine, [([5] * 90, params)], check)


def test_live_sequences(endless_model, letters) -> None:
    engine = Engine(endless_model, letters, EngineConfig(kept_prefixes=0))
    params = SamplingParams(max_tokens=100, temperature=0)

    def check(report) -> None:
        cache = engine._scheduler.batch.cache
        assert report["total"]["bytes"] == cache.nbytes()
        for component, size in report["total"]["components"].items():
            assert size == cache.nbytes(component)
        assert set(report["total"]["components"]) == set(cache.components)
        assert [sequence["tokens"] for sequence in report["sequences"]] == cache.lengths
        assert [sequence["prompt_tokens"] for sequence in report["sequences"]] == [90, 200]
        for i, sequence in enumerate(report["sequences"]):
            own = cache.fork([i])
            assert sequence["bytes"] == own.nbytes() == sum(sequence["components"].values())
            reference = gqa8_costs(engine.model_config).cache_bytes(sequence["tokens"])
            assert sequence["times_smaller"] == pytest.approx(reference / own.nbytes())
        pool = engine.memory.pool
        assert report["pages"]["used"] == sum(pool.pages_for(length) for length in cache.lengths)
        assert report["pages"]["used"] + report["pages"]["free"] == pool.pages
        assert report["kept_prefixes"] == {"count": 0, "capacity": 0}

    run_with_report(engine, [([5] * 90, params), ([6] * 200, params)], check)


def test_kept_prefixes_share_pages_and_have_a_state_of_their_own(endless_model, letters) -> None:
    engine = Engine(endless_model, letters)
    params = SamplingParams(max_tokens=100, temperature=0)

    def check(report) -> None:
        assert report["kept_prefixes"]["count"] == 1
        [sequence] = report["sequences"]
        state = {name: size for name, size in report["total"]["components"].items() if name in ("window", "tail")}
        assert len(state) == 2
        for component, size in report["total"]["components"].items():
            assert size == sequence["components"][component] * (2 if component in state else 1)

    run_with_report(engine, [([5] * 100, params)], check)


def test_an_idle_server(client, endless_model) -> None:
    client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
    report = client.get("/v1/cache").json()
    assert report["sequences"] == []
    assert report["reference"] == (
        "grouped-query attention with 8 key-value heads of 128 dims in BF16 at the same depth"
    )
    full = Cache(endless_model.config, 1, 512, device="meta").nbytes()
    want = gqa8_costs(endless_model.config).cache_bytes(512) / full
    assert report["times_smaller_at_full_context"] == pytest.approx(want)
    assert want > 10
