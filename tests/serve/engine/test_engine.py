"""The engine with a real model: requests are independent of each other, and each frees its resources."""

import asyncio
import time
from dataclasses import dataclass

import pytest
import torch
from slow_engine import slow_down

from model.cache import Cache
from model.generation import prefill
from serve.engine import (
    Engine,
    EngineConfig,
    EngineError,
    QueueFullError,
    RequestAbortedError,
    RequestError,
    RequestFields,
    RequestTimeoutError,
    SamplingParams,
)
from serve.engine.scheduler import Scheduler
from serve.engine.sequence import Sequence


@dataclass
class Outcome:
    text: str
    pieces: list[str]
    finish_reason: str | None
    completion_tokens: int
    tokens: list[int]


async def complete(engine: Engine, prompt: list[int], **params) -> Outcome:
    stream = engine.submit([(prompt, SamplingParams(logprobs=0, **params))])
    pieces, tokens, reason = [], [], None
    async for _, delta in stream:
        pieces.append(delta.text)
        tokens += [record.token_id for record in delta.logprobs]
        reason = delta.finish_reason
    return Outcome("".join(pieces), pieces, reason, stream.sequences[0].completion_tokens, tokens)


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 60))


async def idle(engine: Engine) -> None:
    while engine.unfinished:
        await asyncio.sleep(0.005)


def prompt_of(tokenizer, words: int) -> list[int]:
    return [tokenizer.bos_id, *tokenizer.encode("the other rain " * words)]


def test_greedy_equals_a_manual_decoding_loop(letters_model, letters) -> None:
    prompt = prompt_of(letters, 6)
    with torch.inference_mode():
        cache = Cache(letters_model.config, 1, 200)
        logits = prefill(letters_model, cache, torch.tensor([prompt]), chunk=32)
        want: list[int] = []
        while len(want) < 50 and (not want or want[-1] != letters.eos_id):
            want.append(int(logits.argmax()))
            logits = letters_model(torch.tensor([want[-1:]]), cache)[:, -1]
    got = run(
        complete(Engine(letters_model, letters, EngineConfig(prefill_chunk=32)), prompt, max_tokens=50, temperature=0)
    )
    assert got.tokens == want
    assert got.text == letters.decode(want)


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.0, "seed": 11}, {"top_p": 0.9, "seed": 5}])
def test_output_does_not_depend_on_concurrent_requests(byte_model, byte_tokenizer, sampling) -> None:
    prompts = [prompt_of(byte_tokenizer, n) for n in (0, 1, 5, 9)]

    async def concurrently() -> list[Outcome]:
        engine = Engine(byte_model, byte_tokenizer, EngineConfig(max_active_requests=3, prefill_chunk=16))
        asks = [complete(engine, prompt, max_tokens=6 + 3 * i, **sampling) for i, prompt in enumerate(prompts)]
        noise = [complete(engine, prompts[2], max_tokens=10) for _ in range(2)]
        return (await asyncio.gather(*asks, *noise))[: len(prompts)]

    async def sequentially() -> list[Outcome]:
        engine = Engine(byte_model, byte_tokenizer, EngineConfig(prefill_chunk=16))
        return [await complete(engine, p, max_tokens=6 + 3 * i, **sampling) for i, p in enumerate(prompts)]

    assert run(concurrently()) == run(sequentially())


def test_a_seed_is_reproducible_and_no_seed_is_random(byte_model, byte_tokenizer) -> None:
    async def texts(**params) -> list[str]:
        engine = Engine(byte_model, byte_tokenizer)
        return [(await complete(engine, [0], max_tokens=24, **params)).text for _ in range(2)]

    first, again = run(texts(seed=1))
    assert first == again
    assert run(texts(seed=2))[0] != first
    one, other = run(texts())
    assert one != other


def test_a_completion_that_fills_the_context(endless_model, letters) -> None:
    prompt = (prompt_of(letters, 60) * 2)[:500]
    outcome = run(complete(Engine(endless_model, letters), prompt, max_tokens=12, seed=1))
    assert outcome.completion_tokens == 12


def test_max_tokens_zero_only_prefills(letters_model, letters) -> None:
    outcome = run(complete(Engine(letters_model, letters), [0, 5, 6], max_tokens=0))
    assert (outcome.text, outcome.finish_reason, outcome.completion_tokens) == ("", "length", 0)


def test_an_empty_prompt_starts_from_bos(letters_model, letters) -> None:
    async def both() -> list[Outcome]:
        engine = Engine(letters_model, letters)
        return [await complete(engine, p, max_tokens=10, temperature=0) for p in ([], [letters.bos_id])]

    empty, bos = run(both())
    assert empty == bos


