"""The engine on a real model: what one request gets does not depend on the others, and nothing outlives its request."""

import asyncio
import gc
import time
import weakref
from dataclasses import dataclass

import pytest
import torch

from model.cache import Cache
from model.generation import prefill
from serve.engine import (
    Engine,
    EngineError,
    Limits,
    QueueFullError,
    RequestAbortedError,
    RequestError,
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


def test_greedy_equals_the_model_stepped_by_hand(letters_model, letters) -> None:
    prompt = prompt_of(letters, 6)
    with torch.inference_mode():
        cache = Cache(letters_model.config, 1, 200)
        logits = prefill(letters_model, cache, torch.tensor([prompt]), chunk=32)
        want: list[int] = []
        while len(want) < 50 and (not want or want[-1] != letters.eos_id):
            want.append(int(logits.argmax()))
            logits = letters_model(torch.tensor([want[-1:]]), cache)[:, -1]
    got = run(complete(Engine(letters_model, letters, Limits(prefill_chunk=32)), prompt, max_tokens=50, temperature=0))
    assert got.tokens == want
    assert got.text == letters.decode(want)


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.0, "seed": 11}, {"top_p": 0.9, "seed": 5}])
def test_alone_equals_in_company(byte_model, byte_tokenizer, sampling) -> None:
    prompts = [prompt_of(byte_tokenizer, n) for n in (0, 1, 5, 9)]

    async def together() -> list[Outcome]:
        engine = Engine(byte_model, byte_tokenizer, Limits(max_active=3, prefill_chunk=16))
        asks = [complete(engine, prompt, max_tokens=6 + 3 * i, **sampling) for i, prompt in enumerate(prompts)]
        noise = [complete(engine, prompts[2], max_tokens=10) for _ in range(2)]
        return (await asyncio.gather(*asks, *noise))[: len(prompts)]

    async def alone() -> list[Outcome]:
        engine = Engine(byte_model, byte_tokenizer, Limits(prefill_chunk=16))
        return [await complete(engine, p, max_tokens=6 + 3 * i, **sampling) for i, p in enumerate(prompts)]

    assert run(together()) == run(alone())


def test_seeds_differ_and_no_seed_differs_each_time(byte_model, byte_tokenizer) -> None:
    async def texts(**params) -> list[str]:
        engine = Engine(byte_model, byte_tokenizer)
        return [(await complete(engine, [0], max_tokens=24, **params)).text for _ in range(2)]

    first, again = run(texts(seed=1))
    assert first == again
    assert run(texts(seed=2))[0] != first
    one, other = run(texts())
    assert one != other


def test_the_last_of_a_full_context(endless_model, letters) -> None:
    prompt = (prompt_of(letters, 60) * 2)[:500]
    outcome = run(complete(Engine(endless_model, letters), prompt, max_tokens=12, seed=1))
    assert outcome.completion_tokens == 12


def test_max_tokens_zero_only_reads(letters_model, letters) -> None:
    outcome = run(complete(Engine(letters_model, letters), [0, 5, 6], max_tokens=0))
    assert (outcome.text, outcome.finish_reason, outcome.completion_tokens) == ("", "length", 0)


def test_an_empty_prompt_starts_from_bos(letters_model, letters) -> None:
    async def both() -> list[Outcome]:
        engine = Engine(letters_model, letters)
        return [await complete(engine, p, max_tokens=10, temperature=0) for p in ([], [letters.bos_id])]

    empty, bos = run(both())
    assert empty == bos


def test_end_of_sequence_stops_and_is_not_text(letters_model, letters) -> None:
    engine = Engine(letters_model, letters)
    outcomes = (run(complete(engine, [0], max_tokens=60, seed=3)) for seed in range(200))
    outcome = next(outcome for outcome in outcomes if outcome.finish_reason == "stop")
    assert outcome.tokens[-1] == letters.eos_id
    assert letters.eos_id not in outcome.tokens[:-1]
    assert outcome.completion_tokens == len(outcome.tokens)
    assert outcome.text == letters.decode(outcome.tokens[:-1])


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_stop_strings_at_every_place(endless_model, letters, length) -> None:

    async def all_cuts() -> None:
        engine = Engine(endless_model, letters)
        whole = await complete(engine, [0, 7], max_tokens=24, seed=3)
        for at in range(0, len(whole.text) - length, 4):
            stop = whole.text[at : at + length]
            got = await complete(engine, [0, 7], max_tokens=24, seed=3, stop=(stop,))
            assert got.text == whole.text[: whole.text.index(stop)]
            assert got.finish_reason == "stop"
            assert got.completion_tokens <= whole.completion_tokens

    run(all_cuts())


def test_a_stop_string_that_never_completes_is_given_out_at_the_end(endless_model, letters) -> None:

    async def both() -> tuple[Outcome, Outcome]:
        engine = Engine(endless_model, letters)
        whole = await complete(engine, [0, 7], max_tokens=9, seed=3)
        return whole, await complete(engine, [0, 7], max_tokens=9, seed=3, stop=(whole.text[-3:] + "!",))

    whole, held = run(both())
    assert (held.text, held.finish_reason) == (whole.text, "length")
    assert held.tokens == whole.tokens


def test_pieces_hold_whole_characters(byte_model, byte_tokenizer) -> None:
    # Random bytes, most of which are no UTF-8: what was streamed must be what decoding at once gives.
    outcome = run(complete(Engine(byte_model, byte_tokenizer), [0], max_tokens=80, seed=4))
    tokens = [token for token in outcome.tokens if token != byte_tokenizer.eos_id]
    assert outcome.text == byte_tokenizer.decode(tokens)
    assert len(outcome.pieces) > 20


def test_running_streams_flow_while_a_long_prompt_is_read(endless_model, letters) -> None:
    scheduler = Scheduler(endless_model, letters, Limits(prefill_chunk=32))
    far = time.monotonic() + 60
    short = Sequence([0, 5], SamplingParams(max_tokens=12, seed=3), letters, far)
    long = Sequence(prompt_of(letters, 40)[:320], SamplingParams(max_tokens=1), letters, far)
    scheduler.step([short])
    before = short.completion_tokens
    steps = 0
    scheduler.step([long])
    while not long.prefill_done:
        scheduler.step()
        steps += 1
    assert steps == 9
    assert short.completion_tokens == before + 10


def test_waiting_requests_are_bounded_and_served_in_order(letters_model, letters) -> None:
    async def main() -> None:
        engine = Engine(letters_model, letters, Limits(max_active=1, max_waiting=2))
        order: list[int] = []

        async def ask(i: int) -> None:
            await complete(engine, [0, i], max_tokens=4, seed=0)
            order.append(i)

        asks = [asyncio.ensure_future(ask(i)) for i in (5, 6, 7)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError, match="busy with 3 of at most 3"):
            engine.submit([([0], SamplingParams())])
        with pytest.raises(RequestError, match="asks for 4 completions, the server takes 3"):
            engine.submit([([0], SamplingParams())] * 4)
        await asyncio.gather(*asks)
        assert order == [5, 6, 7]
        await complete(engine, [0], max_tokens=2)  # there is room again

    run(main())


def test_abort_frees_the_cache(endless_model, letters) -> None:
    async def main() -> None:
        engine = Engine(endless_model, letters, Limits(max_active=1))
        stream = engine.submit([([0, 9], SamplingParams(max_tokens=400, seed=1))])
        waiting = engine.submit([([0, 9], SamplingParams(max_tokens=400, seed=1))])
        async for _, delta in stream:
            if delta.text:
                break
        cache = weakref.ref(stream.sequences[0].cache)
        assert cache() is not None
        done = stream.sequences[0].completion_tokens
        stream.abort()
        waiting.abort()
        await idle(engine)
        gc.collect()
        assert cache() is None
        assert stream.sequences[0].completion_tokens <= done + 2
        assert waiting.sequences[0].completion_tokens == 0
        with pytest.raises(RequestAbortedError):
            async for _ in waiting:
                pass

    run(main())


def test_a_finished_request_keeps_no_cache_but_its_size(letters_model, letters) -> None:
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
        engine = Engine(endless_model, letters, Limits(max_active=1, timeout_seconds=0.2))
        asks = [complete(engine, [0, 9], max_tokens=500, temperature=0) for _ in range(2)]
        for result in await asyncio.gather(*asks, return_exceptions=True):
            assert isinstance(result, RequestTimeoutError)
            assert "0.2 seconds" in str(result)
        assert engine.unfinished == 0

    run(main())


def test_a_failure_inside_the_model_ends_one_sequence_only(letters_model, letters) -> None:
    scheduler = Scheduler(letters_model, letters, Limits())
    far = time.monotonic() + 60
    params = SamplingParams(max_tokens=5, temperature=0, logprobs=0)
    bad = Sequence([0, 10_000], params, letters, far)  # past the embedding's rows; the engine refuses it earlier
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
    assert not scheduler.busy


def test_an_engine_that_lost_its_worker_says_so(letters_model, letters) -> None:
    async def main() -> None:
        engine = Engine(letters_model, letters)
        engine._worker.shutdown()
        stream = engine.submit([([0], SamplingParams())] * 2)
        with pytest.raises(EngineError, match="the engine failed"):
            await stream.__anext__()
        with pytest.raises(EngineError, match="cannot schedule new futures after shutdown"):
            engine.check_health()  # by which Ray Serve knows to replace the replica
        assert engine.unfinished == 0

    run(main())


def test_requests_that_can_never_run(letters_model, letters) -> None:
    async def main() -> None:
        engine = Engine(letters_model, letters)
        with pytest.raises(RequestError, match="500 tokens and max_tokens 13 make 513, the model's context is 512"):
            engine.submit([([0] * 500, SamplingParams(max_tokens=13))])
        with pytest.raises(RequestError, match="token id 38 is not in the vocabulary of 38"):
            engine.submit([([0], SamplingParams()), ([0, 38], SamplingParams())])
        with pytest.raises(RequestError, match="token id -1 "):
            engine.submit([([-1], SamplingParams())])
        assert engine.unfinished == 0

    run(main())


def test_stop_ends_everything(endless_model, letters) -> None:
    async def main() -> None:
        engine = Engine(endless_model, letters)
        stream = engine.submit([([0], SamplingParams(max_tokens=400, temperature=0))] * 2)
        await stream.__anext__()
        await engine.stop()
        with pytest.raises(RequestAbortedError):
            async for _ in stream:
                pass
        with pytest.raises(EngineError, match="stopping"):
            engine.submit([([0], SamplingParams())])

    run(main())


def test_prompt_logprobs_equal_one_forward_pass(letters_model, letters) -> None:
    prompt = prompt_of(letters, 8)

    async def main() -> list:
        engine = Engine(letters_model, letters, Limits(prefill_chunk=7))
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
        # In chunks a value on a format's border may fall either way; the next place's scores are apart by whole units.
        assert record.logprob == pytest.approx(want[i, prompt[i + 1]].item(), abs=1e-2)
        assert record.top[0][1] == pytest.approx(want[i].max().item(), abs=1e-2)
        assert letters.decode(prompt[: i + 1]) == letters.decode(prompt)[: record.offset]