def test_eos_stops_and_is_not_in_the_text(letters_model, letters) -> None:
    engine = Engine(letters_model, letters)
    outcomes = (run(complete(engine, [0], max_tokens=60, seed=seed)) for seed in range(200))
    outcome = next(outcome for outcome in outcomes if outcome.finish_reason == "stop")
    assert outcome.tokens[-1] == letters.eos_id
    assert letters.eos_id not in outcome.tokens[:-1]
    assert outcome.completion_tokens == len(outcome.tokens)
    assert outcome.text == letters.decode(outcome.tokens[:-1])


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_stop_strings_at_every_position(endless_model, letters, length) -> None:

    async def all_positions() -> None:
        engine = Engine(endless_model, letters)
        whole = await complete(engine, [0, 7], max_tokens=24, seed=3)
        for at in range(0, len(whole.text) - length, 4):
            stop = whole.text[at : at + length]
            got = await complete(engine, [0, 7], max_tokens=24, seed=3, stop=(stop,))
            assert got.text == whole.text[: whole.text.index(stop)]
            assert got.finish_reason == "stop"
            assert got.completion_tokens <= whole.completion_tokens

    run(all_positions())


def test_an_incomplete_stop_string_is_emitted_at_the_end(endless_model, letters) -> None:

    async def both() -> tuple[Outcome, Outcome]:
        engine = Engine(endless_model, letters)
        whole = await complete(engine, [0, 7], max_tokens=9, seed=3)
        return whole, await complete(engine, [0, 7], max_tokens=9, seed=3, stop=(whole.text[-3:] + "!",))

    whole, held = run(both())
    assert (held.text, held.finish_reason) == (whole.text, "length")
    assert held.tokens == whole.tokens


def test_pieces_are_complete_characters(byte_model, byte_tokenizer) -> None:
    # Random bytes, mostly invalid UTF-8: the streamed text must equal the text decoded at once.
    outcome = run(complete(Engine(byte_model, byte_tokenizer), [0], max_tokens=80, seed=4))
    tokens = [token for token in outcome.tokens if token != byte_tokenizer.eos_id]
    assert outcome.text == byte_tokenizer.decode(tokens)
    assert len(outcome.pieces) > 20


def test_running_streams_continue_during_a_long_prefill(endless_model, letters) -> None:
    scheduler = Scheduler(endless_model, EngineConfig(prefill_chunk=32, prefill_share=1e9, kept_prefixes=0))
    far = time.monotonic() + 60
    short = Sequence([0, 5], SamplingParams(max_tokens=12, seed=3), letters, far)
    long = Sequence(prompt_of(letters, 40)[:320], SamplingParams(max_tokens=1), letters, far)
    scheduler.step([short])
    before = short.completion_tokens
    steps = 0
    scheduler.step([long])
    while not long.completion_tokens:
        scheduler.step()
        steps += 1
    assert steps == 9
    assert short.completion_tokens == before + 10


def test_the_queue_is_bounded_and_first_in_first_out(letters_model, letters) -> None:
    async def main() -> None:
        engine = Engine(letters_model, letters, EngineConfig(max_active_requests=1, max_waiting_requests=2))
        order: list[int] = []

        async def ask(i: int) -> None:
            await complete(engine, [0, i], max_tokens=4, seed=0)
            order.append(i)

        asks = [asyncio.ensure_future(ask(i)) for i in (5, 6, 7)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError, match="busy with 3 of at most 3"):
            engine.submit([([0], SamplingParams())])
        with pytest.raises(RequestError, match="asks for 4 completions, but the server accepts at most 3"):
            engine.submit([([0], SamplingParams())] * 4)
        await asyncio.gather(*asks)
        assert order == [5, 6, 7]
        await complete(engine, [0], max_tokens=2)  # the queue has room again

    run(main())


def test_abort_frees_the_cache(endless_model, letters) -> None:
    async def main() -> None:
        engine = Engine(endless_model, letters, EngineConfig(max_active_requests=1))
        stream = engine.submit([([0, 9], SamplingParams(max_tokens=400, seed=1))])
        waiting = engine.submit([([0, 9], SamplingParams(max_tokens=400, seed=1))])
        async for _, delta in stream:
            if delta.text:
                break
        assert engine.memory.used_pages > 0
        stream.abort()
        done = stream.sequences[0].completion_tokens
        waiting.abort()
        await idle(engine)
        assert engine.memory.used_pages == 0
        assert stream.sequences[0].completion_tokens <= done + 1  # of the step during which it was aborted
        assert waiting.sequences[0].completion_tokens == 0
        with pytest.raises(RequestAbortedError):
            async for _ in waiting:
                pass

    run(main())


def test_a_finished_request_frees_its_cache_and_keeps_its_size(letters_model, letters) -> None:
    async def main() -> None:
        engine = Engine(letters_model, letters)
        stream = engine.submit([([0] * 40, SamplingParams(max_tokens=9, seed=1))])
        async for _ in stream:
            pass
        [sequence] = stream.sequences
        assert sequence.cache is None
        assert sequence.cache_nbytes == Cache(letters_model.config, 1, 48).nbytes() > 0

    run(main())


def test_deadline(endless_model, letters) -> None:
    async def main() -> None:
        engine = Engine(endless_model, letters, EngineConfig(max_active_requests=1, request_timeout_seconds=0.2))
        slow_down(engine)
        asks = [complete(engine, [0, 9], max_tokens=500, temperature=0) for _ in range(2)]
        for result in await asyncio.gather(*asks, return_exceptions=True):
            assert isinstance(result, RequestTimeoutError)
            assert "0.2 seconds" in str(result)
        assert engine.unfinished == 0

    run(main())


def test_a_model_failure_ends_one_sequence_only(letters_model, letters) -> None:
    scheduler = Scheduler(letters_model, EngineConfig())
    far = time.monotonic() + 60
    params = SamplingParams(max_tokens=5, temperature=0, logprobs=0)
    bad = Sequence([0, 10_000], params, letters, far)  # outside the vocabulary; the engine would refuse it
    good = Sequence([0, 9], params, letters, far)
    errors, reason = [], None
    results = scheduler.step([bad, good])
    while results:
        for sequence, delta in results:
            if delta.error:
                assert sequence is bad
                errors.append(delta.error)
            elif sequence is good:
                reason = delta.finish_reason
        results = scheduler.step()
    assert [type(error) for error in errors] == [EngineError]
    assert reason is not None
    assert not scheduler.has_unfinished


def test_a_lost_worker_fails_requests_and_the_health_check(letters_model, letters) -> None:
    async def main() -> None:
        engine = Engine(letters_model, letters)
        engine._worker.executor.shutdown()
        stream = engine.submit([([0], SamplingParams())] * 2)
        with pytest.raises(EngineError, match="the engine failed"):
            await stream.__anext__()
        with pytest.raises(EngineError, match="cannot schedule new futures after shutdown"):
            engine.check_health()  # Ray Serve then replaces the replica
        assert engine.unfinished == 0

    run(main())


def test_invalid_requests_are_refused(letters_model, letters) -> None:
    async def main() -> None:
        engine = Engine(letters_model, letters)
        with pytest.raises(
            RequestError, match="500 tokens plus max_tokens 13 is 513, more than the model's context of 512"
        ):
            engine.submit([([0] * 500, SamplingParams(max_tokens=13))])
        with pytest.raises(RequestError, match="token ID 38 is out of range for a vocabulary of 38"):
            engine.submit([([0], SamplingParams()), ([0, 38], SamplingParams())])
        with pytest.raises(RequestError, match="token ID -1 "):
            engine.submit([([-1], SamplingParams())])
        assert engine.unfinished == 0

    run(main())


def test_a_request_larger_than_the_cache_is_refused_by_the_names_of_its_client(
    letters_model, letters, monkeypatch
) -> None:
    async def main() -> None:
        engine = Engine(letters_model, letters)
        pages = engine.memory.pool.pages
        monkeypatch.setattr(engine.memory, "pages_for", lambda tokens: tokens * pages // 300)
        for limit, max_tokens, name in (("limit", 310, "limit"), ("limit", 150, "text.1"), (None, 310, "text.1")):
            with pytest.raises(RequestError, match="cache pages, but the server has") as caught:
                engine.submit([([0] * 200, SamplingParams(max_tokens=max_tokens))], [RequestFields("text.1", limit)])
            assert str(caught.value).startswith(f"{name}: ")
            assert caught.value.param == name.partition(".")[0]

    run(main())


def test_stop_aborts_all_requests(endless_model, letters) -> None:
    async def main() -> None:
        engine = Engine(endless_model, letters)
        stream = engine.submit([([0], SamplingParams(max_tokens=400, temperature=0))] * 2)
        await stream.__anext__()
        await engine.stop()
        with pytest.raises(RequestAbortedError):
            async for _ in stream:
                pass
        with pytest.raises(EngineError, match="shutting down"):
            engine.submit([([0], SamplingParams())])

    run(main())


def test_prompt_logprobs_equal_one_forward_pass(letters_model, letters) -> None:
    prompt = prompt_of(letters, 8)

    async def main() -> list:
        engine = Engine(letters_model, letters, EngineConfig(prefill_chunk=7))
        params = SamplingParams(max_tokens=0, logprobs=2, prompt_logprobs=True)
        stream = engine.submit([(prompt, params)])
        async for _ in stream:
            pass
        return stream.sequences[0].prompt_logprobs

    records = run(main())
    with torch.inference_mode():
        want = letters_model(torch.tensor([prompt]))[0].log_softmax(dim=-1)
    assert [record.token_id for record in records] == prompt
    assert records[0].logprob is None
    for i, record in enumerate(records[1:]):
        # Chunking may round a borderline value differently; scores of the wrong position would differ by whole units.
        assert record.logprob == pytest.approx(want[i, prompt[i + 1]].item(), abs=1e-2)
        assert record.top[0][1] == pytest.approx(want[i].max().item(), abs=1e-2)
        assert letters.decode(prompt[: i + 1]) == letters.decode(prompt)[: record.text_offset]
